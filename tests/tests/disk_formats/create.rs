//! `device-disk create`.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::shop::{Shop, connect, end};

#[test]
fn images_are_made_whole_or_not_at_all() {
    let shop = Shop::new();
    for (command, format) in [
        ("a --format raw --size 1M", "raw"),
        ("b --format qcow2 --size 8T", "qcow2"),
        ("c --format qcow2 --size 512 --cluster-size 2M", "qcow2"),
        ("d --format qcow2 --size 4G --cluster-size 512", "qcow2"),
        ("e --format qcow --size 4G", "qcow"),
        ("f --format qcow --size 4G --cluster-size 64K", "qcow"),
        (
            "sub/g --format qcow2 --size 1M --backing ../a --backing-format raw",
            "qcow2",
        ),
        (
            "h --format qcow2 --size 2M --backing b --backing-format qcow2",
            "qcow2",
        ),
        (
            "i --format qcow --size 2M --backing a --backing-format raw",
            "qcow",
        ),
    ] {
        let _ = std::fs::create_dir(shop.path("sub"));
        shop.works(&format!("device-disk create {command}"));
        let name = command.split(' ').next().unwrap();
        let output = shop.run(&format!("qemu-img info --output=json {name}"));
        let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(info["format"], format, "{command}: {info}");
        let options = ["--format", format, "--backing", "allow"];
        let process = shop.launch(name, &options).listening();
        let driver = connect(&process, 1);
        assert_eq!(info["virtual-size"], driver.capacity(), "{command}");
        drop(driver);
        end(&process);
        if format == "qcow2" {
            shop.works(&format!("qemu-img check {name}"));
        }
    }
    // Of the program itself, and of an image that QEMU makes, byte for byte.
    shop.works("qemu-img create -q -f qcow theirs 4G");
    assert!(std::fs::read(shop.path("e")).unwrap() == std::fs::read(shop.path("theirs")).unwrap());

    let before = files(&shop);
    let too_long = format!(
        "x --format qcow --size 1M --backing {}a --backing-format raw",
        "./".repeat(512)
    );
    for (command, code, why) in [
        ("a --format qcow2 --size 1M", 1, "--force"),
        ("/ --format raw --size 1M", 1, "/"),
        ("sub --format raw --size 1M --force", 1, "no file"),
        ("none/x --format raw --size 1M", 1, "No such file"),
        ("x --format raw --size 0", 1, "sector"),
        ("x --format raw --size 1000", 1, "sector"),
        ("x --format raw --size 9999999T", 1, "no disk is that large"),
        ("x --format raw --size 7E", 2, "is not a size"),
        ("x --format raw --size=-1", 2, "is not a size"),
        ("x --format raw --size 8388607T", 1, "x: "),
        ("x --format qcow2 --size 1000000T", 1, "x: "),
        ("x --format qcow --size 1000000T", 1, "too large"),
        (
            "x --format raw --size 1M --cluster-size 4K",
            1,
            "--cluster-size",
        ),
        (
            "x --format qcow2 --size 1M --cluster-size 3K",
            1,
            "--cluster-size",
        ),
        (
            "x --format qcow2 --size 1M --cluster-size 4M",
            1,
            "--cluster-size",
        ),
        (
            "x --format qcow --size 1M --cluster-size 128K",
            1,
            "--cluster-size",
        ),
        ("x --format vmdk --size 1M", 2, "vmdk"),
        ("x --size 1M", 2, "--format"),
        (
            "x --format qcow2 --size 1M --backing a",
            2,
            "--backing-format",
        ),
        (
            "x --format qcow2 --size 1M --backing-format raw",
            2,
            "--backing",
        ),
        (
            "x --format raw --size 1M --backing a --backing-format raw",
            1,
            "raw image",
        ),
        (
            "x --format qcow --size 1M --backing h --backing-format qcow2",
            1,
            "raw one",
        ),
        (
            "x --format qcow2 --size 1M --backing y --backing-format raw",
            1,
            "y: No such",
        ),
        (
            "x --format qcow2 --size 1M --backing a --backing-format qcow2",
            1,
            "no qcow2",
        ),
        (
            "sub/g --format qcow2 --size 1M --backing ./g --backing-format qcow2 --force",
            1,
            "on itself",
        ),
        (&too_long, 1, "1023 bytes"),
    ] {
        let output = shop.run(&format!("device-disk create {command}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{command}: {said}");
        let line = said.starts_with("device-disk: ") && said.lines().count() == 1;
        assert!(line && said.contains(why), "{command}: {said}");
        assert_eq!(files(&shop), before, "{command}");
    }
    // One that is served is nobody's to replace.
    let process = shop.launch("a", &[]).listening();
    let output = shop.run("device-disk create a --format qcow2 --size 1M --force");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("locked"), "{said}");
    assert_eq!(files(&shop), before);
    end(&process);
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(shop.path("a"), private).unwrap();
    shop.works("device-disk create a --format qcow2 --size 3M --force");
    let mode = std::fs::metadata(shop.path("a")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    shop.agrees("a", "qcow2", &[0; 3 << 20], false);
}

fn files(shop: &Shop) -> Vec<(PathBuf, u64)> {
    let entries = std::fs::read_dir(shop.0.path()).unwrap().flatten();
    let mut files: Vec<_> = entries
        .map(|entry| (entry.path(), entry.metadata().unwrap().len()))
        .collect();
    files.sort();
    files
}

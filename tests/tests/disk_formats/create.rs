//! `device-disk create`.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::image_dir::{ImageDir, connect, end};

#[test]
fn images_are_created_completely_or_not_at_all() {
    let dir = ImageDir::new();
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
        let _ = std::fs::create_dir(dir.path("sub"));
        dir.works(&format!("device-disk create {command}"));
        let name = command.split(' ').next().unwrap();
        let output = dir.run(&format!("qemu-img info --output=json {name}"));
        let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(info["format"], format, "{command}: {info}");
        let options = ["--format", format, "--backing", "allow"];
        let process = dir.launch(name, &options).listening();
        let driver = connect(&process, 1);
        assert_eq!(info["virtual-size"], driver.capacity(), "{command}");
        drop(driver);
        end(&process);
        if format == "qcow2" {
            dir.works(&format!("qemu-img check {name}"));
        }
    }
    // Images of this program and of QEMU are the same, byte for byte.
    dir.works("qemu-img create -q -f qcow theirs 4G");
    assert!(std::fs::read(dir.path("e")).unwrap() == std::fs::read(dir.path("theirs")).unwrap());

    let before = files(&dir);
    let too_long = format!(
        "x --format qcow --size 1M --backing {}a --backing-format raw",
        "./".repeat(512)
    );
    for (command, code, why) in [
        ("a --format qcow2 --size 1M", 1, "--force"),
        ("/ --format raw --size 1M", 1, "/"),
        (
            "sub --format raw --size 1M --force",
            1,
            "not a regular file",
        ),
        ("none/x --format raw --size 1M", 1, "No such file"),
        ("x --format raw --size 0", 1, "a multiple of 512"),
        ("x --format raw --size 1000", 1, "a multiple of 512"),
        (
            "x --format raw --size 9999999T",
            1,
            "--size: it is too large",
        ),
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
            "must be raw",
        ),
        (
            "x --format qcow2 --size 1M --backing y --backing-format raw",
            1,
            "y: No such",
        ),
        (
            "x --format qcow2 --size 1M --backing a --backing-format qcow2",
            1,
            "not a qcow2 image",
        ),
        (
            "sub/g --format qcow2 --size 1M --backing ./g --backing-format qcow2 --force",
            1,
            "its own backing file",
        ),
        (&too_long, 1, "1023 bytes"),
    ] {
        let output = dir.run(&format!("device-disk create {command}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{command}: {said}");
        let line = said.starts_with("device-disk: ") && said.lines().count() == 1;
        assert!(line && said.contains(why), "{command}: {said}");
        assert_eq!(files(&dir), before, "{command}");
    }
    // An image that is being served is not replaced.
    let process = dir.launch("a", &[]).listening();
    let output = dir.run("device-disk create a --format qcow2 --size 1M --force");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("locked"), "{said}");
    assert_eq!(files(&dir), before);
    end(&process);
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(dir.path("a"), private).unwrap();
    dir.works("device-disk create a --format qcow2 --size 3M --force");
    let mode = std::fs::metadata(dir.path("a")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    dir.agrees("a", "qcow2", &[0; 3 << 20], false);
}

fn files(dir: &ImageDir) -> Vec<(PathBuf, u64)> {
    let entries = std::fs::read_dir(dir.0.path()).unwrap().flatten();
    let mut files: Vec<_> = entries
        .map(|entry| (entry.path(), entry.metadata().unwrap().len()))
        .collect();
    files.sort();
    files
}

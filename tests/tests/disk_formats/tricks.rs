//! Images that are not what they seem, or not for us.

use std::process::Command;

use outrigger_tests::disk::pattern_of;
use outrigger_tests::process::Launch;

use crate::shop::{LARGEST, SIZE, Shop, connect, end, make};
use crate::steps::read;

/// A guest that writes the header of an image, which names a file of the host's, to its
/// raw disk must not be given that file, nor anything else, at the next start.
#[test]
fn a_header_on_a_raw_disk_gains_nothing() {
    for format in ["qcow2", "qcow"] {
        let shop = Shop::new();
        shop.raw("secret", &[0x5e; SIZE]);
        shop.works(&format!(
            "qemu-img create -f {format} -o backing_fmt=raw,backing_file={} trap 4M",
            shop.path("secret").display()
        ));
        let mut trap = std::fs::read(shop.path("trap")).unwrap();
        trap.resize(LARGEST, 0);
        shop.raw("disk", &vec![0; SIZE]);
        let process = shop.launch("disk", &[]).listening();
        let mut driver = connect(&process, 1);
        driver.queues[0].fill(0, &trap);
        driver.queues[0].write(0, 0);
        assert_eq!(driver.queues[0].run(), 0);
        drop(driver);
        end(&process);

        for options in [&[][..], &["--backing", "allow"], &["--read-only"]] {
            let why = shop.refusal("disk", options);
            let both = [format!("--format {format}"), "--format raw".to_owned()];
            assert!(both.iter().all(|it| why.contains(it)), "{why}");
        }
        // It was a raw disk and is one.
        let process = shop.launch("disk", &["--format", "raw"]).listening();
        let mut driver = connect(&process, 1);
        assert_eq!(driver.capacity(), SIZE as u64);
        assert!(read(&mut driver, 0..LARGEST) == trap);
        drop(driver);
        end(&process);
        // Even who takes it for one gets no other files without asking for them.
        let why = shop.refusal("disk", &["--format", format]);
        assert!(
            why.contains("secret") && why.contains("--backing allow"),
            "{why}"
        );
    }
}

#[test]
fn what_is_no_such_image_is_refused_in_a_line() {
    let shop = Shop::new();
    shop.raw("raw", &pattern_of(0, SIZE));
    shop.works("qemu-img create -f qcow2 two 4M");
    shop.works("qemu-img create -f qcow one 4M");
    shop.works(
        "qemu-img create -f qcow2 --object secret,id=key,data=123456 -o \
         encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10 luks 1M",
    );
    for (image, options, why) in [
        ("two", &[][..], "--format qcow2"),
        ("one", &[], "--format qcow if"),
        ("raw", &["--format", "qcow2"], "it is no qcow2 image"),
        ("raw", &["--format", "qcow"], "it is no qcow image"),
        ("one", &["--format", "qcow2"], "(--format qcow)"),
        ("two", &["--format", "qcow"], "(--format qcow2)"),
        ("luks", &["--format", "qcow2"], "encrypted"),
        ("luks", &["--format", "qcow2", "--read-only"], "encrypted"),
    ] {
        let said = shop.refusal(image, options);
        let start = format!("device-disk: --blk-file {}: ", shop.path(image).display());
        assert!(said.starts_with(&start) && said.contains(why), "{said}");
    }
    // A daemon that was killed leaves the image as its user must not have it.
    shop.works("qemu-img create -f qcow2 -o lazy_refcounts=on lazy 4M");
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2", "-c", "write 0 512", "-c", "abort"]);
    let output = command.arg(shop.path("lazy")).output().unwrap();
    assert!(!output.status.success());
    let said = shop.refusal("lazy", &["--format", "qcow2"]);
    assert!(
        said.contains("not closed properly: qemu-img check"),
        "{said}"
    );
    assert!(shop.run("qemu-img check -r all lazy").status.code() == Some(0));
    end(&shop.launch("lazy", &["--format", "qcow2"]).listening());
}

/// Names in an image are relative to the image, however it was opened.
#[test]
fn an_inherited_image_finds_what_it_lies_on() {
    let shop = Shop::new();
    let (_, content) = make(&shop, "qcow2 on raw");
    let mut options = std::fs::File::options();
    let image = options.read(true).write(true).open(shop.path("disk"));
    let process = Launch::new("device-disk")
        .pass("--blk-fd", image.unwrap().into())
        .args(["--format", "qcow2", "--backing", "allow"])
        .listening();
    let mut driver = connect(&process, 1);
    assert!(read(&mut driver, 0..SIZE) == content);
}

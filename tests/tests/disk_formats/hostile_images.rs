//! Images that pretend to have another format, or are not supported.

use std::process::Command;

use outrigger_tests::disk::pattern_of;
use outrigger_tests::process::Launch;

use crate::image_dir::{ImageDir, LARGEST, SIZE, connect, end, make};
use crate::steps::read;

/// A guest writes an image header that names a file of the host to its raw disk. At the next
/// start it must not get that file or anything else.
#[test]
fn a_raw_disk_with_an_image_header_is_not_taken_for_an_image() {
    for format in ["qcow2", "qcow"] {
        let dir = ImageDir::new();
        dir.raw("secret", &[0x5e; SIZE]);
        dir.works(&format!(
            "qemu-img create -f {format} -o backing_fmt=raw,backing_file={} trap 4M",
            dir.path("secret").display()
        ));
        let mut trap = std::fs::read(dir.path("trap")).unwrap();
        trap.resize(LARGEST, 0);
        dir.raw("disk", &vec![0; SIZE]);
        let process = dir.launch("disk", &[]).listening();
        let mut driver = connect(&process, 1);
        driver.queues[0].fill(0, &trap);
        driver.queues[0].write(0, 0);
        assert_eq!(driver.queues[0].run(), 0);
        drop(driver);
        end(&process);

        for options in [&[][..], &["--backing", "allow"], &["--read-only"]] {
            let why = dir.refusal("disk", options);
            let both = [format!("--format {format}"), "--format raw".to_owned()];
            assert!(both.iter().all(|it| why.contains(it)), "{why}");
        }
        // As a raw disk it is still served.
        let process = dir.launch("disk", &["--format", "raw"]).listening();
        let mut driver = connect(&process, 1);
        assert_eq!(driver.capacity(), SIZE as u64);
        assert!(read(&mut driver, 0..LARGEST) == trap);
        drop(driver);
        end(&process);
        // As an image it is refused, because backing files are not allowed by default.
        let why = dir.refusal("disk", &["--format", format]);
        assert!(
            why.contains("secret") && why.contains("--backing allow"),
            "{why}"
        );
    }
}

#[test]
fn invalid_images_are_refused_with_one_line() {
    let dir = ImageDir::new();
    dir.raw("raw", &pattern_of(0, SIZE));
    dir.works("qemu-img create -f qcow2 two 4M");
    dir.works("qemu-img create -f qcow one 4M");
    dir.works(
        "qemu-img create -f qcow2 --object secret,id=key,data=123456 -o \
         encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10 luks 1M",
    );
    for (image, options, why) in [
        ("two", &[][..], "--format qcow2"),
        ("one", &[], "--format qcow if"),
        ("raw", &["--format", "qcow2"], "it is not a qcow2 image"),
        ("raw", &["--format", "qcow"], "it is not a qcow image"),
        ("one", &["--format", "qcow2"], "(--format qcow)"),
        ("two", &["--format", "qcow"], "(--format qcow2)"),
        ("luks", &["--format", "qcow2"], "encrypted"),
        ("luks", &["--format", "qcow2", "--read-only"], "encrypted"),
    ] {
        let said = dir.refusal(image, options);
        let start = format!("device-disk: --blk-file {}: ", dir.path(image).display());
        assert!(said.starts_with(&start) && said.contains(why), "{said}");
    }
    // An image with lazy refcounts whose program was killed must be repaired first.
    dir.works("qemu-img create -f qcow2 -o lazy_refcounts=on lazy 4M");
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2", "-c", "write 0 512", "-c", "abort"]);
    let output = command.arg(dir.path("lazy")).output().unwrap();
    assert!(!output.status.success());
    let said = dir.refusal("lazy", &["--format", "qcow2"]);
    assert!(
        said.contains("not closed properly: qemu-img check"),
        "{said}"
    );
    assert!(dir.run("qemu-img check -r all lazy").status.code() == Some(0));
    end(&dir.launch("lazy", &["--format", "qcow2"]).listening());
}

/// Names in an image are relative to the image, however it was opened.
#[test]
fn an_inherited_image_finds_its_backing_file() {
    let dir = ImageDir::new();
    let (_, content) = make(&dir, "qcow2 on raw");
    let mut options = std::fs::File::options();
    let image = options.read(true).write(true).open(dir.path("disk"));
    let process = Launch::new("device-disk")
        .pass("--blk-fd", image.unwrap().into())
        .args(["--format", "qcow2", "--backing", "allow"])
        .listening();
    let mut driver = connect(&process, 1);
    assert!(read(&mut driver, 0..SIZE) == content);
}

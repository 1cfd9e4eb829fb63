//! Tests against QEMU and a model, with sudden death and invalid tables.

use super::super::testing::{Random, TestImages, exercise, pattern};
use super::super::{Extent, ImageFormat};

const SIZE: usize = 8 << 20;

fn agrees(dir: &TestImages, name: &str, mut model: Vec<u8>, seed: u64, steps: usize) {
    println!("seed {seed}");
    let mut random = Random::new(seed);
    for _ in 0..3 {
        let disk = dir.open(name, ImageFormat::Qcow, false).unwrap();
        exercise(&disk, &mut model, &mut random, steps / 3);
        disk.image.reload().unwrap();
        exercise(&disk, &mut model, &mut random, 20);
        drop(disk);
        dir.agree(name, "qcow", &model);
    }
}

#[test]
fn random_steps_agree_with_qemu() {
    let dir = TestImages::new();
    dir.create("disk", "qcow", "", "8M");
    agrees(&dir, "disk", vec![0; SIZE], 1, 900);
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    let dir = TestImages::new();
    let model = pattern(SIZE);
    dir.raw("raw", &model);
    // qemu-img 10.0.2 does it, and exits with 1 without a message.
    let convert = "qemu-img convert -c -f raw -O qcow raw disk";
    let directory = dir.path("");
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", convert]).current_dir(directory);
    shell.status().unwrap();
    dir.agree("disk", "qcow", &model);
    let disk = dir.open("disk", ImageFormat::Qcow, true).unwrap();
    assert!(matches!(
        disk.image.map_read(0, 4096),
        Ok(Extent::Special { .. })
    ));
    drop(disk);
    agrees(&dir, "disk", model, 2, 900);
}

#[test]
fn unallocated_clusters_are_read_from_the_backing_file() {
    let dir = TestImages::new();
    let mut model = pattern(SIZE - 300_032);
    dir.raw("base", &model);
    model.resize(SIZE, 0);
    dir.create("disk", "qcow", "backing_file=base,backing_fmt=raw", "8M");
    agrees(&dir, "disk", model, 3, 900);
}

#[test]
fn invalid_headers_are_refused_with_a_reason() {
    let dir = TestImages::new();
    dir.create("disk", "qcow", "", "8M");
    let image = std::fs::read(dir.path("disk")).unwrap();
    let long = |value: u64| value.to_be_bytes().to_vec();
    let word = |value: u32| value.to_be_bytes().to_vec();
    for (at, bytes, why) in [
        (0, b"QFI\0".to_vec(), "not a qcow image"),
        (4, word(2), "--format qcow2"),
        (4, word(3), "--format qcow2"),
        (4, word(4), "version 4"),
        (8, [long(1 << 40), word(4)].concat(), "backing file"),
        (8, [long(48), word(0)].concat(), "backing file"),
        (8, [long(48), word(2000)].concat(), "backing file"),
        (24, long(0), "empty"),
        (24, long(511), "empty"),
        (24, long(u64::MAX), "too large"),
        (24, long(1 << 50), "too large"),
        (24, long(1 << 40), "L1 table"),
        (32, vec![8], "clusters of 2^8"),
        (32, vec![17], "clusters of 2^17"),
        (33, vec![5], "tables of 2^5"),
        (33, vec![14], "tables of 2^14"),
        (36, word(1), "encrypted"),
        (40, long(0), "L1 table"),
        (40, long(47), "L1 table"),
        (40, long(1 << 50), "L1 table"),
        (40, long(u64::MAX), "L1 table"),
        (48, long(1 << 50), "beyond the end"),
        (48, long(u64::MAX), "beyond the end"),
        (48, long(8), "share"),
        (48, long(50), "share"),
    ] {
        let mut image = image.clone();
        image[at..at + bytes.len()].copy_from_slice(&bytes);
        std::fs::write(dir.path("bad"), image).unwrap();
        let error = dir.open("bad", ImageFormat::Qcow, false).err();
        let said = error.map_or("taken".to_owned(), |error| error.to_string());
        assert!(said.contains(why), "{at} {bytes:?}: {said}");
    }
    for len in 0..48 {
        std::fs::write(dir.path("bad"), &image[..len]).unwrap();
        dir.open("bad", ImageFormat::Qcow, true).err().unwrap();
    }
}

/// A qcow image does not say the format of its backing file. A guess from its contents would
/// let the guest choose the format.
#[test]
fn a_backing_file_that_looks_like_another_format_is_refused() {
    let dir = TestImages::new();
    dir.raw("base", &pattern(1 << 20));
    dir.create("disk", "qcow", "backing_file=base,backing_fmt=raw", "1M");
    drop(dir.open("disk", ImageFormat::Qcow, false).unwrap());
    dir.create("base", "qcow2", "", "1M");
    let why = dir
        .open("disk", ImageFormat::Qcow, false)
        .err()
        .unwrap()
        .to_string();
    assert!(
        why.contains("begins like an image of format qcow2"),
        "{why}"
    );
}

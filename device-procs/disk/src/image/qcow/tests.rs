//! Against QEMU, a model in memory, sudden ends, and tables that are none.

use super::super::testing::{Random, Workshop, exercise, pattern};
use super::super::{Extent, Format};

const SIZE: usize = 8 << 20;

fn agrees(shop: &Workshop, name: &str, mut model: Vec<u8>, seed: u64, steps: usize) {
    println!("seed {seed}");
    let mut random = Random::new(seed);
    for _ in 0..3 {
        let disk = shop.open(name, Format::Qcow, false).unwrap();
        exercise(&disk, &mut model, &mut random, steps / 3);
        disk.image.reload().unwrap();
        exercise(&disk, &mut model, &mut random, 20);
        drop(disk);
        shop.agree(name, "qcow", &model);
    }
}

#[test]
fn random_steps_agree_with_qemu() {
    let shop = Workshop::new();
    shop.create("disk", "qcow", "", "8M");
    agrees(&shop, "disk", vec![0; SIZE], 1, 900);
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    let shop = Workshop::new();
    let model = pattern(SIZE);
    shop.raw("raw", &model);
    // QEMU 10.0.2 does it and exits with 1 all the same, without a word.
    let convert = "qemu-img convert -c -f raw -O qcow raw disk";
    let directory = shop.path("");
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", convert]).current_dir(directory);
    shell.status().unwrap();
    shop.agree("disk", "qcow", &model);
    let disk = shop.open("disk", Format::Qcow, true).unwrap();
    assert!(matches!(
        disk.image.map(0, 4096),
        Ok(Extent::Special { .. })
    ));
    drop(disk);
    agrees(&shop, "disk", model, 2, 900);
}

#[test]
fn what_an_image_has_not_comes_from_below() {
    let shop = Workshop::new();
    let mut model = pattern(SIZE - 300_032);
    shop.raw("base", &model);
    model.resize(SIZE, 0);
    shop.create("disk", "qcow", "backing_file=base,backing_fmt=raw", "8M");
    agrees(&shop, "disk", model, 3, 900);
}

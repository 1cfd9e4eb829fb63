//! Against QEMU, a model in memory, sudden ends, and tables that are none.

use super::super::Format;
use super::super::testing::{Random, Workshop, exercise, pattern};

const SIZE: usize = 8 << 20;

/// Random steps on an image that `make` has made, with this content.
fn agrees(shop: &Workshop, name: &str, mut model: Vec<u8>, seed: u64, steps: usize) {
    println!("seed {seed}");
    let mut random = Random::new(seed);
    for _ in 0..3 {
        let disk = shop.open(name, Format::Qcow2, false).unwrap();
        exercise(&disk, &mut model, &mut random, steps / 3);
        disk.image.reload().unwrap();
        exercise(&disk, &mut model, &mut random, 20);
        drop(disk);
        shop.agree(name, "qcow2", &model);
    }
}

#[test]
fn random_steps_agree_with_qemu() {
    for (index, options) in [
        "compat=1.1",
        "compat=0.10",
        "compat=1.1,cluster_size=4k",
        "compat=0.10,cluster_size=4k",
        "compat=1.1,cluster_size=512,refcount_bits=1",
        "compat=1.1,cluster_size=2M,refcount_bits=64",
        "compat=1.1,cluster_size=1k,refcount_bits=8,lazy_refcounts=on",
        "compat=1.1,preallocation=metadata",
    ]
    .into_iter()
    .enumerate()
    {
        let shop = Workshop::new();
        println!("{options}");
        shop.create("disk", "qcow2", options, "8M");
        agrees(&shop, "disk", vec![0; SIZE], index as u64 + 1, 600);
    }
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    for options in ["compat=1.1,cluster_size=4k", "compat=0.10"] {
        let shop = Workshop::new();
        let model = pattern(SIZE);
        shop.raw("raw", &model);
        let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options];
        shop.qemu_img(&[&args[..], &["raw", "disk"]].concat());
        agrees(&shop, "disk", model, 20, 600);
    }
}

#[test]
fn what_an_image_has_not_comes_from_below() {
    for (options, format) in [
        ("compat=1.1", "raw"),
        ("compat=0.10,cluster_size=4k", "raw"),
        ("compat=1.1,cluster_size=4k", "qcow2"),
    ] {
        let shop = Workshop::new();
        // Shorter than what is above it.
        let mut model = pattern(SIZE - 300_032);
        shop.raw("raw", &model);
        model.resize(SIZE, 0);
        shop.qemu_img(&["convert", "-f", "raw", "-O", format, "raw", "base"]);
        let options = format!("{options},backing_file=base,backing_fmt={format}");
        shop.create("disk", "qcow2", &options, "8M");
        agrees(&shop, "disk", model, 30, 600);
    }
}

#[test]
fn snapshots_keep_what_was() {
    for options in ["compat=1.1", "compat=0.10,cluster_size=4k"] {
        let shop = Workshop::new();
        let before = pattern(SIZE);
        shop.raw("raw", &before);
        let args = ["convert", "-f", "raw", "-O", "qcow2", "-o", options];
        shop.qemu_img(&[&args[..], &["raw", "disk"]].concat());
        shop.qemu_img(&["snapshot", "-c", "then", "disk"]);
        agrees(&shop, "disk", before.clone(), 40, 600);
        shop.qemu_img(&["snapshot", "-a", "then", "disk"]);
        shop.agree("disk", "qcow2", &before);
        agrees(&shop, "disk", before.clone(), 41, 300);
        shop.qemu_img(&["snapshot", "-d", "then", "disk"]);
        shop.qemu_img(&["check", "-q", "disk"]);
    }
}

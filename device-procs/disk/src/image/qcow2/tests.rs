//! Tests against QEMU and a model, with sudden death and invalid tables.

use super::super::testing::{
    Random, TestDisk, TestImages, exercise, open_at, pattern, retry_locked,
};
use super::super::{BackingPolicy, Extent, Image, ImageFormat, ImageOrigin};
use super::Qcow2Image;

const SIZE: usize = 8 << 20;

/// Runs random steps on an image that `make` creates, with this content.
fn agrees(dir: &TestImages, name: &str, mut model: Vec<u8>, seed: u64, steps: usize) {
    println!("seed {seed}");
    let mut random = Random::new(seed);
    for _ in 0..3 {
        let disk = dir.open(name, ImageFormat::Qcow2, false).unwrap();
        exercise(&disk, &mut model, &mut random, steps / 3);
        disk.image.reload().unwrap();
        exercise(&disk, &mut model, &mut random, 20);
        drop(disk);
        dir.agree(name, "qcow2", &model);
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
        let dir = TestImages::new();
        println!("{options}");
        dir.create("disk", "qcow2", options, "8M");
        agrees(&dir, "disk", vec![0; SIZE], index as u64 + 1, 600);
    }
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    for options in ["compat=1.1,cluster_size=4k", "compat=0.10"] {
        let dir = TestImages::new();
        let model = pattern(SIZE);
        dir.raw("raw", &model);
        let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options];
        dir.qemu_img(&[&args[..], &["raw", "disk"]].concat());
        agrees(&dir, "disk", model, 20, 600);
    }
}

#[test]
fn unallocated_clusters_are_read_from_the_backing_file() {
    for (options, format) in [
        ("compat=1.1", "raw"),
        ("compat=0.10,cluster_size=4k", "raw"),
        ("compat=1.1,cluster_size=4k", "qcow2"),
    ] {
        let dir = TestImages::new();
        // Shorter than the image on top of it.
        let mut model = pattern(SIZE - 300_032);
        dir.raw("raw", &model);
        model.resize(SIZE, 0);
        dir.qemu_img(&["convert", "-f", "raw", "-O", format, "raw", "base"]);
        let options = format!("{options},backing_file=base,backing_fmt={format}");
        dir.create("disk", "qcow2", &options, "8M");
        agrees(&dir, "disk", model, 30, 600);
    }
}

#[test]
fn snapshots_are_not_changed() {
    for options in ["compat=1.1", "compat=0.10,cluster_size=4k"] {
        let dir = TestImages::new();
        let before = pattern(SIZE);
        dir.raw("raw", &before);
        let args = ["convert", "-f", "raw", "-O", "qcow2", "-o", options];
        dir.qemu_img(&[&args[..], &["raw", "disk"]].concat());
        dir.qemu_img(&["snapshot", "-c", "then", "disk"]);
        agrees(&dir, "disk", before.clone(), 40, 600);
        dir.qemu_img(&["snapshot", "-a", "then", "disk"]);
        dir.agree("disk", "qcow2", &before);
        agrees(&dir, "disk", before.clone(), 41, 300);
        dir.qemu_img(&["snapshot", "-d", "then", "disk"]);
        dir.qemu_img(&["check", "-q", "disk"]);
    }
}

/// The error for an image with `bytes` at `at`.
fn refusal(dir: &TestImages, name: &str, at: usize, bytes: &[u8], read_only: bool) -> String {
    let mut image = std::fs::read(dir.path(name)).unwrap();
    if image.len() < at + bytes.len() {
        image.resize(at + bytes.len(), 0);
    }
    image[at..at + bytes.len()].copy_from_slice(bytes);
    std::fs::write(dir.path("bad"), image).unwrap();
    let error = dir.open("bad", ImageFormat::Qcow2, read_only).err();
    let error = error.unwrap_or_else(|| panic!("{at}: {bytes:?} is taken"));
    error.to_string()
}

#[test]
fn invalid_headers_are_refused_with_a_reason() {
    let dir = TestImages::new();
    dir.create("disk", "qcow2", "", "8M");
    let l1 = 3u64 << 16;
    let image = std::fs::read(dir.path("disk")).unwrap();
    // The table of feature names is the first extension.
    assert_eq!(image[112..116], 0x6803_f857u32.to_be_bytes());
    let long = |value: u64| value.to_be_bytes().to_vec();
    let word = |value: u32| value.to_be_bytes().to_vec();
    for (at, bytes, why) in [
        (0, b"QFI\0".to_vec(), "not a qcow2 image"),
        (4, word(1), "--format qcow"),
        (4, word(4), "version 4"),
        (8, long(1 << 40), "backing file"),
        (8, [long(600), word(2000)].concat(), "backing file"),
        (8, [long(600), word(0)].concat(), "backing file"),
        (20, word(8), "clusters of 2^8"),
        (20, word(22), "clusters of 2^22"),
        (20, word(u32::MAX), "clusters of 2^"),
        (24, long(0), "empty"),
        (24, long(511), "empty"),
        (24, long(u64::MAX), "too large"),
        (24, long(1 << 60), "too large"),
        (24, long(1 << 40), "L1 table"),
        (32, word(1), "encrypted"),
        (32, word(2), "encrypted"),
        (32, word(3), "encryption method 3"),
        (36, word(0), "L1 table"),
        (36, word(u32::MAX), "L1 table"),
        (40, long(0), "L1 table"),
        (40, long(l1 + 512), "L1 table"),
        (40, long(1 << 60), "L1 table"),
        (40, long(u64::MAX), "L1 table"),
        (48, long(0), "refcount table"),
        (48, long(1 << 40), "refcount table"),
        (48, long(l1), "share"),
        (40, long(1 << 16), "share"),
        (56, word(0), "refcount table"),
        (56, word(u32::MAX), "refcount table"),
        (60, word(u32::MAX), "snapshots"),
        (60, [word(1), long(1 << 50)].concat(), "snapshots"),
        (72, long(1), "not closed properly: qemu-img check"),
        (72, long(2), "damaged: qemu-img check"),
        (72, long(4), "data_file"),
        (72, long(8), "compression"),
        (72, long(16), "extended_l2"),
        (72, long(32), "unknown features"),
        (72, long(1 << 63), "unknown features"),
        (96, word(7), "refcounts"),
        (96, word(u32::MAX), "refcounts"),
        (100, word(96), "invalid length, 96 bytes"),
        (100, word(109), "invalid length, 109 bytes"),
        (100, word(u32::MAX), "invalid length"),
        (116, word(u32::MAX), "extensions"),
        // With this imago would panic.
        (116, word(49), "feature names"),
        (112, word(0x0537_be77), "encrypted"),
        (l1 as usize, long(1 << 63 | 0x5_0200), "0x50200"),
        (l1 as usize, long(1 << 63 | 1 << 40), "beyond the end"),
        (l1 as usize, long(1 << 63 | 1 << 16), "share"),
        (l1 as usize, long(1 << 62), "L1 table"),
        (1 << 16, long(1 << 40), "beyond the end"),
        (1 << 16, long(1), "refcount table"),
        (1 << 16, long(0), "has a refcount of 0"),
        (2 << 16, vec![0; 2], "has a refcount of 0"),
    ] {
        let said = refusal(&dir, "disk", at, &bytes, false);
        assert!(said.contains(why), "{at} {bytes:?}: {said}");
        assert!(!said.contains('\n'), "{said}");
    }
    for len in [0, 3, 71, 100, 104, 60_000] {
        std::fs::write(dir.path("bad"), &image[..len]).unwrap();
        let error = dir.open("bad", ImageFormat::Qcow2, true).err().unwrap();
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}

#[test]
fn images_with_bitmaps_are_only_read() {
    let dir = TestImages::new();
    dir.create("disk", "qcow2", "", "8M");
    dir.qemu_img(&["bitmap", "--add", "disk", "changes"]);
    let why = refusal(&dir, "disk", 0, b"Q", false);
    assert!(why.contains("bitmaps"), "{why}");
    dir.open("disk", ImageFormat::Qcow2, true).unwrap();

    // Unknown autoclear bits are cleared; everything else stays.
    dir.create("other", "qcow2", "", "8M");
    let mut image = std::fs::read(dir.path("other")).unwrap();
    image[88..96].copy_from_slice(&(1u64 << 40).to_be_bytes());
    std::fs::write(dir.path("other"), &image).unwrap();
    drop(dir.open("other", ImageFormat::Qcow2, true).unwrap());
    assert_eq!(std::fs::read(dir.path("other")).unwrap(), image);
    drop(dir.open("other", ImageFormat::Qcow2, false).unwrap());
    image[88..96].fill(0);
    assert_eq!(std::fs::read(dir.path("other")).unwrap(), image);
}

#[test]
fn backing_files_are_opened_only_if_allowed_and_in_their_format() {
    let dir = TestImages::new();
    dir.raw("base", &pattern(1 << 20));
    dir.create("disk", "qcow2", "backing_file=base,backing_fmt=raw", "1M");
    let open = |name: &str, backing| {
        let result = open_at(
            &dir.path(name),
            Some(ImageFormat::Qcow2),
            false,
            backing,
            true,
        );
        result.map_err(|error| error.to_string())
    };
    let why = open("disk", BackingPolicy::Deny).err().unwrap();
    assert!(
        why.contains("base") && why.contains("--backing allow"),
        "{why}"
    );
    open("disk", BackingPolicy::Allow).unwrap();

    // A guest had the backing file as its disk and wrote an image header to it.
    dir.create("trap", "qcow2", "", "1M");
    let trap = std::fs::read(dir.path("trap")).unwrap();
    std::fs::write(dir.path("base"), &trap).unwrap();
    let disk = open("disk", BackingPolicy::Allow).unwrap();
    assert!(disk.read(0, 512).unwrap() == trap[..512]);
    drop(disk);

    for (options, why) in [
        ("backing_file=base,backing_fmt=vmdk", "format vmdk"),
        ("backing_file=base,backing_fmt=qcow", "format qcow"),
        (
            "backing_file=missing,backing_fmt=raw",
            "missing: No such file",
        ),
        (
            "backing_file=/dev/zero,backing_fmt=raw",
            "neither a regular file",
        ),
        (
            "backing_file=/tmp,backing_fmt=raw",
            "neither a regular file",
        ),
        ("backing_file=nbd:127.0.0.1:1,backing_fmt=raw", "path"),
    ] {
        dir.qemu_img(&[
            "create", "-q", "-u", "-f", "qcow2", "-o", options, "odd", "1M",
        ]);
        let said = open("odd", BackingPolicy::Allow).err().unwrap();
        assert!(said.contains(why), "{options}: {said}");
    }
    // Chains of backing files: an image on itself, and a very long chain.
    let options = "backing_file=loop,backing_fmt=qcow2";
    dir.qemu_img(&[
        "create", "-q", "-u", "-f", "qcow2", "-o", options, "it", "1M",
    ]);
    std::fs::rename(dir.path("it"), dir.path("loop")).unwrap();
    open_at(
        &dir.path("loop"),
        Some(ImageFormat::Qcow2),
        true,
        BackingPolicy::Allow,
        true,
    )
    .err()
    .unwrap();
    let mut below = "trap".to_owned();
    for number in 0..18 {
        let name = format!("layer{number}");
        let options = format!("backing_file={below},backing_fmt=qcow2");
        dir.qemu_img(&[
            "create", "-q", "-u", "-f", "qcow2", "-o", &options, &name, "1M",
        ]);
        below = name;
    }
    open("layer14", BackingPolicy::Allow).unwrap();
    let why = open("layer17", BackingPolicy::Allow).err().unwrap();
    assert!(why.contains("more than 16 backing files"), "{why}");
    assert!(!why.contains('\n'));
    // The image does not say the format.
    std::fs::write(dir.path("base"), pattern(1 << 20)).unwrap();
    let mut image = std::fs::read(dir.path("disk")).unwrap();
    let at = image
        .windows(4)
        .position(|it| it == 0xe279_2acau32.to_be_bytes());
    let at = at.unwrap();
    image[at..at + 4].copy_from_slice(b"none");
    std::fs::write(dir.path("mute"), image).unwrap();
    let why = open("mute", BackingPolicy::Allow).err().unwrap();
    assert!(why.contains("does not say its format"), "{why}");
    let why = open("mute", BackingPolicy::Deny).err().unwrap();
    assert!(why.contains("--backing allow"), "{why}");
}

/// While a disk uses a backing file, no other program writes to it.
#[test]
fn backing_files_are_locked() {
    let dir = TestImages::new();
    dir.raw("base", &pattern(1 << 20));
    dir.create("disk", "qcow2", "backing_file=base,backing_fmt=raw", "1M");
    let open = |name: &str, format| {
        open_at(
            &dir.path(name),
            Some(format),
            false,
            BackingPolicy::Allow,
            true,
        )
    };
    let disk = open("disk", ImageFormat::Qcow2).unwrap();
    let why = open("base", ImageFormat::Raw).err().unwrap().to_string();
    assert!(why.contains("locked"), "{why}");
    drop(disk);
    let base = retry_locked(|| open("base", ImageFormat::Raw));
    let why = open("disk", ImageFormat::Qcow2).err().unwrap().to_string();
    assert!(why.contains("base: it is locked"), "{why}");
    drop(base);
}

/// The offset in the file of what was written at `offset` of a disk with clusters of
/// `1 << bits` bytes.
fn place(disk: &TestDisk, offset: u64) -> u64 {
    match disk.image.map_write(offset, 512).unwrap() {
        Extent::Data { offset, .. } => offset,
        other => panic!("{other:?}"),
    }
}

/// A transfer may be in flight where a cluster was, so its range is not used otherwise.
#[test]
fn clusters_keep_their_offsets() {
    let dir = TestImages::new();
    dir.create("disk", "qcow2", "cluster_size=4k", "8M");
    let disk = dir.open("disk", ImageFormat::Qcow2, false).unwrap();
    disk.write(4096, &[1; 4096]).unwrap();
    let then = place(&disk, 4096);
    disk.image.discard(4096, 4096).unwrap();
    // A cluster that is not allocated yet, and those after it.
    disk.write(0, &[2; 12288]).unwrap();
    for cluster in 3..20 {
        disk.write(cluster * 4096, &[3; 4096]).unwrap();
        assert_ne!(place(&disk, cluster * 4096), then);
    }
    assert_eq!(place(&disk, 4096), then);
    let mut model = vec![0; SIZE];
    model[..12288].fill(2);
    model[12288..20 * 4096].fill(3);
    drop(disk);
    dir.agree("disk", "qcow2", &model);
}

/// A cluster that another queue has just allocated, and whose entry is not in the file yet, is
/// not written directly: after a kill the next process would not find it.
#[test]
fn mappings_that_are_not_in_the_file_are_not_used() {
    let dir = TestImages::new();
    dir.create("disk", "qcow2", "", "8M");
    let path = dir.path("disk");
    let file = super::super::open_file(&path, false).unwrap();
    let origin = ImageOrigin {
        name: "disk",
        directory: None,
        backing: BackingPolicy::Deny,
        lock: false,
        depth: 0,
    };
    let image = Qcow2Image::open(file, &origin, false).unwrap();
    let fill = |at, len| image.image_file().zero(at, len, false);
    image.allocate(0, 512, fill).unwrap();
    let special = |offset| matches!(image.map_write(offset, 512), Ok(Extent::Special { .. }));
    for _ in 0..2 {
        assert!(special(512));
        image.map_read(512, 512).unwrap();
    }
    image.flush_tables().unwrap();
    assert!(!special(512) && !special(0));
}

/// Entry `index` of the table at `at` of the image.
fn entry(image: &[u8], at: u64, index: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&image[at as usize + index * 8..][..8]);
    u64::from_be_bytes(word)
}

/// If a table maps data to where another table is, or soon will be, data of the guest do not
/// get into that table.
#[test]
fn data_cannot_be_mapped_to_a_table() {
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let dir = TestImages::new();
    dir.raw("base", &pattern(SIZE));
    let options = "cluster_size=4k,backing_file=base,backing_fmt=raw";
    dir.create("disk", "qcow2", options, "8M");
    let disk = dir.open("disk", ImageFormat::Qcow2, false).unwrap();
    for at in [0, 2 << 20] {
        disk.write(at, &[1; 4096]).unwrap();
    }
    drop(disk);
    let good = std::fs::read(dir.path("disk")).unwrap();
    let l1 = entry(&good, 40, 0);
    let (first, second) = (entry(&good, l1, 0) & OFFSET, entry(&good, l1, 1) & OFFSET);
    let table = |image: &[u8]| image[second as usize..][..4096].to_vec();
    let put = |at: u64, value: &[u8]| {
        let mut image = good.clone();
        image[at as usize..][..value.len()].copy_from_slice(value);
        std::fs::write(dir.path("disk"), image).unwrap();
        dir.open("disk", ImageFormat::Qcow2, false).unwrap()
    };

    // A table as a compressed cluster, whose range is freed when the cluster is written; or
    // as shared data.
    for bits in [1 << 62, 0] {
        let disk = put(first + 8, &(bits | second).to_be_bytes());
        for range in [4096..8192, 4608..5120, 0..16384] {
            let bytes = vec![2; range.end - range.start];
            let why = disk.write(range.start as u64, &bytes).unwrap_err();
            assert!(why.to_string().contains("where a table is"), "{why}");
        }
        if bits != 0 {
            disk.image.discard(4096, 4096).unwrap_err();
        }
        disk.write(20480, &[2; 512]).unwrap();
        drop(disk);
        let now = std::fs::read(dir.path("disk")).unwrap();
        assert!(table(&now) == table(&good));
    }

    // Data with a refcount of 0, where a new table would be allocated.
    let data = entry(&good, first, 0) & OFFSET;
    let block = entry(&good, entry(&good, 48, 0), 0);
    let disk = put(block + data / 4096 * 2, &[0; 2]);
    let why = disk.write(0, &[2; 512]).unwrap_err();
    assert!(why.to_string().contains("has a refcount of 0"), "{why}");
    disk.read(4096, 4096).unwrap();
    disk.write(4 << 20, &[2; 512]).unwrap();
    disk.write(0, &[2; 512]).unwrap_err();
}

/// A deflate stream that refers to bytes before its beginning is invalid: otherwise the guest
/// would see uninitialised memory.
#[test]
fn a_compressed_cluster_cannot_refer_to_bytes_before_its_beginning() {
    let dir = TestImages::new();
    let content = pattern(64 << 10);
    dir.raw("raw", &content);
    let convert = "convert -c -f raw -O qcow2 -o cluster_size=4k raw";
    let convert: Vec<&str> = convert.split(' ').collect();
    dir.qemu_img(&[&convert[..], &["disk"]].concat());
    let mut image = std::fs::read(dir.path("disk")).unwrap();
    let table = entry(&image, entry(&image, 40, 0), 0) & 0x00ff_ffff_ffff_fe00;
    let at = (entry(&image, table, 1) & ((1 << 58) - 1)) as usize;
    // The last block, with fixed codes: repeats 258 bytes from 4096 bytes before.
    let mut bits = vec![1u8, 1, 0];
    for _ in 0..16 {
        bits.extend([1, 1, 0, 0, 0, 1, 0, 1]);
        bits.extend([1, 0, 1, 1, 1]);
        bits.extend([1; 10]);
    }
    for (byte, bits) in image[at..].iter_mut().zip(bits.chunks(8)) {
        *byte = bits.iter().rev().fold(0, |byte, bit| byte << 1 | bit);
    }
    std::fs::write(dir.path("disk"), &image).unwrap();
    let above = "cluster_size=8k,backing_file=disk,backing_fmt=qcow2";
    dir.create("above", "qcow2", above, "64k");
    for name in ["above", "disk"] {
        let disk = dir.open(name, ImageFormat::Qcow2, false).unwrap();
        for (range, sound) in [
            (4096..4608, false),
            (4096..8192, false),
            (0..16384, false),
            (8192..16384, true),
        ] {
            let read = disk.read(range.start, (range.end - range.start) as usize);
            assert_eq!(read.is_ok(), sound, "{name}: {range:?}");
        }
        let why = disk.write(4608, &[1; 512]).unwrap_err().to_string();
        assert!(why.contains("the compressed cluster at"), "{why}");
        // The whole cluster is written.
        disk.write(0, &[2; 8192]).unwrap();
        assert!(disk.read(0, 16384).unwrap() == [&[2; 8192], &content[8192..16384]].concat());
    }
}

/// Data of a larger backing file do not appear in the new part of a disk that grows, even if
/// the process was killed while it grew.
#[test]
fn data_of_a_larger_backing_file_do_not_appear_when_the_disk_grows() {
    const LARGER: u64 = 512 << 10;
    let dir = TestImages::new();
    dir.raw("base", &[9; 1 << 20]);
    let options = "cluster_size=4k,backing_file=base,backing_fmt=raw";
    for written in [false, true] {
        for lives in 0.. {
            dir.create("disk", "qcow2", options, "65k");
            let heir = dir.open_again("disk", ImageFormat::Qcow2).unwrap();
            let disk = dir.open_again("disk", ImageFormat::Qcow2).unwrap();
            if written {
                // The rest of its cluster, beyond the end, is from the backing file.
                disk.write(64 << 10, &[9; 512]).unwrap();
            }
            disk.image
                .metadata_file()
                .unwrap()
                .faults
                .fail_all_after(lives);
            let grown = disk.image.grow(LARGER).is_ok();
            drop(disk);
            dir.is_sound("disk", ImageFormat::Qcow2);
            heir.image.reload().unwrap();
            let capacity = heir.image.geometry().capacity;
            assert!(capacity == LARGER || capacity == 65 << 10 && !grown);
            for size in [capacity, LARGER] {
                heir.image.grow(size).unwrap();
                let now = heir.read(0, size as usize).unwrap();
                let (old, new) = now.split_at(65 << 10);
                assert!(old.iter().all(|&byte| byte == 9), "{lives}");
                assert!(new.iter().all(|&byte| byte == 0), "{lives}");
            }
            if grown {
                assert!(lives > 5);
                break;
            }
        }
    }
}

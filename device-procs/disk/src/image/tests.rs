//! Tests of all formats with tables: sudden death, full and failing files, several threads,
//! and inconsistent images.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;

use super::ImageFormat;
use super::testing::{Random, Step, TestDisk, TestImages, compare, exercise, pattern};

const SIZE: usize = 2 << 20;

/// The number in a normal run; ten times as many in a long one.
fn times(count: u64) -> u64 {
    let long = std::env::var_os("OUTRIGGER_LONG").is_some();
    if long { 10 * count } else { count }
}

/// An image with clusters of every kind, and its content.
struct Subject {
    dir: TestImages,
    format: ImageFormat,
    content: Vec<u8>,
}

impl Subject {
    /// Half of it compressed, with a snapshot, a backing file, and zero clusters.
    fn qcow2(options: &str) -> Self {
        let dir = TestImages::new();
        let mut content = pattern(SIZE);
        dir.raw("base", &content);
        let options = format!("{options},backing_file=base,backing_fmt=raw");
        content[SIZE / 4..SIZE / 2].fill(7);
        content[SIZE / 2..SIZE / 8 * 5].fill(0);
        dir.raw("raw", &content);
        let args = ["convert", "-c", "-B", "base", "-F", "raw", "-O", "qcow2"];
        dir.qemu_img(&[&args[..], &["-o", &options, "raw", "disk"]].concat());
        dir.qemu_img(&["snapshot", "-c", "then", "disk"]);
        dir.agree("disk", "qcow2", &content);
        Subject {
            dir,
            format: ImageFormat::Qcow2,
            content,
        }
    }

    fn qcow() -> Self {
        let dir = TestImages::new();
        let mut content = vec![0; SIZE];
        content[..SIZE / 2].copy_from_slice(&pattern(SIZE / 2));
        dir.raw("raw", &content);
        // The exit code does not matter: see the tests of the format.
        let convert = "qemu-img convert -c -f raw -O qcow raw disk";
        let mut shell = Command::new("sh");
        shell.args(["-c", convert]).current_dir(dir.path(""));
        shell.status().unwrap();
        dir.agree("disk", "qcow", &content);
        Subject {
            dir,
            format: ImageFormat::Qcow,
            content,
        }
    }

    fn all() -> Vec<Self> {
        vec![
            Subject::qcow2("compat=1.1,cluster_size=4k"),
            Subject::qcow2("compat=0.10,cluster_size=512"),
            Subject::qcow2("compat=1.1,cluster_size=1k,refcount_bits=64"),
            Subject::qcow(),
        ]
    }

    fn open(&self) -> TestDisk {
        self.dir.open("disk", self.format, false).unwrap()
    }

    fn name(&self) -> &'static str {
        match self.format {
            ImageFormat::Qcow2 => "qcow2",
            _ => "qcow",
        }
    }
}

/// Steps that change the disk.
fn changes(random: &mut Random, count: usize) -> Vec<Step> {
    std::iter::repeat_with(|| Step::random(random, SIZE as u64))
        .filter(|step| !step.range().is_empty())
        .take(count)
        .collect()
}

fn apply(step: &Step, model: &mut [u8], disk: &TestDisk) {
    match step {
        Step::Write(at, bytes) => model[*at as usize..][..bytes.len()].copy_from_slice(bytes),
        Step::Zero(..) => model[step.range()].fill(0),
        _ => {
            let range = step.range();
            let now = disk.read(range.start as u64, range.len()).unwrap();
            model[range].copy_from_slice(&now);
        }
    }
}

/// Compares the disk with the model, except `unsure`, where each byte is the old one, 0, or the
/// new one; returns the content.
fn compare_around(disk: &TestDisk, model: &[u8], unsure: &Step) -> Vec<u8> {
    let mut now = Vec::new();
    for offset in (0..SIZE).step_by(SIZE / 4) {
        now.extend(disk.read(offset as u64, SIZE / 4).unwrap());
    }
    let range = unsure.range();
    for (at, (now, then)) in now.iter().zip(model).enumerate() {
        let new = match unsure {
            Step::Write(from, bytes) if range.contains(&at) => bytes[at - *from as usize],
            _ => 0,
        };
        let may_change = range.contains(&at);
        assert!(
            now == then || may_change && (*now == new || *now == 0),
            "byte {at}: {now}, was {then}; {range:?}"
        );
    }
    now
}

/// A process is killed after each of its writes in turn. Another process, which has had the
/// image open all the time, continues.
#[test]
fn another_process_continues_after_a_kill_at_any_write() {
    for (index, subject) in Subject::all().into_iter().enumerate() {
        let seed = 100 + index as u64;
        println!("seed {seed}");
        let original = std::fs::read(subject.dir.path("disk")).unwrap();
        let steps = changes(&mut Random::new(seed), times(9) as usize);
        let mut deaths = 0;
        // qcow images need few writes.
        let every = times(1) > 1 || subject.format == ImageFormat::Qcow;
        for lives in (0..).step_by(if every { 1 } else { 3 }) {
            std::fs::write(subject.dir.path("disk"), &original).unwrap();
            let heir = subject.dir.open_again("disk", subject.format).unwrap();
            let disk = subject.dir.open_again("disk", subject.format).unwrap();
            disk.image
                .metadata_file()
                .unwrap()
                .faults
                .fail_all_after(lives);
            let mut model = subject.content.clone();
            let mut last = None;
            for step in &steps {
                if step.run(&disk).is_err() {
                    last = Some(step);
                    break;
                }
                apply(step, &mut model, &disk);
            }
            drop(disk);
            subject.dir.is_sound("disk", subject.format);
            heir.image.reload().unwrap();
            let Some(last) = last else {
                compare(&heir, &model);
                break;
            };
            deaths += 1;
            let mut model = compare_around(&heir, &model, last);
            exercise(&heir, &mut model, &mut Random::new(lives), 15);
            drop(heir);
            if deaths % 4 == 0 {
                subject.dir.is_sound("disk", subject.format);
            }
        }
        assert!(deaths > 10, "{deaths}");
    }
}

/// As above, while the disk and all its tables grow.
#[test]
fn another_process_continues_after_a_kill_while_tables_grow() {
    let dir = TestImages::new();
    dir.create("disk", "qcow2", "cluster_size=512,refcount_bits=64", "2M");
    let full = pattern(SIZE);
    let disk = dir.open("disk", ImageFormat::Qcow2, false).unwrap();
    for at in (0..SIZE - (128 << 10)).step_by(32 << 10) {
        disk.write(at as u64, &full[at..][..32 << 10]).unwrap();
    }
    drop(disk);
    let original = std::fs::read(dir.path("disk")).unwrap();
    // The refcount table has 64 entries for 64 clusters each, which is enough for 2 MiB.
    assert!(original.len() < SIZE && original.len() > SIZE - (128 << 10));
    let mut deaths = 0;
    for lives in (0..).step_by(if times(1) > 1 { 1 } else { 5 }) {
        std::fs::write(dir.path("disk"), &original).unwrap();
        let heir = dir.open_again("disk", ImageFormat::Qcow2).unwrap();
        let disk = dir.open_again("disk", ImageFormat::Qcow2).unwrap();
        disk.image
            .metadata_file()
            .unwrap()
            .faults
            .fail_all_after(lives);
        let mut model = full.clone();
        model[SIZE - (128 << 10)..].fill(0);
        let mut sizes = vec![SIZE];
        let mut grow_and_write = || -> io::Result<()> {
            for at in (SIZE - (128 << 10)..SIZE + (192 << 10)).step_by(32 << 10) {
                if at >= SIZE {
                    sizes.push(at + (32 << 10));
                    disk.image.grow(at as u64 + (32 << 10))?;
                    model.resize(at + (32 << 10), 0);
                }
                disk.write(at as u64, &full[at % SIZE..][..32 << 10])?;
                model[at..at + (32 << 10)].copy_from_slice(&full[at % SIZE..][..32 << 10]);
            }
            Ok(())
        };
        let died = grow_and_write().is_err();
        drop(disk);
        dir.is_sound("disk", ImageFormat::Qcow2);
        heir.image.reload().unwrap();
        let capacity = heir.image.geometry().capacity as usize;
        assert!(sizes.iter().rev().take(2).any(|&size| size == capacity));
        let acknowledged = model.len().min(capacity);
        // The write in progress was 32 KiB after the end of the completed ones.
        for at in (0..acknowledged).step_by(32 << 10) {
            let now = heir.read(at as u64, 32 << 10).unwrap();
            let same = now == model[at..at + (32 << 10)];
            let new = full[at % SIZE..][..32 << 10].iter().zip(&now);
            let partly = new.into_iter().all(|(new, now)| new == now || *now == 0);
            assert!(same || died && partly, "{lives}: {at}");
        }
        if !died {
            break;
        }
        deaths += 1;
        let len = capacity as u64 / 2;
        heir.write(len - 8192, &full[..16 << 10]).unwrap();
        drop(heir);
        dir.is_sound("disk", ImageFormat::Qcow2);
    }
    assert!(deaths > 20, "{deaths}");
}

/// Without space, requests that allocate clusters fail, and no others.
#[test]
fn a_full_disk_fails_only_requests_that_need_space() {
    for (index, subject) in Subject::all().into_iter().enumerate() {
        let seed = 200 + index as u64;
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let mut model = subject.content.clone();
        let disk = subject.open();
        exercise(&disk, &mut model, &mut random, 40);
        let faults = &disk.image.metadata_file().unwrap().faults;
        for _ in 0..times(3) {
            let end = std::fs::metadata(subject.dir.path("disk")).unwrap().len();
            faults.fail(end..u64::MAX, libc::ENOSPC);
            let mut failed = 0;
            for step in changes(&mut random, 30) {
                match step.run(&disk) {
                    Ok(_) => apply(&step, &mut model, &disk),
                    Err(error) => {
                        assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
                        failed += 1;
                        model = compare_around(&disk, &model, &step);
                    }
                }
            }
            faults.fail(0..0, 0);
            exercise(&disk, &mut model, &mut random, 10);
            println!("{failed} failed");
        }
        drop(disk);
        subject.dir.agree("disk", subject.name(), &model);
    }
}

/// After a failed write to a table nothing is written any more, but everything can be read.
#[test]
fn a_failed_table_write_makes_the_image_read_only() {
    for (index, subject) in Subject::all().into_iter().enumerate() {
        let seed = 300 + index as u64;
        println!("seed {seed}");
        let original = std::fs::read(subject.dir.path("disk")).unwrap();
        for attempt in 0..times(4) {
            std::fs::write(subject.dir.path("disk"), &original).unwrap();
            let mut random = Random::new(seed + 1000 * attempt);
            let mut model = subject.content.clone();
            let disk = subject.open();
            exercise(&disk, &mut model, &mut random, 10);
            let image_file = disk.image.metadata_file().unwrap();
            // A range of the file with tables and data.
            let at = random.below(original.len() as u64);
            image_file.faults.fail(at..at + 32 * 1024, libc::EIO);
            for step in changes(&mut random, 200) {
                match step.run(&disk) {
                    Ok(_) => apply(&step, &mut model, &disk),
                    Err(_) => model = compare_around(&disk, &model, &step),
                }
                if image_file.check_writable().is_err() {
                    break;
                }
            }
            image_file.faults.fail(0..0, 0);
            if image_file.check_writable().is_err() {
                for step in changes(&mut random, 20) {
                    if matches!(step, Step::Write(..)) {
                        let error = step.run(&disk).unwrap_err();
                        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
                    }
                }
                compare(&disk, &model);
                disk.image.reload().unwrap();
            }
            drop(disk);
            subject.dir.is_sound("disk", subject.format);
        }
    }
}

/// Four threads, each with its own stripes, which share clusters with those of the others.
#[test]
fn queues_use_the_image_in_parallel() {
    const STRIPE: usize = 24 * 1024;
    for (index, subject) in Subject::all().into_iter().enumerate() {
        let mut model = subject.content.clone();
        let disk = subject.open();
        let mut parts: Vec<(Range<usize>, Vec<u8>)> = Vec::new();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|thread| {
                    let image = Arc::clone(&disk.image);
                    let model = &model;
                    scope.spawn(move || {
                        let mut random = Random::new(400 + 10 * index as u64 + thread as u64);
                        let disk = TestDisk::new(image);
                        let mut stripes: Vec<_> = (0..SIZE)
                            .step_by(STRIPE)
                            .skip(thread)
                            .step_by(4)
                            .map(|at| at..(at + STRIPE).min(SIZE))
                            .map(|range| (range.clone(), model[range].to_vec()))
                            .collect();
                        for _ in 0..400 {
                            let count = stripes.len() as u64;
                            let (range, model) = &mut stripes[random.below(count) as usize];
                            let step = Step::random(&mut random, range.len() as u64);
                            one(&disk, range.start as u64, &step, model);
                        }
                        stripes
                    })
                })
                .collect();
            for thread in threads {
                parts.extend(thread.join().unwrap());
            }
        });
        for (range, bytes) in parts {
            model[range].copy_from_slice(&bytes);
        }
        compare(&disk, &model);
        drop(disk);
        subject.dir.agree("disk", subject.name(), &model);
    }
}

/// One step in the part of a disk that begins at `from` and reads as `model`.
fn one(disk: &TestDisk, from: u64, step: &Step, model: &mut [u8]) {
    let shifted = match step.clone() {
        Step::Read(at, len) => Step::Read(at + from, len),
        Step::Write(at, bytes) => Step::Write(at + from, bytes),
        Step::Discard(at, len) => Step::Discard(at + from, len),
        Step::Zero(at, len) => Step::Zero(at + from, len),
    };
    let read = shifted.run(disk).unwrap();
    match step {
        Step::Read(at, len) => assert!(read == model[*at as usize..][..*len]),
        Step::Write(at, bytes) => model[*at as usize..][..bytes.len()].copy_from_slice(bytes),
        Step::Zero(..) => model[step.range()].fill(0),
        Step::Discard(at, len) => {
            let now = disk.read(at + from, *len as usize).unwrap();
            model[step.range()].copy_from_slice(&now);
        }
    }
}

/// Images with random bytes in headers and tables: they are refused, or requests fail.
#[test]
fn inconsistent_images_do_no_harm() {
    for (index, subject) in Subject::all().into_iter().enumerate() {
        let seed = 500 + index as u64;
        println!("seed {seed}");
        let original = std::fs::read(subject.dir.path("disk")).unwrap();
        let entries: Vec<usize> = (0..original.len())
            .step_by(8)
            .filter(|&at| {
                original[at..(at + 8).min(original.len())]
                    .iter()
                    .any(|&b| b != 0)
            })
            .filter(|&at| at < 104 || looks_like_entry(&original, at))
            .collect();
        let (mut refused, mut failed, mut fine) = (0, 0, 0);
        for number in 0..times(250) {
            let mut random = Random::new(seed * 10_000 + number);
            let mut image = original.clone();
            for _ in 0..1 + random.below(4) {
                let at = match random.below(4) {
                    0 => random.below(13) as usize * 8,
                    _ => entries[random.below(entries.len() as u64) as usize],
                };
                mutate(&mut image, at, &mut random);
            }
            std::fs::write(subject.dir.path("disk"), &image).unwrap();
            let disk = match subject.dir.open("disk", subject.format, number % 7 == 0) {
                Ok(disk) => disk,
                Err(error) => {
                    assert!(!error.to_string().contains('\n'), "{error}");
                    refused += 1;
                    continue;
                }
            };
            let capacity = disk.image.geometry().capacity;
            let mut errors = 0;
            for _ in 0..25 {
                let step = Step::random(&mut random, capacity.min(1 << 40));
                errors += usize::from(step.run(&disk).is_err());
            }
            let larger = capacity.saturating_add(random.below(64) << 20);
            let _ = disk.image.grow(larger);
            let _ = disk.image.reload();
            for _ in 0..10 {
                let step = Step::random(&mut random, capacity.min(1 << 40));
                errors += usize::from(step.run(&disk).is_err());
            }
            *if errors > 0 { &mut failed } else { &mut fine } += 1;
        }
        println!("{refused} refused, {failed} with errors, {fine} fine");
        assert!(refused > 10 && failed > 10 && fine > 10);
    }
}

/// Whether these bytes may be an entry of a table: an offset within the file, and flags.
fn looks_like_entry(image: &[u8], at: usize) -> bool {
    let word = image.get(at..at + 8).map(|word| {
        let mut long = [0; 8];
        long.copy_from_slice(word);
        u64::from_be_bytes(long)
    });
    word.is_some_and(|word| (word & 0x00ff_ffff_ffff_fe00) < image.len() as u64)
}

fn mutate(image: &mut [u8], at: usize, random: &mut Random) {
    let Some(word) = image.get_mut(at..at + 8) else {
        return;
    };
    let mut long = [0; 8];
    long.copy_from_slice(word);
    let old = u64::from_be_bytes(long);
    let new = match random.below(9) {
        0 => 0,
        1 => u64::MAX,
        2 => random.below(u64::MAX),
        3 => old ^ 1 << random.below(64),
        4 => old ^ 1 << 62,
        5 => (old & 0xc000_0000_0000_0000) | (random.below(200) * 512),
        6 => (old & 0xc000_0000_0000_0000) | (random.below(1 << 47) * 512),
        7 => old.wrapping_add(512 << random.below(8)),
        _ => old ^ 1 << 63,
    };
    word.copy_from_slice(&new.to_be_bytes());
}

/// A disk grows while it is used, and its new part reads as zeros.
#[test]
fn disks_grow() {
    for (index, subject) in Subject::all().into_iter().enumerate() {
        let mut random = Random::new(600 + index as u64);
        let mut model = subject.content.clone();
        let disk = subject.open();
        for more in [512, 100 << 10, 3 << 20, 64 << 20] {
            let capacity = model.len() + more;
            disk.image.grow(capacity as u64).unwrap();
            assert_eq!(disk.image.geometry().capacity, capacity as u64);
            model.resize(capacity, 0);
            exercise(&disk, &mut model, &mut random, 30);
        }
        let now = model.len() as u64;
        disk.image.grow(now).unwrap();
        for bad in [now - 512, now + 1] {
            disk.image.grow(bad).unwrap_err();
        }
        drop(disk);
        subject.dir.agree("disk", subject.name(), &model);
    }
}

/// If another program truncates the file, only requests for the missing part fail.
#[test]
fn a_truncated_file_returns_errors() {
    for subject in Subject::all() {
        let disk = subject.open();
        for at in (0..SIZE).step_by(64 << 10) {
            disk.write(at as u64, &pattern(64 << 10)).unwrap();
        }
        let file = std::fs::File::options();
        let file = file.clone().write(true).open(subject.dir.path("disk"));
        let file = file.unwrap();
        let len = file.metadata().unwrap().len();
        file.set_len(len - (256 << 10)).unwrap();
        let reads = (0..SIZE).step_by(4096).map(|at| disk.read(at as u64, 4096));
        let (good, bad): (Vec<_>, Vec<_>) = reads.partition(Result::is_ok);
        assert!(!good.is_empty() && !bad.is_empty());
        assert!(file.write_at(&[0], 0).is_ok());
    }
}

/// One write to the file fails, each in turn, and all others succeed.
#[test]
fn a_single_write_error_fails_only_its_request() {
    for (index, subject) in Subject::all().into_iter().enumerate() {
        let seed = 700 + index as u64;
        println!("seed {seed}");
        let original = std::fs::read(subject.dir.path("disk")).unwrap();
        let steps = changes(&mut Random::new(seed), times(12) as usize);
        // Later, because there are more writes.
        let every = [5, 13, 19, 29][index];
        let every = if times(1) > 1 { 1 } else { every };
        let (mut failures, mut went_on) = (0, 0);
        for writes in (0..).step_by(every) {
            std::fs::write(subject.dir.path("disk"), &original).unwrap();
            let disk = subject.open();
            let image_file = disk.image.metadata_file().unwrap();
            image_file.faults.fail_once_after(Some(writes));
            let mut model = subject.content.clone();
            let mut failed = 0;
            for step in &steps {
                match step.run(&disk) {
                    Ok(_) => apply(step, &mut model, &disk),
                    Err(_) => {
                        failed += 1;
                        model = compare_around(&disk, &model, step);
                    }
                }
            }
            let was_reached = image_file.faults.fail_once_after(None).is_none();
            compare(&disk, &model);
            let usable = image_file.check_writable().is_ok();
            if usable {
                assert!(failed <= 1, "{writes}: {failed}");
                exercise(&disk, &mut model, &mut Random::new(writes), 10);
                drop(disk);
                subject.dir.agree("disk", subject.name(), &model);
            } else {
                drop(disk);
                subject.dir.is_sound("disk", subject.format);
            }
            if !was_reached {
                break;
            }
            failures += 1;
            went_on += u64::from(usable);
        }
        println!("{failures} failures, {went_on} went on");
        assert!(failures > 5 && went_on > 1, "{failures}, {went_on}");
    }
}

//! Images of all formats, used by a guest and checked by QEMU afterwards.

mod create;
mod hostile_images;
mod image_dir;
mod steps;

use outrigger_tests::disk::pattern_of;
use rustix::process::Signal;

use image_dir::{ImageDir, SIZE, connect, end, make};
use steps::{Kind, Random, Step, exercise, ranges, read};

fn agrees_with_qemu(kind: &str, options: &[&str], seed: u64) {
    for queues in [1, 4] {
        let dir = ImageDir::new();
        let (format, mut content) = make(&dir, kind);
        dir.agrees("disk", format, &content, false);
        let count = queues.to_string();
        let all = ["--format", format, "--backing", "allow", "--queues", &count];
        let mut random = Random::new(seed + queues as u64);
        let process = dir
            .launch("disk", &[&all[..], options].concat())
            .listening();
        let mut driver = connect(&process, queues);
        assert_eq!(driver.capacity(), SIZE as u64);
        exercise(&mut driver, &mut content, &mut random, 60);
        assert!(read(&mut driver, 0..SIZE) == content);
        drop(driver);
        end(&process);
        dir.agrees("disk", format, &content, false);
        if kind == "qcow2 with a snapshot" {
            dir.works("qemu-img snapshot -a then disk");
            dir.agrees("disk", format, &pattern_of(0, SIZE), false);
        }
    }
}

macro_rules! kinds {
    ($($name:ident: $kind:literal $(with $option:literal)*, $seed:literal;)*) => {
        $(#[test]
        fn $name() {
            agrees_with_qemu($kind, &[$($option),*], $seed);
        })*
    };
}

kinds! {
    raw: "raw", 10;
    raw_past_the_page_cache: "raw" with "--cache" with "none", 20;
    qcow2: "qcow2", 30;
    qcow2_past_the_page_cache: "qcow2" with "--cache" with "none", 40;
    qcow2_version_2: "qcow2 v2", 50;
    qcow2_small_clusters: "qcow2 4k", 60;
    qcow2_version_2_small_clusters: "qcow2 v2 4k", 70;
    qcow2_compressed: "qcow2 compressed", 80;
    qcow2_on_raw: "qcow2 on raw", 90;
    qcow2_on_qcow2: "qcow2 on qcow2", 100;
    qcow2_with_a_snapshot: "qcow2 with a snapshot", 110;
    qcow: "qcow", 120;
    qcow_past_the_page_cache: "qcow" with "--cache" with "none", 130;
    qcow_compressed: "qcow compressed", 140;
    qcow_on_raw: "qcow on raw", 150;
}

/// A process is killed with requests in flight. The completed ones are in the image, which
/// other programs can use.
#[test]
fn completed_writes_survive_the_death_of_the_process() {
    for (index, kind) in ["qcow2", "qcow2 4k", "qcow2 compressed", "qcow"]
        .iter()
        .enumerate()
    {
        let dir = ImageDir::new();
        let (format, mut content) = make(&dir, kind);
        let mut random = Random::new(1000 + index as u64);
        for kill in 0..4 {
            let options = ["--format", format, "--queues", "4"];
            let process = dir.launch("disk", &options).listening();
            let mut driver = connect(&process, 4);
            let now = read(&mut driver, 0..SIZE);
            assert!(now == content, "{kind}: kill {kill}");
            let discards = driver.discards();
            exercise(&mut driver, &mut content, &mut random, 5);
            let mut unsure = Vec::new();
            for (index, queue) in driver.queues.iter_mut().enumerate() {
                let ranges = ranges(&mut random, index, 4).into_iter();
                let steps: Vec<_> = ranges.map(|it| Step::random(&mut random, it)).collect();
                for (number, step) in steps.iter().enumerate() {
                    step.offer(queue, number, discards);
                }
                queue.kick();
                unsure.extend(steps);
            }
            // Some of these are completed.
            std::thread::sleep(std::time::Duration::from_micros(random.below(3000) as u64));
            process.signal(Signal::KILL);
            process.wait();
            drop(driver);
            drop(process);

            let process = dir.launch("disk", &options).listening();
            let mut driver = connect(&process, 1);
            let now = read(&mut driver, 0..SIZE);
            for step in &unsure {
                let new = match step.kind {
                    Kind::Write(key) => step.bytes(key),
                    Kind::Zero(_) | Kind::Discard => vec![0; step.range.len()],
                    Kind::Read | Kind::Flush => continue,
                };
                let now = &now[step.range.clone()];
                let old = &mut content[step.range.clone()];
                let both = old.iter().zip(&new);
                let one_of_them = now.iter().zip(both).all(|(now, (old, new))| {
                    // A cluster that was being discarded or overwritten may be zeros.
                    now == old || now == new || *now == 0
                });
                assert!(one_of_them, "{kind}: kill {kill}: {step:?}");
                old.copy_from_slice(now);
            }
            assert!(now == content, "{kind}: kill {kill}");
            drop(driver);
            end(&process);
            dir.agrees("disk", format, &content, true);
        }
    }
}

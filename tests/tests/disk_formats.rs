//! Images of all formats under a guest, and what QEMU makes of them afterwards.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use outrigger_tests::disk::pattern_of;
use outrigger_tests::driver::Driver;
use outrigger_tests::process::{Launch, Process};
use rustix::process::Signal;
use tempfile::TempDir;

const SIZE: usize = 4 << 20;
/// Most bytes of a request.
const LARGEST: usize = 256 << 10;
/// Requests of a queue at a time.
const DEPTH: usize = 8;
/// Queues take turns on the disk by so much, which is no multiple of any cluster.
const STRIPE: usize = 24 << 10;

/// Numbers that look random and are the same each time (xorshift64*).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }
}

/// Images in the making.
struct Shop(TempDir);

impl Shop {
    fn new() -> Self {
        Shop(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, command: &str) -> Output {
        let mut words = command.split_whitespace();
        let program = match words.next().unwrap() {
            "device-disk" => outrigger_tests::binaries::binary("device-disk"),
            other => other.into(),
        };
        Command::new(&program)
            .args(words)
            .current_dir(self.0.path())
            .output()
            .unwrap_or_else(|e| panic!("{command}: {e}; ./test.sh installs it"))
    }

    fn works(&self, command: &str) {
        let output = self.run(command);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {said}");
    }

    fn raw(&self, name: &str, content: &[u8]) {
        std::fs::write(self.path(name), content).unwrap();
    }

    /// QEMU finds nothing wrong with the image, other than lost space if `killed`, and
    /// this content.
    fn agrees(&self, image: &str, format: &str, content: &[u8], killed: bool) {
        if format == "qcow2" {
            let output = self.run(&format!("qemu-img check -f qcow2 {image}"));
            let said = String::from_utf8_lossy(&output.stdout);
            // 3: leaked clusters.
            let fine = matches!(output.status.code(), Some(0)) || killed;
            assert!(
                fine && matches!(output.status.code(), Some(0 | 3)),
                "{said}"
            );
        }
        self.raw("content", content);
        self.works(&format!(
            "qemu-img compare -f {format} -F raw {image} content"
        ));
    }

    fn launch(&self, image: &str, options: &[&str]) -> Launch {
        Launch::new("device-disk")
            .args(["--blk-file".as_ref(), self.path(image).as_os_str()])
            .args(options)
    }

    /// The one line that is said of an image that is not served.
    fn refusal(&self, image: &str, options: &[&str]) -> String {
        let launch = self.launch(image, options);
        let socket = launch.directory().join("socket");
        let process = launch.args([Path::new("--socket-path"), &socket]).spawn();
        assert_eq!(process.wait().code(), Some(1), "{}", process.log());
        let log = process.log();
        assert_eq!(log.lines().count(), 1, "{log}");
        log.trim_end().to_owned()
    }
}

fn connect(process: &Process, queues: usize) -> Driver {
    let socket = process.directory().join("socket");
    Driver::connect(&socket, queues, DEPTH, LARGEST)
}

fn end(process: &Process) {
    process.signal(Signal::TERM);
    assert_eq!(process.wait().code(), Some(0), "{}", process.log());
}

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Read,
    Write(u8),
    Discard,
    Zero(bool),
    Flush,
}

/// A request, of a part of the disk that no other one at the time is of.
#[derive(Clone, Debug)]
struct Step {
    kind: Kind,
    range: Range<usize>,
}

impl Step {
    fn random(random: &mut Random, within: Range<usize>) -> Self {
        let sectors = within.len() / 512;
        let count = match random.below(3) {
            0 => 1 + random.below(sectors.min(8)),
            1 => 1 + random.below(sectors),
            _ => sectors,
        };
        let first = random.below(sectors - count + 1);
        let start = within.start + first * 512;
        let kind = match random.below(20) {
            0..=6 => Kind::Read,
            7..=14 => Kind::Write(1 + random.below(255) as u8),
            15..=16 => Kind::Discard,
            17..=18 => Kind::Zero(random.below(2) == 0),
            _ => Kind::Flush,
        };
        Step {
            kind,
            range: start..start + count * 512,
        }
    }

    fn bytes(&self, key: u8) -> Vec<u8> {
        self.range.clone().map(|at| key ^ (at >> 9) as u8).collect()
    }

    fn offer(&self, queue: &mut outrigger_tests::driver::Queue, number: usize, discards: bool) {
        let (at, len) = (self.range.start as u64, self.range.len());
        match self.kind {
            Kind::Read => queue.read_part(number, at, len),
            Kind::Write(key) => {
                queue.fill(number, &self.bytes(key));
                queue.write_part(number, at, len);
            }
            Kind::Discard if discards => queue.discard(number, at, len as u64),
            Kind::Zero(unmap) => queue.write_zeroes(number, at, len as u64, unmap),
            Kind::Discard | Kind::Flush => queue.flush(number),
        }
    }
}

/// Ranges that do not overlap: some stripes of this queue, or some with a bit of the next.
fn ranges(random: &mut Random, queue: usize, queues: usize) -> Vec<Range<usize>> {
    let stripes = SIZE.div_ceil(STRIPE) / queues;
    let mut chosen: Vec<usize> = (0..DEPTH).map(|_| random.below(stripes)).collect();
    chosen.sort_unstable();
    chosen.dedup();
    let range = |stripe: usize| {
        // Of one queue alone stripes may be longer.
        let long = if queues == 1 {
            STRIPE * stripes
        } else {
            STRIPE
        };
        let start = (stripe * queues + queue) * STRIPE;
        start..(start + long).min(SIZE).min(start + LARGEST)
    };
    let mut ranges: Vec<Range<usize>> = chosen.into_iter().map(range).collect();
    for index in 1..ranges.len() {
        let next = ranges[index].start;
        let end = ranges[index - 1].end.min(next);
        ranges[index - 1].end = end;
    }
    ranges
}

/// Rounds of random requests on all queues at a time, of which every one is checked.
fn exercise(driver: &mut Driver, model: &mut [u8], random: &mut Random, rounds: usize) {
    let discards = driver.discards();
    let queues = driver.queues.len();
    for round in 0..rounds {
        let mut steps: Vec<Vec<Step>> = Vec::new();
        for (index, queue) in driver.queues.iter_mut().enumerate() {
            let ranges = ranges(random, index, queues).into_iter();
            let all: Vec<Step> = ranges.map(|range| Step::random(random, range)).collect();
            for (number, step) in all.iter().enumerate() {
                step.offer(queue, number, discards);
            }
            queue.kick();
            steps.push(all);
        }
        for (queue, steps) in driver.queues.iter_mut().zip(&steps) {
            let mut left = steps.len();
            while left > 0 {
                for (number, result) in queue.wait() {
                    let step = &steps[number];
                    assert_eq!(result, 0, "round {round}: {step:?}");
                    if step.kind == Kind::Read {
                        let found = &queue.content(number)[..step.range.len()];
                        assert!(
                            *found == model[step.range.clone()],
                            "round {round}: {step:?}"
                        );
                    }
                    left -= 1;
                }
            }
        }
        for step in steps.iter().flatten() {
            let part = &mut model[step.range.clone()];
            match step.kind {
                Kind::Write(key) => part.copy_from_slice(&step.bytes(key)),
                Kind::Zero(_) => part.fill(0),
                // What it reads as then is the device's choice, of two.
                Kind::Discard if discards => {
                    let now = read(driver, step.range.clone());
                    let mut pairs = now.iter().zip(part.iter());
                    assert!(
                        pairs.all(|(now, then)| *now == 0 || now == then),
                        "{step:?}"
                    );
                    part.copy_from_slice(&now);
                }
                _ => {}
            }
        }
    }
}

fn read(driver: &mut Driver, range: Range<usize>) -> Vec<u8> {
    let queue = &mut driver.queues[0];
    let mut bytes = Vec::new();
    for at in range.clone().step_by(LARGEST) {
        let len = LARGEST.min(range.end - at);
        queue.read_part(0, at as u64, len);
        assert_eq!(queue.run(), 0);
        bytes.extend(&queue.content(0)[..len]);
    }
    bytes
}

/// Makes image `disk` of a kind; returns its format and its content.
fn make(shop: &Shop, kind: &str) -> (&'static str, Vec<u8>) {
    let convert = |options: &str| {
        shop.raw("raw", &pattern_of(0, SIZE));
        let command = format!("qemu-img convert -f raw {options} raw disk");
        // The one of QEMU 10.0.2 writes compressed qcow images and says that it failed.
        shop.run(&command);
        pattern_of(0, SIZE)
    };
    let empty = |command: &str| {
        shop.works(command);
        vec![0; SIZE]
    };
    match kind {
        "raw" => ("raw", convert("-O raw")),
        "qcow2" => (
            "qcow2",
            empty("device-disk create disk --format qcow2 --size 4M"),
        ),
        "qcow2 v2" => (
            "qcow2",
            empty("qemu-img create -f qcow2 -o compat=0.10 disk 4M"),
        ),
        "qcow2 4k" => (
            "qcow2",
            empty("device-disk create disk --format qcow2 --size 4M --cluster-size 4K"),
        ),
        "qcow2 v2 4k" => ("qcow2", convert("-O qcow2 -o compat=0.10,cluster_size=4k")),
        "qcow2 compressed" => ("qcow2", convert("-c -O qcow2")),
        "qcow2 on raw" => {
            // What is below ends earlier.
            let mut content = pattern_of(0, SIZE - 100_352);
            shop.raw("base", &content);
            content.resize(SIZE, 0);
            shop.works(
                "device-disk create disk --format qcow2 --size 4M --backing base \
                 --backing-format raw",
            );
            ("qcow2", content)
        }
        "qcow2 on qcow2" => {
            shop.raw("raw", &pattern_of(0, SIZE));
            shop.works("qemu-img convert -c -f raw -O qcow2 raw base");
            shop.works("qemu-img create -f qcow2 -b base -F qcow2 -o cluster_size=4k disk");
            ("qcow2", pattern_of(0, SIZE))
        }
        "qcow2 with a snapshot" => {
            let content = convert("-O qcow2");
            shop.works("qemu-img snapshot -c then disk");
            ("qcow2", content)
        }
        "qcow" => (
            "qcow",
            empty("device-disk create disk --format qcow --size 4M"),
        ),
        "qcow compressed" => ("qcow", convert("-c -O qcow")),
        "qcow on raw" => {
            shop.raw("base", &pattern_of(0, SIZE));
            shop.works(
                "device-disk create disk --format qcow --size 4M --backing base \
                 --backing-format raw --cluster-size 8K",
            );
            ("qcow", pattern_of(0, SIZE))
        }
        _ => unreachable!("{kind}"),
    }
}

fn agrees_with_qemu(kind: &str, options: &[&str], seed: u64) {
    for queues in [1, 4] {
        let shop = Shop::new();
        let (format, mut content) = make(&shop, kind);
        shop.agrees("disk", format, &content, false);
        let count = queues.to_string();
        let all = ["--format", format, "--backing", "allow", "--queues", &count];
        let mut random = Random::new(seed + queues as u64);
        let process = shop
            .launch("disk", &[&all[..], options].concat())
            .listening();
        let mut driver = connect(&process, queues);
        assert_eq!(driver.capacity(), SIZE as u64);
        exercise(&mut driver, &mut content, &mut random, 60);
        assert!(read(&mut driver, 0..SIZE) == content);
        drop(driver);
        end(&process);
        shop.agrees("disk", format, &content, false);
        if kind == "qcow2 with a snapshot" {
            shop.works("qemu-img snapshot -a then disk");
            shop.agrees("disk", format, &pattern_of(0, SIZE), false);
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

/// A process is killed in the middle of requests; those that were completed are done, and
/// the image is one that others can use.
#[test]
fn what_was_completed_outlives_the_process() {
    for (index, kind) in ["qcow2", "qcow2 4k", "qcow2 compressed", "qcow"]
        .iter()
        .enumerate()
    {
        let shop = Shop::new();
        let (format, mut content) = make(&shop, kind);
        let mut random = Random::new(1000 + index as u64);
        for kill in 0..4 {
            let options = ["--format", format, "--queues", "4"];
            let process = shop.launch("disk", &options).listening();
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
            // Some of them will be done.
            std::thread::sleep(std::time::Duration::from_micros(random.below(3000) as u64));
            process.signal(Signal::KILL);
            process.wait();
            drop(driver);
            drop(process);

            let process = shop.launch("disk", &options).listening();
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
                    // A cluster of a discarded or overwritten range may be zeros on its way.
                    now == old || now == new || *now == 0
                });
                assert!(one_of_them, "{kind}: kill {kill}: {step:?}");
                old.copy_from_slice(now);
            }
            assert!(now == content, "{kind}: kill {kill}");
            drop(driver);
            end(&process);
            shop.agrees("disk", format, &content, true);
        }
    }
}

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
    shop.works("device-disk create a --format qcow2 --size 3M --force");
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

//! QEMU as the front end of a disk process that dies many times under a Linux guest, by a
//! signal or at a fault point. QEMU keeps the in-flight table and connects to the next
//! process.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use outrigger_tests::binaries::helper;
use outrigger_tests::chaos::{Random, long};
use outrigger_tests::linux::{self, PATIENCE};
use outrigger_tests::machine::skip_kvm;
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::qemu::{Board, Qemu};
use rustix::process::Signal;

/// How often the guest writes and calls fsync(2).
const ROUNDS: usize = 8;

/// Fault points at which a disk process dies, if no signal kills it first.
const POINTS: [&str; 6] = [
    "popped",
    "done",
    "written",
    "published",
    "cleared",
    "interrupt",
];

fn disk(image: &Path, socket: &Path, fault: Option<String>) -> Process {
    let mut launch = Launch::program(&helper("faulty-disk")).lifetime(PATIENCE);
    if let Some(fault) = fault {
        launch.command().env("OUTRIGGER_FAULT", fault);
    }
    launch
        .args(["--queues=2", "--blk-file"])
        .args([image])
        .listening_at(socket)
}

fn survives_deaths(board: Board, cpus: u32) {
    let mut random = Random::announced();
    let directory = tempfile::tempdir().unwrap();
    let (image, socket) = (
        directory.path().join("disk.img"),
        directory.path().join("socket"),
    );
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let mut process = disk(&image, &socket, None);
    let job = format!("outrigger.job=disk,fsync outrigger.rounds={ROUNDS}");
    let machine = Qemu::new(board, cpus, 128, &job)
        .reconnecting("vhost-user-blk", &socket, ",num-queues=2")
        .start();
    machine.wait_serial("GUEST up");
    let (mut deaths, mut replays) = (0, 0);
    let start = Instant::now();
    while !machine.serial().contains("STEP fsync: pass") {
        assert!(
            machine.process.is_running()
                && start.elapsed() < PATIENCE
                && !machine.serial().contains("GUEST FAIL"),
            "after {deaths} deaths\nserial: {}\nlog: {}\ndisk: {}",
            machine.serial(),
            machine.process.log(),
            process.log()
        );
        let alive = Duration::from_millis(50 + random.below(2000));
        let end = Instant::now() + alive;
        while process.is_running() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        if process.is_running() {
            process.signal(Signal::KILL);
            process.wait();
        }
        deaths += 1;
        // Sometimes there is no process for a while.
        std::thread::sleep(Duration::from_millis(random.below(4) * 50));
        let point = POINTS[random.below(POINTS.len() as u64) as usize];
        let fault = format!("{point}:{}", 1 + random.below(25));
        let next = disk(&image, &socket, Some(fault));
        let log = process.log();
        replays += usize::from(log.contains("were in flight"));
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
        process = next;
    }
    machine.wait_serial("GUEST pass");
    println!("{deaths} deaths, {replays} of which found requests in flight");
    assert!(deaths >= 10 && replays > 0, "{deaths} {replays}");
    let serial = machine.serial();
    assert!(serial.contains("STEP disk: pass"), "{serial}");
    for error in ["I/O error", "EXT4-fs error", "EXT4-fs warning", "timeout"] {
        assert!(!serial.contains(error), "{serial}");
    }
    drop((machine, process));
    linux::check_image(&image);
}

#[test]
fn microvm_loses_no_write_over_many_deaths_of_its_disk() {
    if !skip_kvm() {
        survives_deaths(Board::Microvm, 1);
    }
}

/// With two CPUs, so that two queues are in use. The boot takes twice as long.
#[test]
fn q35_loses_no_write_over_many_deaths_of_its_disk() {
    if !skip_kvm() && long() {
        survives_deaths(Board::Q35, 2);
    }
}

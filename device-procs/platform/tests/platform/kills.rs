//! The process is killed at random moments, and the guest does not notice.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use outrigger_protocol::trap::FromPlatform;
use outrigger_tests::chaos::Random;
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::wait_until;
use rustix::process::Signal;

use crate::machine::{Machine, option, receive};

fn start(machine: &Machine, serial: &Path) -> (Process, UnixStream) {
    let (process, stream) = Launch::new("device-platform")
        .args([option("--serial=file=", serial)])
        .connected();
    machine.greet(&stream);
    (process, stream)
}

/// Runs processes one after the other and kills each at a random moment, while other
/// threads act as the guest. Returns the last process, which is alive.
fn kill_many(
    machine: &Machine,
    serial: &Path,
    kills: u32,
    random: &mut Random,
) -> (Process, UnixStream) {
    for _ in 0..kills {
        let (process, _stream) = start(machine, serial);
        let magnitude = 10 + random.below(14);
        let moment = Duration::from_nanos(random.below(1 << magnitude));
        // Sleeping is too coarse for events within microseconds.
        let begin = Instant::now();
        while begin.elapsed() < moment {
            std::hint::spin_loop();
        }
        process.signal(Signal::KILL);
        assert!(!process.wait().success());
    }
    start(machine, serial)
}

/// Ends the guest's threads even if the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn every_line_is_in_the_file_once_over_200_kills() {
    let dir = tempfile::tempdir().unwrap();
    let serial = dir.path().join("serial");
    let machine = Machine::new(2);
    let (stop, lines) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut random = Random::announced();
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        let printer = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let line = lines.fetch_add(1, Ordering::Relaxed);
                machine.print(0, format!("line {line:07}\n").as_bytes());
            }
            machine.wait(0);
        });
        // Another vCPU, whose registers must keep what it writes.
        let checker = scope.spawn(|| {
            let mut value = 0u64;
            while !stop.load(Ordering::Relaxed) {
                value = (value + 1) & 0xff;
                machine.write(1, 0x3ff, 1, value);
                machine.write(1, 0x70, 1, 0x40 + value % 16);
                machine.write(1, 0x71, 1, value);
                assert_eq!(machine.read(1, 0x3ff, 1), value);
                assert_eq!(machine.read(1, 0x71, 1), value);
            }
        });
        let (process, stream) = kill_many(&machine, &serial, 220, &mut random);
        stop.store(true, Ordering::Relaxed);
        printer.join().unwrap();
        checker.join().unwrap();
        drop(stream);
        assert_eq!(process.wait().code(), Some(0));
    });
    let lines = lines.load(Ordering::Relaxed);
    let text = std::fs::read_to_string(&serial).unwrap();
    println!("{lines} lines over 220 kills");
    assert!(lines > 220, "the guest hardly ran");
    let mut count = 0;
    for (expected, line) in text.lines().enumerate() {
        assert_eq!(line, format!("line {expected:07}"));
        count += 1;
    }
    assert_eq!((count, text.len() as u64), (lines, lines * 13));
}

#[test]
fn reads_with_side_effects_happen_once() {
    let dir = tempfile::tempdir().unwrap();
    let serial = dir.path().join("serial");
    let machine = Machine::new(1);
    let stop = AtomicBool::new(false);
    let mut random = Random::announced();
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        let guest = scope.spawn(|| {
            // In loopback, a byte that is written or read twice is noticed.
            machine.write(0, 0x3fc, 1, 0x10);
            let mut next = 0u64;
            while !stop.load(Ordering::Relaxed) {
                for i in 0..5 {
                    machine.write(0, 0x3f8, 1, (next + i) & 0xff);
                }
                for i in 0..5 {
                    assert_eq!(machine.read(0, 0x3fd, 1), 0x61);
                    assert_eq!(machine.read(0, 0x3f8, 1), (next + i) & 0xff);
                }
                assert_eq!(machine.read(0, 0x3fd, 1), 0x60);
                next += 5;
            }
            next
        });
        let _last = kill_many(&machine, &serial, 80, &mut random);
        stop.store(true, Ordering::Relaxed);
        println!("{} bytes over 80 kills", guest.join().unwrap());
    });
    assert_eq!(std::fs::read(&serial).unwrap(), b"");
}

/// Sets the slots as a kill between a commit and the answer leaves them: that moment is too
/// short to hit by chance.
#[test]
fn a_committed_request_is_answered_and_not_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let serial = dir.path().join("serial");
    let machine = Machine::new(2);
    let restart = |(process, stream): (Process, UnixStream), vcpu| {
        process.signal(Signal::KILL);
        process.wait();
        drop(stream);
        machine.reopen(vcpu);
        start(&machine, &serial)
    };
    let mut running = start(&machine, &serial);
    machine.write(0, 0x3fc, 1, 0x10);
    for byte in [0x11, 0x22, 0x33] {
        machine.write(0, 0x3f8, 1, byte);
    }
    machine.wait(0);
    // The write of 0x33 once more ...
    running = restart(running, 0);
    machine.wait(0);
    assert_eq!(machine.read(0, 0x3f8, 1), 0x11);
    // ... and the read of 0x11.
    running = restart(running, 0);
    machine.wait(0);
    assert_eq!(machine.slot(0).answer(), 0x11);
    // Another vCPU's request is not mistaken for it.
    for byte in [0x22, 0x33] {
        assert_eq!(machine.read(1, 0x3f8, 1), byte);
    }
    assert_eq!(machine.read(1, 0x3fd, 1), 0x60);
    // The same for bytes on their way to the file.
    machine.write(1, 0x3fc, 1, 0x00);
    machine.print(1, b"once");
    machine.wait(1);
    let (process, stream) = restart(running, 1);
    machine.wait(1);
    drop(stream);
    assert_eq!(process.wait().code(), Some(0));
    assert_eq!(std::fs::read(&serial).unwrap(), b"once");
}

/// The same between the answer and waking the vCPU that waits for it.
#[test]
fn a_vcpu_that_waits_for_a_finished_answer_is_woken() {
    let machine = Machine::new(1);
    std::thread::scope(|scope| {
        let vcpu = scope.spawn(|| machine.read(0, 0x3fd, 1));
        wait_until("the vCPU sleeps", || machine.is_waiting(0));
        std::thread::sleep(Duration::from_millis(20));
        let request = machine.slot(0).open_request().unwrap();
        assert!(machine.slot(0).complete(request.seq, 0x5a).is_some());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!vcpu.is_finished());
        let dir = tempfile::tempdir().unwrap();
        let _process = start(&machine, &dir.path().join("serial"));
        assert_eq!(vcpu.join().unwrap(), 0x5a);
    });
}

#[test]
fn an_interrupt_and_an_event_survive_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let serial = dir.path().join("serial");
    let machine = Machine::new(1);
    let (first, stream) = start(&machine, &serial);
    machine.write(0, 0x3f9, 1, 0x02);
    machine.wait(0);
    first.signal(Signal::KILL);
    first.wait();
    drop(stream);
    let _ = machine.line.read();
    // Written while no process was there; the transmitter's interrupt is still pending.
    machine.write(0, 0x604, 2, 0x2000);
    let (_second, stream) = start(&machine, &serial);
    assert_eq!(receive(&stream), FromPlatform::PowerOff);
    assert!(machine.raised());
    assert_eq!(machine.read(0, 0x3fa, 1), 0xc2);
}

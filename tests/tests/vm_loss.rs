//! Device processes that die, stand still or are swapped, as the runner deals with
//! it; under load, with kills at every point, is `vm_chaos`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use outrigger_protocol::control::{DeviceState, MachineEvent};
use outrigger_tests::machine::{Machine, Running, skip_kvm};
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::scripted::{self, Answer};
use outrigger_tests::wait_until;
use rustix::process::Signal;

/// A device-disk for `image` that listens at `socket`; several may use the image.
fn disk<'a>(image: &Path, socket: &Path, more: impl IntoIterator<Item = &'a str>) -> Process {
    Launch::new("device-disk")
        .args(["--lock", "off", "--blk-file"])
        .args([image])
        .args(more)
        .listening_at(socket)
}

/// A machine that reads from its disk for a while.
fn reading(count: u32, more: &[&str]) -> Running {
    let machine = Machine::embedded(&format!("job=disk-irq count={count} qdepth=4"))
        .args(["--memory", "64M"])
        .args(more.iter().copied());
    let image = machine.disk_path();
    std::fs::File::create(&image)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let socket = machine.directory().join("disk.sock");
    let process = disk(&image, &socket, []);
    let machine = machine.served("disk0", "block", process, &socket).start();
    machine.wait_event("driver-ok", |e| matches!(e, MachineEvent::DriverOk { .. }));
    machine
}

fn socket(machine: &Running) -> PathBuf {
    machine.directory().join("disk.sock")
}

fn image(machine: &Running) -> PathBuf {
    machine.directory().join("disk.img")
}

fn state(machine: &Running) -> DeviceState {
    machine.control("status").status.unwrap().devices[0].state
}

fn is_lost(machine: &Running) {
    wait_until("the device is lost", || state(machine) == DeviceState::Lost);
}

fn is_running(machine: &Running) {
    wait_until("the device runs", || state(machine) == DeviceState::Running);
}

fn kill(machine: &mut Running, successor: impl FnOnce(&Path, &Path) -> Process) {
    machine.process("disk0").signal(Signal::KILL);
    machine.process("disk0").wait();
    let next = successor(&image(machine), &socket(machine));
    machine.replace("disk0", next);
}

fn swap(machine: &Running, socket: &Path) -> Result<Duration, String> {
    let line = format!(
        "{{\"command\":\"swap\",\"id\":\"disk0\",\"socket\":\"{}\"}}",
        socket.display()
    );
    let reply = machine.control_line(&line);
    match (reply.ok, reply.outage_us, reply.error) {
        (true, Some(outage), None) => Ok(Duration::from_micros(outage)),
        (false, None, Some(error)) => Err(error),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_lost_disk_is_waited_for_and_comes_back() {
    if skip_kvm() {
        return;
    }
    let mut machine = reading(20_000, &[]);
    machine.process("disk0").signal(Signal::KILL);
    is_lost(&machine);
    // Meanwhile the machine does as it is told.
    assert!(machine.control("pause").ok && machine.control("resume").ok);
    assert_eq!(state(&machine), DeviceState::Lost);
    let next = disk(&image(&machine), &socket(&machine), []);
    machine.replace("disk0", next);
    is_running(&machine);
    for _ in 0..5 {
        kill(&mut machine, |image, socket| disk(image, socket, []));
        is_running(&machine);
    }
    machine.passes();
    let events = machine.events();
    let count = |wanted: fn(&MachineEvent) -> bool| events.iter().filter(|e| wanted(e)).count();
    assert_eq!(count(|e| matches!(e, MachineEvent::DeviceLost { .. })), 6);
    assert_eq!(
        count(|e| matches!(e, MachineEvent::DeviceReconnecting { .. })),
        6
    );
    let back = |e: &MachineEvent| matches!(e, MachineEvent::DeviceRunning { outage_us, .. } if *outage_us > 0);
    assert_eq!(count(back), 6, "{events:?}");
}

#[test]
fn a_disk_lost_while_the_machine_is_paused_or_reset_comes_back() {
    if skip_kvm() {
        return;
    }
    let mut machine = reading(5_000, &[]);
    assert!(machine.control("pause").ok);
    kill(&mut machine, |image, socket| disk(image, socket, []));
    wait_until("it is back, and stands still", || {
        state(&machine) == DeviceState::Paused
    });
    assert!(machine.control("resume").ok);
    machine.process("disk0").signal(Signal::KILL);
    is_lost(&machine);
    // The guest boots again and finds a device that answers nothing yet.
    assert!(machine.control("reset").ok);
    let next = disk(&image(&machine), &socket(&machine), []);
    machine.replace("disk0", next);
    machine.passes();
}

#[test]
fn what_does_not_suit_is_refused_and_the_next_one_taken() {
    if skip_kvm() {
        return;
    }
    let mut machine = reading(5_000, &[]);
    let small = machine.directory().join("small.img");
    std::fs::File::create(&small)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    kill(&mut machine, |_, socket| disk(&small, socket, []));
    machine.wait_event(
        "refused",
        |e| matches!(e, MachineEvent::DeviceRefused { reason, .. } if reason.contains("capacity")),
    );
    assert_eq!(state(&machine), DeviceState::Lost);
    kill(&mut machine, |image, socket| disk(image, socket, []));
    machine.passes();
}

#[test]
fn an_end_comes_when_it_was_asked_for() {
    if skip_kvm() {
        return;
    }
    // With a limit, and a process that comes in time.
    let mut machine = reading(3_000, &["--on-loss", "stop:20"]);
    kill(&mut machine, |image, socket| disk(image, socket, []));
    machine.passes();
    let machine = reading(1_000_000, &["--on-loss", "stop:1"]);
    let lost = Instant::now();
    machine.process("disk0").signal(Signal::KILL);
    machine.expect(5);
    assert!(lost.elapsed() >= Duration::from_secs(1));
    let log = machine.runner.log();
    assert!(log.contains("device disk0 is lost: "), "{log}");
}

#[test]
fn a_stopped_disk_has_a_deadline_and_its_successor_waits_for_its_end() {
    if skip_kvm() {
        return;
    }
    let mut machine = reading(300_000, &[]);
    machine.process("disk0").signal(Signal::STOP);
    // Whoever asks what goes on gets an answer while a pause waits for the disk.
    let path = machine.directory().join("control");
    let mut pausing = UnixStream::connect(&path).unwrap();
    pausing.write_all(b"{\"command\":\"pause\"}\n").unwrap();
    let mut quickest = Duration::MAX;
    for _ in 0..10 {
        let asked = Instant::now();
        assert!(machine.control("status").ok);
        quickest = quickest.min(asked.elapsed());
    }
    assert!(quickest < Duration::from_secs(1), "{quickest:?}");
    let mut answer = String::new();
    BufReader::new(pausing).read_line(&mut answer).unwrap();
    assert!(answer.contains("true"), "{answer}");
    assert_eq!(state(&machine), DeviceState::Lost);
    assert!(machine.control("resume").ok);
    // It could wake up at any time, so nobody takes its place while it is there.
    let other = machine.directory().join("other.sock");
    let successor = disk(&image(&machine), &other, []);
    let error = swap(&machine, &other).unwrap_err();
    assert!(error.contains("is still there: end it first"), "{error}");
    machine.process("disk0").signal(Signal::KILL);
    let outage = swap(&machine, &other).unwrap();
    eprintln!("stopped for {outage:?}");
    drop(machine.replace("disk0", successor));
    is_running(&machine);

    // One that goes on leaves of itself, and takes its own place. Until it has left, it
    // could write into the memory of the next guest.
    machine.process("disk0").signal(Signal::STOP);
    let refused = machine.control("reset").error.unwrap();
    assert!(
        refused.contains("is still there: end it first"),
        "{refused}"
    );
    assert_eq!(state(&machine), DeviceState::Lost);
    machine.process("disk0").signal(Signal::CONT);
    is_running(&machine);
    assert!(machine.control("reset").ok);
    machine.process("disk0").signal(Signal::STOP);
    let asked = Instant::now();
    assert!(machine.control("stop").ok);
    machine.expect(0);
    assert!(asked.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_disk_is_swapped_and_stays_when_the_other_does_not_suit() {
    if skip_kvm() {
        return;
    }
    let machine = reading(150_000, &[]);
    let path = |name: &str| machine.directory().join(name);
    let second = disk(&image(&machine), &path("second.sock"), []);
    let first = path("disk.sock");
    let small = path("small.img");
    std::fs::File::create(&small)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let small = disk(&small, &path("small.sock"), []);
    let read_only = disk(&image(&machine), &path("ro.sock"), ["--read-only"]);
    for round in 0..10 {
        let to = if round % 2 == 0 {
            path("second.sock")
        } else {
            first.clone()
        };
        let outage = swap(&machine, &to).unwrap();
        eprintln!("swapped in {outage:?}");
        for (socket, why) in [
            ("small.sock", "capacity is 2048, not 131072"),
            ("ro.sock", "has features 0x20"),
            ("nowhere.sock", "connecting to"),
        ] {
            let error = swap(&machine, &path(socket)).unwrap_err();
            assert!(error.contains("disk0") && error.contains(why), "{error}");
        }
    }
    machine.passes();
    drop((second, small, read_only));
    let events = machine.events();
    let swaps = |e: &&MachineEvent| matches!(e, MachineEvent::DeviceSwapped { .. });
    assert_eq!(events.iter().filter(swaps).count(), 10);
    assert!(
        !events
            .iter()
            .any(|e| matches!(e, MachineEvent::DeviceLost { .. }))
    );
}

#[test]
fn whoever_watches_is_told() {
    if skip_kvm() {
        return;
    }
    let mut machine = reading(1_000_000, &[]);
    let path = machine.directory().join("control");
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"{\"command\":\"watch\"}\n").unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "{\"ok\":true}");
    // One that does not read is dropped, some time, and holds nobody up.
    let mut deaf = UnixStream::connect(&path).unwrap();
    deaf.write_all(b"{\"command\":\"watch\"}\n").unwrap();
    kill(&mut machine, |image, socket| disk(image, socket, []));
    let mut seen = Vec::new();
    while !matches!(seen.last(), Some(MachineEvent::DeviceRunning { .. })) {
        let line = lines.next().unwrap().unwrap();
        seen.push(serde_json::from_str::<MachineEvent>(&line).unwrap());
    }
    assert!(
        matches!(seen[0], MachineEvent::DeviceLost { .. }),
        "{seen:?}"
    );
    // Answers come in between.
    stream.write_all(b"{\"command\":\"stop\"}\n").unwrap();
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert!(rest.iter().any(|line| line == "{\"ok\":true}"), "{rest:?}");
    machine.expect(0);
}

#[test]
fn what_only_a_launcher_can_do_is_said() {
    if skip_kvm() {
        return;
    }
    let machine = reading(1_000_000, &[]);
    for (line, word) in [
        (
            "{\"command\":\"restart\",\"id\":\"disk0\"}",
            "starts no process",
        ),
        (
            "{\"command\":\"swap\",\"id\":\"disk0\"}",
            "starts no process",
        ),
        (
            "{\"command\":\"swap\",\"id\":\"disk0\",\"device\":\"path=x\"}",
            "starts no process",
        ),
        (
            "{\"command\":\"swap\",\"id\":\"disk7\",\"socket\":\"/x\"}",
            "no device is named disk7",
        ),
    ] {
        let reply = machine.control_line(line);
        assert!(!reply.ok && reply.error.unwrap().contains(word), "{line}");
    }
}

#[test]
fn a_process_that_comes_and_is_slow_holds_nobody_up() {
    if skip_kvm() {
        return;
    }
    let mut machine = reading(200_000, &[]);
    machine.process("disk0").signal(Signal::KILL);
    machine.process("disk0").wait();
    std::fs::remove_file(socket(&machine)).unwrap();
    // Each answer comes just before it would be too late.
    scripted::serve(&socket(&machine), |_| {
        std::thread::sleep(Duration::from_millis(4500));
        Answer::Proper
    });
    machine.wait_event("somebody comes", |e| {
        matches!(e, MachineEvent::DeviceReconnecting { .. })
    });
    let asked = Instant::now();
    assert!(machine.control("pause").ok && machine.control("resume").ok);
    assert!(machine.control("reset").ok);
    assert!(
        asked.elapsed() < Duration::from_secs(20),
        "{:?}",
        asked.elapsed()
    );
    // Its guest runs.
    let ticks = machine.runner.ticks();
    wait_until("the guest runs", || machine.runner.ticks() > ticks + 2);
    std::fs::remove_file(socket(&machine)).unwrap();
    let next = disk(&image(&machine), &socket(&machine), []);
    machine.replace("disk0", next);
    machine.passes();
}

#[test]
fn a_swap_to_a_silent_process_does_not_end_the_search() {
    if skip_kvm() {
        return;
    }
    let mut machine = reading(20_000, &[]);
    machine.process("disk0").signal(Signal::KILL);
    machine.process("disk0").wait();
    let silent = machine.directory().join("silent.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&silent).unwrap();
    is_lost(&machine);
    let error = swap(&machine, &silent).unwrap_err();
    assert!(error.contains("no complete answer"), "{error}");
    let next = disk(&image(&machine), &socket(&machine), []);
    machine.replace("disk0", next);
    is_running(&machine);
    machine.passes();
}

#[test]
fn a_driver_is_told_that_its_device_needs_a_reset_and_works_after_it() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=needs-reset").args(["--on-loss", "error:1"]);
    let path = machine.disk_path();
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(64 << 20).unwrap();
    let socket = machine.directory().join("disk.sock");
    let process = disk(&path, &socket, []);
    let mut machine = machine.served("disk0", "block", process, &socket).start();
    machine.wait_serial("needs-reset: ready");
    let lost = Instant::now();
    machine.process("disk0").signal(Signal::KILL);
    machine.wait_serial("needs a reset");
    assert!(lost.elapsed() >= Duration::from_secs(1));
    // The driver has begun anew with nobody there; then somebody comes.
    let next = disk(&path, &socket, []);
    machine.replace("disk0", next);
    machine.passes();
}

/// What the driver has set is told to the process that comes.
#[test]
fn a_disk_that_was_set_to_write_through_stays_so() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=write-through").args(["--memory", "64M"]);
    let path = machine.disk_path();
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    let socket = machine.directory().join("disk.sock");
    let debug = ["--log-level", "debug"];
    let process = disk(&path, &socket, debug);
    let mut machine = machine.served("disk0", "block", process, &socket).start();
    machine.wait_serial("writeback is 0");
    let told = |machine: &Running| {
        wait_until("it is told", || {
            let log = machine.process("disk0").log();
            let last = log
                .lines()
                .rfind(|line| line.contains("has set the disk to"));
            last.is_some_and(|last| last.contains("write-through"))
        });
    };
    told(&machine);
    kill(&mut machine, |image, socket| disk(image, socket, debug));
    is_running(&machine);
    told(&machine);
    // By a swap, too.
    let other = socket.with_extension("other");
    let next = disk(&path, &other, debug);
    swap(&machine, &other).unwrap();
    machine.replace("disk0", next);
    told(&machine);
    // Nor does the driver ever see anything else.
    let serial = machine.serial();
    assert!(!serial.contains("writeback is 1"), "{serial}");
    assert!(machine.control("stop").ok);
}

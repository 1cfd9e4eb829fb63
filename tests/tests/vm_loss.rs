//! The runner when device processes die, are stopped or are swapped. Kills under load at
//! every point are in `vm_chaos`.

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

/// A device-disk for `image` that listens at `socket`. Several can use the image.
fn disk<'a>(image: &Path, socket: &Path, more: impl IntoIterator<Item = &'a str>) -> Process {
    Launch::new("device-disk")
        .args(["--lock", "off", "--blk-file"])
        .args([image])
        .args(more)
        .listening_at(socket)
}

/// A machine whose guest reads from its disk `count` times.
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

fn wait_until_lost(machine: &Running) {
    wait_until("the device is lost", || state(machine) == DeviceState::Lost);
}

fn wait_until_running(machine: &Running) {
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
fn a_disk_reconnects_after_each_kill_of_its_process() {
    if skip_kvm() {
        return;
    }
    let mut machine = reading(20_000, &[]);
    machine.process("disk0").signal(Signal::KILL);
    wait_until_lost(&machine);
    // Meanwhile the machine carries out commands.
    assert!(machine.control("pause").ok && machine.control("resume").ok);
    assert_eq!(state(&machine), DeviceState::Lost);
    let next = disk(&image(&machine), &socket(&machine), []);
    machine.replace("disk0", next);
    wait_until_running(&machine);
    for _ in 0..5 {
        kill(&mut machine, |image, socket| disk(image, socket, []));
        wait_until_running(&machine);
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
fn a_disk_that_is_lost_during_a_pause_or_reset_reconnects() {
    if skip_kvm() {
        return;
    }
    let mut machine = reading(5_000, &[]);
    assert!(machine.control("pause").ok);
    kill(&mut machine, |image, socket| disk(image, socket, []));
    wait_until("the device is connected and paused", || {
        state(&machine) == DeviceState::Paused
    });
    assert!(machine.control("resume").ok);
    machine.process("disk0").signal(Signal::KILL);
    wait_until_lost(&machine);
    // The guest boots again while its disk has no back end.
    assert!(machine.control("reset").ok);
    let next = disk(&image(&machine), &socket(&machine), []);
    machine.replace("disk0", next);
    machine.passes();
}

#[test]
fn an_incompatible_process_is_refused_and_the_next_one_used() {
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
fn on_loss_stop_ends_the_machine_after_its_time_limit() {
    if skip_kvm() {
        return;
    }
    // A process connects within the time limit.
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
fn a_stopped_disk_process_must_end_before_it_is_replaced() {
    if skip_kvm() {
        return;
    }
    let mut machine = reading(300_000, &[]);
    machine.process("disk0").signal(Signal::STOP);
    // `status` is answered while a pause waits for the disk.
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
    // The stopped process could continue at any time, so no other one is connected while
    // it exists.
    let other = machine.directory().join("other.sock");
    let successor = disk(&image(&machine), &other, []);
    let error = swap(&machine, &other).unwrap_err();
    assert!(error.contains("is still there: end it first"), "{error}");
    machine.process("disk0").signal(Signal::KILL);
    let outage = swap(&machine, &other).unwrap();
    eprintln!("stopped for {outage:?}");
    drop(machine.replace("disk0", successor));
    wait_until_running(&machine);

    // A process that continues closes its connection and connects again. Until it has
    // closed it, it could write into the memory of the next guest.
    machine.process("disk0").signal(Signal::STOP);
    let refused = machine.control("reset").error.unwrap();
    assert!(
        refused.contains("is still there: end it first"),
        "{refused}"
    );
    assert_eq!(state(&machine), DeviceState::Lost);
    machine.process("disk0").signal(Signal::CONT);
    wait_until_running(&machine);
    assert!(machine.control("reset").ok);
    machine.process("disk0").signal(Signal::STOP);
    let asked = Instant::now();
    assert!(machine.control("stop").ok);
    machine.expect(0);
    assert!(asked.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_swap_to_an_incompatible_process_keeps_the_old_one() {
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
fn a_client_that_watches_gets_events_between_replies() {
    if skip_kvm() {
        return;
    }
    let mut machine = reading(1_000_000, &[]);
    let path = machine.directory().join("control");
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"{\"command\":\"watch\"}\n").unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "{\"ok\":true}");
    // A client that does not read is disconnected after a while and blocks nothing.
    let mut silent = UnixStream::connect(&path).unwrap();
    silent.write_all(b"{\"command\":\"watch\"}\n").unwrap();
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
    // Replies come between the events.
    stream.write_all(b"{\"command\":\"stop\"}\n").unwrap();
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert!(rest.iter().any(|line| line == "{\"ok\":true}"), "{rest:?}");
    machine.expect(0);
}

#[test]
fn commands_of_the_launcher_are_refused() {
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
            "disk7: there is no such device",
        ),
    ] {
        let reply = machine.control_line(line);
        assert!(!reply.ok && reply.error.unwrap().contains(word), "{line}");
    }
}

#[test]
fn a_slow_handshake_blocks_neither_pause_nor_reset() {
    if skip_kvm() {
        return;
    }
    let mut machine = reading(200_000, &[]);
    machine.process("disk0").signal(Signal::KILL);
    machine.process("disk0").wait();
    std::fs::remove_file(socket(&machine)).unwrap();
    // Each reply comes just before its deadline.
    scripted::serve(&socket(&machine), |_| {
        std::thread::sleep(Duration::from_millis(4500));
        Answer::Proper
    });
    machine.wait_event("the device is reconnecting", |e| {
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
    // The guest runs.
    let ticks = machine.runner.ticks();
    wait_until("the guest runs", || machine.runner.ticks() > ticks + 2);
    std::fs::remove_file(socket(&machine)).unwrap();
    let next = disk(&image(&machine), &socket(&machine), []);
    machine.replace("disk0", next);
    machine.passes();
}

#[test]
fn reconnecting_continues_after_a_swap_to_a_silent_process() {
    if skip_kvm() {
        return;
    }
    let mut machine = reading(20_000, &[]);
    machine.process("disk0").signal(Signal::KILL);
    machine.process("disk0").wait();
    let silent = machine.directory().join("silent.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&silent).unwrap();
    wait_until_lost(&machine);
    let error = swap(&machine, &silent).unwrap_err();
    assert!(error.contains("no complete answer"), "{error}");
    let next = disk(&image(&machine), &socket(&machine), []);
    machine.replace("disk0", next);
    wait_until_running(&machine);
    machine.passes();
}

#[test]
fn on_loss_error_sets_needs_reset_and_the_driver_recovers() {
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
    // The driver has started again without a back end; now one connects.
    let next = disk(&path, &socket, []);
    machine.replace("disk0", next);
    machine.passes();
}

/// A back end that connects gets what the driver wrote to the configuration space.
#[test]
fn write_through_is_kept_over_a_reconnect_and_a_swap() {
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
    let is_write_through = |machine: &Running| {
        wait_until("the back end is set to write-through", || {
            let log = machine.process("disk0").log();
            let last = log
                .lines()
                .rfind(|line| line.contains("has set the cache mode"));
            last.is_some_and(|last| last.contains("write-through"))
        });
    };
    is_write_through(&machine);
    kill(&mut machine, |image, socket| disk(image, socket, debug));
    wait_until_running(&machine);
    is_write_through(&machine);
    // The same after a swap.
    let other = socket.with_extension("other");
    let next = disk(&path, &other, debug);
    swap(&machine, &other).unwrap();
    machine.replace("disk0", next);
    is_write_through(&machine);
    // The driver never sees another value.
    let serial = machine.serial();
    assert!(!serial.contains("writeback is 1"), "{serial}");
    assert!(machine.control("stop").ok);
}

//! Swaps a disk to another process while a guest writes, reads and verifies it; and other
//! operations on an active disk that do not end its process. At the end the host checks the
//! image against the writes that the guest saw completed.

use std::time::{Duration, Instant};

use outrigger_protocol::control::{DeviceState, MachineEvent};
use outrigger_tests::chaos::guest::{Chaos, Prepared};
use outrigger_tests::chaos::victim::Victim;
use outrigger_tests::chaos::{Random, long};
use outrigger_tests::images::convert;
use outrigger_tests::machine::skip_kvm;
use outrigger_tests::scripted::{self, Answer};
use rustix::process::Signal;

/// Number of swaps.
fn swaps() -> usize {
    if long() { 100 } else { 30 }
}

/// The longest time between two swaps.
const MAX_INTERVAL: Duration = Duration::from_millis(30);

/// Lets the guest run for a random time.
fn run_guest(random: &mut Random) {
    std::thread::sleep(random.time(MAX_INTERVAL));
}

/// Prints the median and the maximum of `times`.
fn print_times(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!(
        "{what}: {} times, median {median:?}, worst {worst:?}",
        times.len()
    );
}

/// Swaps alternately between `victims`, of which the first serves the disk at the start.
fn swap_alternately(chaos: &Chaos, victims: &[Victim; 2], random: &mut Random) -> Vec<Duration> {
    (1..=swaps())
        .map(|round| {
            run_guest(random);
            let next = &victims[round % 2];
            let outage = chaos.swap(&next.socket());
            outage.unwrap_or_else(|error| panic!("swap {round}: {error}\n{}", chaos.situation()))
        })
        .collect()
}

/// Checks that the disk was never lost.
fn check_no_losses(chaos: &Chaos) {
    let losses = chaos.count(|event| matches!(event, MachineEvent::DeviceLost { .. }));
    assert_eq!(losses, 0, "{}", chaos.situation());
}

fn swap_between(queues: u16, second: fn(&std::path::Path, u16) -> Victim, what: &str) {
    if skip_kvm() {
        return;
    }
    let mut random = Random::announced();
    let prepared = Prepared::new(&mut random);
    let image = prepared.image();
    let victims = [Victim::device_disk(&image, queues), second(&image, queues)];
    let chaos = prepared.start("qdepth=16", &victims[0].device());
    let times = swap_alternately(&chaos, &victims, &mut random);
    check_no_losses(&chaos);
    let report = chaos.finish();
    print_times(what, times);
    println!("{}", report.summary());
}

#[test]
fn device_disk_is_swapped_with_four_queues() {
    swap_between(4, Victim::device_disk, "device-disk and device-disk");
}

#[test]
fn device_disk_is_swapped_with_one_queue() {
    swap_between(1, Victim::device_disk, "device-disk and device-disk");
}

#[test]
fn ours_and_qemu_storage_daemon_with_four_queues() {
    swap_between(
        4,
        Victim::storage_daemon,
        "device-disk and qemu-storage-daemon",
    );
}

#[test]
fn ours_and_qemu_storage_daemon_with_one_queue() {
    swap_between(
        1,
        Victim::storage_daemon,
        "device-disk and qemu-storage-daemon",
    );
}

/// Swaps from a raw image to its qcow2 copy and back, while the processes have both open. The
/// guest's requests wait only while the image is copied.
#[test]
fn a_disk_is_swapped_between_a_raw_image_and_its_qcow2_copy() {
    if skip_kvm() {
        return;
    }
    let mut random = Random::announced();
    let prepared = Prepared::new(&mut random);
    let raw = prepared.image();
    let copy = raw.with_file_name("copy");
    convert(("raw", &raw), ("qcow2", &copy));
    let victims = [
        Victim::device_disk(&raw, 4),
        Victim::device_disk_with(&copy, 4, &["--format", "qcow2"]),
    ];
    let images = [("raw", raw), ("qcow2", copy)];
    let mut chaos = prepared.start("qdepth=16", &victims[0].device());
    let rounds = if long() { 40 } else { 7 };
    for round in 1..=rounds {
        run_guest(&mut random);
        let (format, path) = &images[round % 2];
        chaos.order("pause");
        chaos.copy_to(format, path);
        chaos.swap(&victims[round % 2].socket()).unwrap();
        chaos.order("resume");
    }
    check_no_losses(&chaos);
    println!("{}", chaos.finish().summary());
}

/// The messages at which a process may die before it serves. Of those that are sent once for
/// each ring, the last are the hardest, because the other rings run already.
const POINTS: [&str; 12] = [
    "GET_FEATURES:1",
    "SET_OWNER:1",
    "GET_CONFIG:1",
    "SET_FEATURES:1",
    "GET_INFLIGHT_FD:1",
    "SET_MEM_TABLE:1",
    "SET_VRING_NUM:1",
    "SET_VRING_BASE:2",
    "SET_VRING_ADDR:3",
    "SET_VRING_KICK:4",
    "SET_VRING_ENABLE:1",
    "SET_VRING_ENABLE:4",
];

/// Whatever is wrong with the new process, the old one continues to serve.
#[test]
fn a_swap_to_an_incompatible_or_dying_process_changes_nothing() {
    if skip_kvm() {
        return;
    }
    let mut random = Random::announced();
    let prepared = Prepared::new(&mut random);
    let image = prepared.image();
    let victim = Victim::device_disk(&image, 4);
    let few = Victim::device_disk(&image, 2);
    let small = tempfile::NamedTempFile::new().unwrap();
    small.as_file().set_len(1 << 20).unwrap();
    let small = Victim::device_disk(small.path(), 4);
    let mut dying = Victim::faulty_disk(&image, 4, &[]);
    let silent = Victim::device_disk(&image, 4);
    silent.process().signal(Signal::STOP);
    let directory = tempfile::tempdir().unwrap();

    let chaos = prepared.start("qdepth=16", &victim.device());
    let (refusals, silences) = if long() { (100, 5) } else { (32, 1) };
    let mut slowest = Duration::ZERO;
    for round in 0..refusals {
        run_guest(&mut random);
        let (what, socket) = match round {
            _ if round < silences => ("silent", silent.socket()),
            _ if round % 8 == 1 => ("few", few.socket()),
            _ if round % 8 == 2 => ("small", small.socket()),
            _ if round % 8 == 3 => {
                // It offers almost no features.
                let socket = directory.path().join(format!("bare{round}"));
                scripted::serve(&socket, |_| Answer::Proper);
                ("features", socket)
            }
            _ => {
                dying.kill();
                let point = POINTS[random.below(POINTS.len() as u64) as usize];
                dying.start_at(point);
                (point, dying.socket())
            }
        };
        let asked = Instant::now();
        let refused = chaos.swap(&socket);
        assert!(refused.is_err(), "{round} {what}: {refused:?}");
        if what != "silent" {
            slowest = slowest.max(asked.elapsed());
        }
        assert_eq!(chaos.state(), DeviceState::Running, "{round} {what}");
    }
    chaos.wait("each refusal is told", |chaos| {
        chaos.count(|event| matches!(event, MachineEvent::DeviceSwapRefused { .. })) == refusals
    });
    check_no_losses(&chaos);
    assert!(victim.process().is_running());
    let report = chaos.finish();
    println!("{refusals} swaps refused, the slowest in {slowest:?} (but for silence)");
    println!("{}", report.summary());
}

/// Resets the machine repeatedly during I/O, and the driver resets the device. The process
/// continues.
#[test]
fn machine_and_device_resets_keep_the_device_process() {
    if skip_kvm() {
        return;
    }
    let mut random = Random::announced();
    let prepared = Prepared::new(&mut random);
    let victim = Victim::device_disk(&prepared.image(), 4);
    let chaos = prepared.start("rebind=400", &victim.device());
    let resets = if long() { 50 } else { 10 };
    for reset in 1..=resets {
        run_guest(&mut random);
        chaos.order("reset");
        chaos.wait("it is at work again", |chaos| {
            chaos.machine.serial().matches("disk-chaos: ready").count() > reset
        });
    }
    assert!(victim.process().is_running());
    check_no_losses(&chaos);
    std::thread::sleep(Duration::from_secs(1));
    let report = chaos.finish();
    assert!(report.rebinds > 0);
    println!("{resets} resets; at last {} rebinds", report.rebinds);
}

/// Pauses and swaps alternately: a swap of a paused machine succeeds, and the new process
/// serves once the machine is resumed.
#[test]
fn a_swap_of_a_paused_machine_takes_effect_on_resume() {
    if skip_kvm() {
        return;
    }
    let mut random = Random::announced();
    let prepared = Prepared::new(&mut random);
    let image = prepared.image();
    let victims = [
        Victim::device_disk(&image, 4),
        Victim::device_disk(&image, 4),
    ];
    let chaos = prepared.start("", &victims[0].device());
    for round in 1..=swaps() {
        run_guest(&mut random);
        chaos.order("pause");
        if round % 2 == 0 {
            chaos.swap(&victims[round / 2 % 2].socket()).unwrap();
        }
        assert_eq!(chaos.state(), DeviceState::Paused);
        chaos.order("resume");
    }
    check_no_losses(&chaos);
    println!("{}", chaos.finish().summary());
}

/// A stopped process (SIGSTOP) delays nothing for longer than its deadline. The guest's requests
/// are completed by it when it continues, or by its successor.
#[test]
fn a_stopped_process_continues_or_is_replaced_after_the_deadline() {
    if skip_kvm() {
        return;
    }
    let mut random = Random::announced();
    let prepared = Prepared::new(&mut random);
    let image = prepared.image();
    let mut victim = Victim::device_disk(&image, 4);
    let other = Victim::device_disk(&image, 4);
    // Without rebinds, because between two drivers the guest does not wait for the process.
    let chaos = prepared.start("deadline=60", &victim.device());
    // More than the deadline of one answer, but limited.
    let limit = Duration::from_secs(20);
    for command in ["pause", "reset", "swap"] {
        run_guest(&mut random);
        victim.process().signal(Signal::STOP);
        // Wait until requests are in flight.
        run_guest(&mut random);
        let asked = Instant::now();
        match command {
            "swap" => assert!(chaos.swap(&other.socket()).is_err()),
            // It could write to the memory of the guest that boots after the reset.
            "reset" => assert!(chaos.refused("reset").contains("is still there")),
            command => chaos.order(command),
        }
        println!("{command}: answered in {:?}", asked.elapsed());
        assert!(asked.elapsed() < limit, "{command}");
        if command == "pause" {
            let asked = Instant::now();
            chaos.order("resume");
            assert!(asked.elapsed() < limit);
        }
        let returns = chaos.returns();
        if command == "reset" {
            // It continues, notices that its connection was closed, and serves the reconnect.
            victim.process().signal(Signal::CONT);
        } else {
            victim.kill();
            victim.start();
        }
        chaos.wait("the disk is back", |chaos| chaos.returns() > returns);
    }
    run_guest(&mut random);
    println!("{}", chaos.finish().summary());
}

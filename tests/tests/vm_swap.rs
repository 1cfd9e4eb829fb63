//! One disk process in place of another while a guest writes, reads and verifies; and
//! whatever else is done to a disk at work that leaves its process alive. In the end the
//! host checks the image by what the guest was told.

use std::time::{Duration, Instant};

use outrigger_protocol::control::{DeviceState, MachineEvent};
use outrigger_tests::chaos::guest::{Chaos, Prepared};
use outrigger_tests::chaos::victim::Victim;
use outrigger_tests::chaos::{Random, long};
use outrigger_tests::images::convert;
use outrigger_tests::machine::skip_kvm;
use outrigger_tests::scripted::{self, Answer};
use rustix::process::Signal;

/// How often one process takes another's place.
fn swaps() -> usize {
    if long() { 100 } else { 30 }
}

/// Between two swaps the guest works for less than
const WORK: Duration = Duration::from_millis(30);

/// Lets the guest work for a moment.
fn work(random: &mut Random) {
    std::thread::sleep(random.time(WORK));
}

/// Prints median and worst of `times`.
fn say(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!(
        "{what}: {} times, median {median:?}, worst {worst:?}",
        times.len()
    );
}

/// Swaps to and fro between `victims`, of which the first is the one at work.
fn to_and_fro(chaos: &Chaos, victims: &[Victim; 2], random: &mut Random) -> Vec<Duration> {
    (1..=swaps())
        .map(|round| {
            work(random);
            let next = &victims[round % 2];
            let outage = chaos.swap(&next.socket());
            outage.unwrap_or_else(|error| panic!("swap {round}: {error}\n{}", chaos.situation()))
        })
        .collect()
}

/// The machine never lost its disk.
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
    let times = to_and_fro(&chaos, &victims, &mut random);
    check_no_losses(&chaos);
    let report = chaos.finish();
    say(what, times);
    println!("{}", report.summary());
}

#[test]
fn ours_and_ours_with_four_queues() {
    swap_between(4, Victim::device_disk, "device-disk and device-disk");
}

#[test]
fn ours_and_ours_with_one_queue() {
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

/// The disk moves from a raw image to a qcow2 copy and back, which processes have opened
/// long before. The guest's requests wait only while the image is copied.
#[test]
fn a_raw_image_and_its_qcow2_copy() {
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
        work(&mut random);
        let (format, path) = &images[round % 2];
        chaos.order("pause");
        chaos.copy_to(format, path);
        chaos.swap(&victims[round % 2].socket()).unwrap();
        chaos.order("resume");
    }
    check_no_losses(&chaos);
    println!("{}", chaos.finish().summary());
}

/// Messages at which a process may die before it is at work. Of those that come once a
/// ring the last are the hardest: the others run already.
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

/// Whatever is wrong with the newcomer, the old one goes on.
#[test]
fn who_does_not_suit_or_dies_on_the_way_leaves_the_old_one() {
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
        work(&mut random);
        let (what, socket) = match round {
            _ if round < silences => ("silent", silent.socket()),
            _ if round % 8 == 1 => ("few", few.socket()),
            _ if round % 8 == 2 => ("small", small.socket()),
            _ if round % 8 == 3 => {
                // It offers next to nothing.
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

/// The machine is reset again and again in the middle of I/O, and its driver resets the
/// device; the process stays.
#[test]
fn resets_of_machine_and_device_keep_the_process() {
    if skip_kvm() {
        return;
    }
    let mut random = Random::announced();
    let prepared = Prepared::new(&mut random);
    let victim = Victim::device_disk(&prepared.image(), 4);
    let chaos = prepared.start("rebind=400", &victim.device());
    let resets = if long() { 50 } else { 10 };
    for reset in 1..=resets {
        work(&mut random);
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

/// Pauses and swaps in turns: a swap of a paused machine is carried out, too, and begins
/// to work with it.
#[test]
fn a_paused_machine_goes_on_with_another_process() {
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
        work(&mut random);
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

/// A process that stands still (SIGSTOP) holds up nothing for longer than its deadline;
/// what the guest asked of it is done by it when it goes on, or by its successor.
#[test]
fn a_process_that_stands_still_is_waited_for_or_replaced() {
    if skip_kvm() {
        return;
    }
    let mut random = Random::announced();
    let prepared = Prepared::new(&mut random);
    let image = prepared.image();
    let mut victim = Victim::device_disk(&image, 4);
    let other = Victim::device_disk(&image, 4);
    // No rebinds: between two drivers nobody waits for the process.
    let chaos = prepared.start("deadline=60", &victim.device());
    // More than the deadline of one answer, and far from for ever.
    let limit = Duration::from_secs(20);
    for command in ["pause", "reset", "swap"] {
        work(&mut random);
        victim.process().signal(Signal::STOP);
        // Until its requests wait.
        work(&mut random);
        let asked = Instant::now();
        match command {
            "swap" => assert!(chaos.swap(&other.socket()).is_err()),
            // It could write into the memory of the guest that boots then.
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
            // It goes on, finds that it was given up, and takes its own place.
            victim.process().signal(Signal::CONT);
        } else {
            victim.kill();
            victim.start();
        }
        chaos.wait("the disk is back", |chaos| chaos.returns() > returns);
    }
    work(&mut random);
    println!("{}", chaos.finish().summary());
}

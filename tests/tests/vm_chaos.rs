//! A guest writes, reads and verifies its disk while the disk process is killed, at random
//! times and at fault points. At the end the host checks the image against the writes that
//! the guest saw completed. No request may be lost or executed twice with different data, and
//! the guest must see no error.
//!
//! Each run prints its seed; OUTRIGGER_SEED repeats a run. `./test.sh --long` kills more often.

use std::time::Duration;

use device_vhost_user::fault;
use outrigger_protocol::control::MachineEvent;
use outrigger_tests::chaos::guest::{Chaos, Prepared};
use outrigger_tests::chaos::victim::Victim;
use outrigger_tests::chaos::{Random, Report, long};
use outrigger_tests::linux;
use outrigger_tests::machine::{Running, skip_kvm};
use outrigger_tests::process::Launch;
use outrigger_tests::wait_until;

/// Number of kills in each test that kills device-disk.
fn kills() -> u64 {
    if long() { 500 } else { 25 }
}

/// The longest time between two kills.
const WORK: Duration = Duration::from_millis(30);
/// The longest time without a disk process.
const ABSENCE: Duration = Duration::from_millis(5);
/// The longest life of a successor that is killed during its set-up.
const HANDSHAKE: Duration = Duration::from_millis(3);

/// Kills `victim` until it has died `kills` times. Every third time, also kills its successor
/// during the set-up.
fn kill(chaos: &Chaos, victim: &mut Victim, random: &mut Random, kills: u64) {
    while victim.kills < kills {
        std::thread::sleep(random.time(WORK));
        let returns = chaos.returns();
        victim.kill();
        std::thread::sleep(random.time(ABSENCE));
        victim.start();
        if random.below(3) == 0 {
            std::thread::sleep(random.time(HANDSHAKE));
            victim.kill();
            victim.start();
        }
        chaos.wait("the disk is back", |chaos| chaos.returns() > returns);
    }
}

/// Checks the runner's events: no process was refused, and all tracked their requests.
fn check_events(chaos: &Chaos) -> (usize, u64) {
    let mut replays = 0;
    for event in chaos.events() {
        match event {
            MachineEvent::DeviceLost { tracked, .. } => assert!(tracked, "{}", chaos.situation()),
            MachineEvent::DeviceRunning { replayed, .. } => replays += replayed,
            _ => {}
        }
    }
    (chaos.returns(), replays)
}

fn print_result(name: &str, victim: &Victim, (returns, replays): (usize, u64), report: &Report) {
    println!(
        "{name}: {} kills, {returns} times back, {replays} requests replayed; {}",
        victim.kills,
        report.summary()
    );
}

fn device_disk(queues: u16, format: &'static str, options: &[&str]) {
    if skip_kvm() {
        return;
    }
    let mut random = Random::announced();
    let prepared = Prepared::formatted(&mut random, format);
    let options = [&["--format", format], options].concat();
    let mut victim = Victim::device_disk_with(&prepared.image(), queues, &options);
    let chaos = prepared.start("qdepth=16", &victim.device());
    kill(&chaos, &mut victim, &mut random, kills());
    let seen = check_events(&chaos);
    let report = chaos.finish();
    assert_eq!(report.queues, u64::from(queues));
    print_result(&format!("device-disk, {format}"), &victim, seen, &report);
}

#[test]
fn device_disk_dies_with_one_queue() {
    device_disk(1, "raw", &[]);
}

#[test]
fn device_disk_dies_with_four_queues() {
    device_disk(4, "raw", &["--poll-us", "50"]);
}

#[test]
fn device_disk_dies_with_o_direct() {
    device_disk(4, "raw", &["--cache", "none"]);
}

#[test]
fn device_disk_dies_with_a_qcow2_image_and_one_queue() {
    device_disk(1, "qcow2", &[]);
}

#[test]
fn device_disk_dies_with_a_qcow2_image_and_four_queues() {
    device_disk(4, "qcow2", &["--cache", "none"]);
}

#[test]
fn device_disk_dies_with_a_qcow_image() {
    device_disk(4, "qcow", &[]);
}

/// The driver resets the device every few hundred requests, with requests in flight, while the
/// process is killed as well.
#[test]
fn device_disk_dies_while_its_driver_resets_it() {
    if skip_kvm() {
        return;
    }
    let mut random = Random::announced();
    let prepared = Prepared::new(&mut random);
    let mut victim = Victim::device_disk(&prepared.image(), 4);
    let chaos = prepared.start("rebind=300", &victim.device());
    kill(&chaos, &mut victim, &mut random, kills() / 2);
    let report = chaos.finish();
    assert!(report.rebinds > 0);
    println!("{} kills, {} rebinds", victim.kills, report.rebinds);
}

/// The messages that the runner sends to the successor of a lost process.
const HANDSHAKE_POINTS: [&str; 16] = [
    "GET_FEATURES",
    "SET_OWNER",
    "GET_PROTOCOL_FEATURES",
    "SET_PROTOCOL_FEATURES",
    "GET_QUEUE_NUM",
    "GET_CONFIG",
    "SET_FEATURES",
    "SET_INFLIGHT_FD",
    "SET_MEM_TABLE",
    "SET_VRING_NUM",
    "SET_VRING_BASE",
    "SET_VRING_ADDR",
    "SET_VRING_CALL",
    "SET_VRING_KICK",
    "SET_VRING_ENABLE",
    "SET_BACKEND_REQ_FD",
];

/// The fault points between popping a request and completing it.
const WORK_POINTS: [&str; 6] = [
    "popped",
    "done",
    "written",
    "published",
    "cleared",
    "interrupt",
];

/// The process dies at every fault point of every kind, several times each.
fn points(queues: u16) {
    if skip_kvm() {
        return;
    }
    let mut random = Random::announced();
    let prepared = Prepared::new(&mut random);
    let mut victim = Victim::faulty_disk(&prepared.image(), queues, &[]);
    let chaos = prepared.start("qdepth=16", &victim.device());
    let rounds = if long() { 20 } else { 2 };
    let mut died = std::collections::BTreeMap::new();
    for _ in 0..rounds {
        for point in HANDSHAKE_POINTS.iter().chain(&WORK_POINTS) {
            let nth = match () {
                () if WORK_POINTS.contains(point) => 1 + random.below(60),
                // Each of these messages is sent once for each ring.
                () if point.starts_with("SET_VRING") => 1 + random.below(queues.into()),
                () => 1,
            };
            victim.kill();
            victim.start_at(&format!("{point}:{nth}"));
            if let Some(status) = victim.ends_within(Duration::from_secs(5)) {
                // It died at the fault point, and of no other cause.
                assert_eq!(status.code(), Some(fault::STATUS), "{point}:{nth}");
                *died.entry(*point).or_insert(0) += 1;
            }
            let returns = chaos.returns();
            victim.kill();
            victim.start();
            chaos.wait("the disk is back", |chaos| chaos.returns() > returns);
        }
    }
    let seen = check_events(&chaos);
    let report = chaos.finish();
    print_result("faulty-disk", &victim, seen, &report);
    println!("died at {died:?}");
    for point in HANDSHAKE_POINTS.iter().chain(&WORK_POINTS) {
        assert_eq!(died.get(point), Some(&rounds), "{point}");
    }
}

#[test]
fn a_disk_with_one_queue_dies_at_each_fault_point() {
    points(1);
}

#[test]
fn a_disk_with_four_queues_dies_at_each_fault_point() {
    points(4);
}

fn returns(machine: &Running) -> u64 {
    let back = |event: &&MachineEvent| matches!(event, MachineEvent::DeviceRunning { .. });
    machine.events().iter().filter(back).count() as u64
}

/// Linux with a journaling file system and fsync(2), on a disk with two queues.
#[test]
fn linux_writes_with_fsync_while_its_disk_dies() {
    if skip_kvm() {
        return;
    }
    const ROUNDS: u64 = 5;
    let mut random = Random::announced();
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(64 << 20).unwrap();
    let mut victim = Victim::device_disk(&image, 2);
    let job = format!("outrigger.job=cpus,disk,fsync outrigger.cpus=2 outrigger.rounds={ROUNDS}");
    let machine = linux::linux("vmlinux", &job)
        .args(["--cpus", "2", "--memory", "96M"])
        .args(victim.device())
        .lifetime(linux::PATIENCE)
        .start();
    linux::wait_serial(&machine, "STEP cpus: pass");
    // During the creation and first use of the file system, then in each round.
    let printed = (0..3).map(|_| "GUEST up".to_owned());
    for text in printed.chain((1..=ROUNDS).map(|round| format!("ROUND {round}"))) {
        linux::wait_serial(&machine, &text);
        std::thread::sleep(random.time(Duration::from_millis(1500)));
        victim.kill();
        std::thread::sleep(random.time(ABSENCE));
        victim.start();
        wait_until("the disk is back", || returns(&machine) == victim.kills);
    }
    linux::wait_end(&machine, 0);
    let serial = machine.serial();
    assert!(serial.contains("STEP fsync: pass"), "{serial}");
    for word in ["I/O error", "EXT4-fs error", "Buffer I/O"] {
        assert!(!serial.contains(word), "{serial}");
    }
    println!("{} kills", victim.kills);
    linux::check_image(&image);
}

/// Checks the guest's own verification with two faulty disks: one loses a completed write, and
/// one fails a write.
#[test]
fn the_guest_notices_a_lost_write_and_an_error() {
    if skip_kvm() {
        return;
    }
    let mut random = Random::announced();
    let prepared = Prepared::new(&mut random);
    let victim = Victim::device_disk(&prepared.image(), 2);
    let image = prepared.open();
    let chaos = prepared.start("", &victim.device());
    chaos.wait("the guest fails", |chaos| {
        image.write(0, &[0; 4096]);
        chaos.machine.serial().contains("FAIL")
    });
    assert_eq!(chaos.machine.wait(), 4);
    let serial = chaos.machine.serial();
    assert!(serial.contains("block 0: lost"), "{serial}");

    let prepared = Prepared::new(&mut random);
    let image = prepared.image();
    let victim = Victim::new(true, move |socket| {
        Launch::new("device-disk")
            .args(["--read-only", "--blk-file"])
            .args([&*image, "--socket-path".as_ref(), socket])
    });
    let chaos = prepared.start("", &victim.device());
    assert_eq!(chaos.machine.wait(), 4);
    let serial = chaos.machine.serial();
    assert!(serial.contains("I/O error: request of type 1"), "{serial}");
}

/// A back end of another project that tracks its in-flight requests. It executes the requests of
/// a queue one after the other, and reports more written bytes than it wrote.
#[test]
fn vhost_user_blk_of_qemu_dies() {
    if skip_kvm() {
        return;
    }
    let mut random = Random::announced();
    let prepared = Prepared::new(&mut random);
    let mut victim = Victim::vhost_user_blk(&prepared.image());
    let chaos = prepared.start("lengths=any", &victim.device());
    kill(&chaos, &mut victim, &mut random, kills() / 2);
    let seen = check_events(&chaos);
    let report = chaos.finish();
    print_result("vhost-user-blk", &victim, seen, &report);
}

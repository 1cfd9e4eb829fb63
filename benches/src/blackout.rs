//! The longest time without a completion that a guest sees when its disk's process is
//! swapped, or killed and restarted. The peer is QEMU with the same guest and device-disk, to
//! which it reconnects.

use std::path::Path;
use std::time::Duration;

use outrigger_protocol::control::MachineEvent;
use outrigger_tests::chaos::guest::{Prepared, READY};
use outrigger_tests::chaos::victim::Victim;
use outrigger_tests::chaos::{Random, Report, cycles, cycles_per_ms};
use outrigger_tests::machine::embedded_guest;
use outrigger_tests::process::Launch;
use outrigger_tests::wait_until;

/// How often each event happens: with 100, the 99th percentile is the second worst.
const TIMES: usize = 100;
/// Time from one event to the next.
const PAUSE: Duration = Duration::from_millis(200);
/// Shortest gap in milliseconds that the guest records; shorter ones count as this long.
const SHORTEST: f64 = 1.0;
/// The host learns of the guest's start from the serial port, up to this many milliseconds
/// late.
const LATE: f64 = 5.0;

/// Requests in flight: queues, and requests in each queue.
const DEPTHS: [(u16, u16); 2] = [(1, 1), (4, 8)];

/// Durations in milliseconds.
type Times = Vec<f64>;

pub fn run() {
    println!("                                            depth   median ms      p99 ms");
    for (queues, each) in DEPTHS {
        let depth = queues * each;
        let row = |name: &str, mut times: Times, target: &str| {
            times.sort_by(f64::total_cmp);
            let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
            let (median, p99) = (at(0.5), at(0.99));
            println!("{name:44} {depth:4} {median:11.2} {p99:11.2}{target}");
        };
        row("nothing happens", idle(queues, each), "");
        let (seen, told) = swaps(queues, each);
        row("outrigger, swap", seen, "    (target: at most 10)");
        row("  of it, no process on the rings", told, "");
        let (seen, told) = restarts(queues, each);
        row(
            "outrigger, SIGKILL and restart",
            seen,
            "    (target: at most 50)",
        );
        row("  of it, from loss to work", told, "");
        row("QEMU q35, SIGKILL and restart", qemu(queues, each), "");
    }
}

/// The guest's command line.
fn words(each: u16) -> String {
    let gap = (SHORTEST * cycles_per_ms()) as u64;
    format!("qdepth={each} gap={gap}")
}

/// Causes an event [`TIMES`] times; returns when.
fn again_and_again(mut action: impl FnMut(usize)) -> Vec<u64> {
    (1..=TIMES)
        .map(|time| {
            std::thread::sleep(PAUSE);
            let now = cycles();
            action(time);
            now
        })
        .collect()
}

/// The longest gap that the guest saw after each of `moments`, up to the next.
fn longest(report: &Report, begun: u64, moments: &[u64]) -> Times {
    let per_ms = cycles_per_ms();
    let at = |moment: &u64| (moment - begun) as f64 - LATE * per_ms;
    let ends = moments[1..].iter().map(at).chain([f64::INFINITY]);
    let windows = moments.iter().map(at).zip(ends);
    windows
        .map(|(from, to)| {
            let within = |end: u64| (from..to).contains(&(end as f64));
            let gaps = report.gaps.iter().filter(|gap| within(gap.end));
            let longest = gaps.map(|gap| gap.length).max();
            longest.map_or(SHORTEST, |gap| gap as f64 / per_ms)
        })
        .collect()
}

/// Without events: other load on this host.
fn idle(queues: u16, each: u16) -> Times {
    let prepared = Prepared::new(&mut Random::new(1));
    let victim = Victim::device_disk(&prepared.image(), queues);
    let chaos = prepared.start(&words(each), &victim.device());
    let begun = chaos.begun;
    let moments = again_and_again(|_| {});
    std::thread::sleep(PAUSE);
    longest(&chaos.finish(), begun, &moments)
}

/// Times that the guest sees, and that the runner reports.
fn swaps(queues: u16, each: u16) -> (Times, Times) {
    let prepared = Prepared::new(&mut Random::new(2));
    let image = prepared.image();
    let victims = [0; 2].map(|_| Victim::device_disk(&image, queues));
    let chaos = prepared.start(&words(each), &victims[0].device());
    let begun = chaos.begun;
    let mut told = Vec::new();
    let moments = again_and_again(|time| {
        let outage = chaos.swap(&victims[time % 2].socket());
        told.push(outage.expect("a swap").as_secs_f64() * 1e3);
    });
    std::thread::sleep(PAUSE);
    (longest(&chaos.finish(), begun, &moments), told)
}

/// Times that the guest sees, and that the runner reports.
fn restarts(queues: u16, each: u16) -> (Times, Times) {
    let prepared = Prepared::new(&mut Random::new(3));
    let mut victim = Victim::device_disk(&prepared.image(), queues);
    let chaos = prepared.start(&words(each), &victim.device());
    let begun = chaos.begun;
    let moments = again_and_again(|_| {
        victim.kill();
        victim.start();
    });
    std::thread::sleep(PAUSE);
    let told = chaos.events().iter().filter_map(outage).collect();
    (longest(&chaos.finish(), begun, &moments), told)
}

fn outage(event: &MachineEvent) -> Option<f64> {
    match event {
        MachineEvent::DeviceRunning { outage_us, .. } => Some(*outage_us as f64 / 1e3),
        _ => None,
    }
}

/// QEMU, which tries to reconnect as often as our runner.
fn qemu(queues: u16, each: u16) -> Times {
    let prepared = Prepared::new(&mut Random::new(4));
    let image = prepared.open();
    let mut victim = Victim::device_disk(&prepared.image(), queues);
    let launch = Launch::program(Path::new("qemu-system-x86_64"));
    let serial = launch.directory().join("serial");
    let chardev = format!(
        "socket,id=c,path={},reconnect-ms=2",
        victim.socket().display()
    );
    let process = launch
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-accel", "kvm"])
        .args(["-cpu", "max,-arch-capabilities", "-m", "64M"])
        .args(["-M", "q35,memory-backend=ram"])
        .args(["-object", "memory-backend-memfd,id=ram,size=64M,share=on"])
        .args(["-serial", &format!("file:{}", serial.display())])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .args(["-append", &prepared.cmdline(&words(each)), "-kernel"])
        .args([embedded_guest()])
        .args(["-chardev", &chardev, "-device"])
        .args([format!("vhost-user-blk-pci,chardev=c,num-queues={queues}")])
        .spawn();
    let said = |text: &str| {
        let serial = std::fs::read(&serial).unwrap_or_default();
        String::from_utf8_lossy(&serial).contains(text)
    };
    wait_until("the guest is ready", || {
        assert!(process.is_running(), "{}", process.log());
        said(READY)
    });
    let begun = cycles();
    let moments = again_and_again(|_| {
        victim.kill();
        victim.start();
    });
    std::thread::sleep(PAUSE);
    image.stop();
    let status = process.wait();
    assert!(status.success() && said("guest: pass"), "{status}");
    let report = image.check().expect("nothing is lost");
    longest(&report, begun, &moments)
}

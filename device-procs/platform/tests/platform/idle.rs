//! Processor time: none when idle.

use std::time::{Duration, Instant};

use outrigger_tests::wait_until;

use crate::machine::connected;

#[test]
fn an_idle_process_never_wakes() {
    let c = connected(1, &[]);
    c.machine.print(0, b"some work first");
    c.machine.wait(0);
    let switches = || c.process.status("", "voluntary_ctxt_switches");
    let before = |ticks: &mut (u64, String)| {
        std::thread::sleep(Duration::from_millis(100));
        let now = (c.process.ticks(), switches());
        std::mem::replace(ticks, now.clone()) == now
    };
    let mut seen = (0, String::new());
    wait_until("it sleeps", || before(&mut seen));
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!((c.process.ticks(), switches()), seen);
    // It wakes up again.
    assert_eq!(c.machine.read(0, 0x3fd, 1), 0x60);
}

/// Prints the figures without judging them, because machines differ.
#[test]
fn round_trips_are_measured() {
    let c = connected(1, &[]);
    let median = |rounds: usize, pause: Duration| {
        let mut times: Vec<Duration> = (0..rounds)
            .map(|_| {
                std::thread::sleep(pause);
                let start = Instant::now();
                assert_eq!(c.machine.read(0, 0x3fd, 1), 0x60);
                start.elapsed()
            })
            .collect();
        times.sort();
        times[rounds / 2]
    };
    let pause = Duration::from_millis(3);
    let awake = {
        let mut times: Vec<Duration> = Vec::new();
        for _ in 0..20_000 {
            let start = Instant::now();
            assert_eq!(c.machine.read(0, 0x3fd, 1), 0x60);
            times.push(start.elapsed());
        }
        times.sort();
        times[times.len() / 2]
    };
    let asleep = median(200, pause);
    println!(
        "trap round trip, median: {} ns awake, {} ns asleep",
        awake.as_nanos(),
        asleep.as_nanos()
    );
}

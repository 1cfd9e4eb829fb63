//! The runner takes no part in I/O: it is not woken for a request.

use std::path::Path;

use outrigger_tests::machine::{Machine, Running, skip_kvm};

/// Context switches of all threads of the runner since its start, as /proc counts them,
/// without the involuntary ones of vCPU threads: the guest runs in those.
fn switches(machine: &Running) -> u64 {
    let tasks = std::fs::read_dir(machine.runner.proc("task")).unwrap();
    let mut total = 0;
    for task in tasks {
        let path = task.unwrap().path();
        let status = read(&path.join("status"));
        let field = |name: &str| -> u64 {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        // Voluntary: the thread waited for something. A runner that took part in I/O would
        // wait for each request.
        total += field("voluntary_ctxt_switches");
        if !read(&path.join("comm")).starts_with("vcpu-") {
            total += field("nonvoluntary_ctxt_switches");
        }
    }
    total
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

/// Runs `count` requests; returns the context switches of the runner between the start of
/// the driver and its result.
fn run(count: u64) -> u64 {
    let machine = Machine::embedded(&format!("job=disk-io count={count}"))
        .args(["--memory", "64M"])
        .disk(64 << 20)
        .start();
    machine.wait_serial("disk-io: ready");
    let before = switches(&machine);
    machine.wait_serial("cycles each");
    switches(&machine) - before
}

#[test]
fn the_runner_is_not_woken_for_io() {
    if skip_kvm() {
        return;
    }
    let (few, many) = (run(1_000), run(10_000));
    eprintln!("context switches of the runner: {few} for 1,000 requests, {many} for 10,000");
    // For 9,000 more requests, the difference is noise, such as the port accesses for the
    // status line.
    assert!(
        many < few + 200,
        "{few} for 1,000 requests, {many} for 10,000"
    );
}

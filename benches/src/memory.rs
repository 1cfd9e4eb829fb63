//! What the processes of a machine weigh.

use outrigger_tests::binaries;
use outrigger_tests::machine::Machine;
use outrigger_tests::process::Process;

const KIB: u64 = 1024;
/// Reach for the private memory of each process.
const LIMIT: u64 = 2048 * KIB;

pub fn run() {
    let machine = Machine::embedded("job=main need=block,net,console end=idle")
        .args(["--memory", "64M"])
        .disk(64 << 20)
        .net()
        .console()
        .start();
    // All rings have been used, and nothing goes on.
    machine.wait_serial("idle");
    println!("process           private     threads  binary, stripped");
    for (name, process) in [
        ("vcpu-runner", &machine.runner),
        ("device-disk", machine.process("disk0")),
        ("device-net", machine.process("net0")),
        ("device-console", machine.process("console0")),
        ("device-platform", machine.process("platform")),
    ] {
        let private = private(process);
        println!(
            "{name:16} {:>6} KiB {:>8} {:>10} KiB   {}",
            private / KIB,
            process.status("", "Threads"),
            std::fs::metadata(binaries::binary(name))
                .expect("built")
                .len()
                / KIB,
            if private <= LIMIT {
                ""
            } else {
                "over 2048 KiB private"
            }
        );
    }
}

/// Private memory in bytes, without that of guest RAM, which is shared, and of
/// the programs' own files, which the page cache holds anyway.
fn private(process: &Process) -> u64 {
    let maps = std::fs::read_to_string(process.proc("smaps")).expect("smaps");
    let mut anonymous = 0;
    let mut is_ram = false;
    for line in maps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if first.contains('-') && !first.ends_with(':') {
            is_ram = line.contains("outrigger-ram");
        } else if first == "Private_Dirty:" && !is_ram {
            let value: u64 = line
                .split_whitespace()
                .nth(1)
                .and_then(|v| v.parse().ok())
                .unwrap_or(0);
            anonymous += value * KIB;
        }
    }
    anonymous
}

//! Memory of the processes of a machine.

use outrigger_tests::binaries;
use outrigger_tests::machine::Machine;
use outrigger_tests::process::Process;

const KIB: u64 = 1024;
/// Target for the private memory of each process.
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

/// Private memory in bytes: without guest RAM, and of mapped files only the pages that the
/// process has modified. (Pages of a file that was just written count as dirty until they are
/// on the disk; see proc_pid_smaps(5).)
fn private(process: &Process) -> u64 {
    let maps = std::fs::read_to_string(process.proc("smaps")).expect("smaps");
    let mut total = 0;
    let mut counted = "";
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            // Address, rights, offset, device, inode, path.
            let path = words.nth(4).unwrap_or_default();
            counted = match path {
                _ if path.starts_with("/memfd:outrigger-ram") => "",
                _ if path.starts_with('/') && !path.starts_with("/memfd:") => "Anonymous:",
                _ => "Private_Dirty:",
            };
        } else if first == counted {
            let value: u64 = words.next().and_then(|v| v.parse().ok()).unwrap_or(0);
            total += value * KIB;
        }
    }
    total
}

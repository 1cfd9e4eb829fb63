//! Time from exec until the Linux test guest's first program reports that it runs. Each machine has
//! a disk, a network card, a virtio console and a serial port.

use std::path::Path;
use std::time::Instant;

use outrigger_tests::linux::{linux, wait_end, wait_serial};
use outrigger_tests::qemu::{Board, Qemu};

use crate::median;

/// A boot takes seconds.
const ROUNDS: usize = 3;
const SAID: &str = "GUEST up";

pub fn run() {
    let disk = tempfile::NamedTempFile::new().expect("a file in the temporary directory");
    disk.as_file().set_len(64 << 20).expect("room in it");
    let (mut ours, mut microvm, mut q35) = (Vec::new(), Vec::new(), Vec::new());
    // In turns, so that all see the same noise.
    for _ in 0..ROUNDS {
        ours.push(outrigger());
        microvm.push(qemu(Board::Microvm, "device", disk.path()));
        q35.push(qemu(Board::Q35, "pci", disk.path()));
    }
    let [ours, microvm, q35] = [&mut ours, &mut microvm, &mut q35].map(|times| median(times));
    println!("outrigger, four device processes   {ours:>9.2} s");
    println!("QEMU microvm                       {microvm:>9.2} s");
    println!("QEMU q35                           {q35:>9.2} s");
    println!("ratio to microvm                   {:>9.3}", ours / microvm);
    println!(
        "ratio to q35                       {:>9.3}    (target: at most 0.5)",
        ours / q35
    );
}

fn outrigger() -> f64 {
    let machine = linux("vmlinux", "outrigger.job=")
        .args(["--memory", "128M"])
        .disk(64 << 20)
        .net()
        .console()
        .prepare();
    let start = Instant::now();
    let machine = machine.start();
    wait_serial(&machine, SAID);
    let time = start.elapsed().as_secs_f64();
    wait_end(&machine, 0);
    time
}

/// QEMU with devices of its own, which are called `virtio-…-BUS` on this machine type.
fn qemu(board: Board, bus: &str, disk: &Path) -> f64 {
    let drive = format!("if=none,id=d,format=raw,file={}", disk.display());
    let options = [
        ("-drive", drive),
        ("-device", format!("virtio-blk-{bus},drive=d")),
        ("-netdev", "user,id=n,restrict=on".to_owned()),
        ("-device", format!("virtio-net-{bus},netdev=n")),
        ("-device", format!("virtio-serial-{bus}")),
        ("-chardev", "null,id=c".to_owned()),
        ("-device", "virtconsole,chardev=c".to_owned()),
    ];
    let machine = Qemu::new(board, 1, 128, "outrigger.job=")
        .args(options.iter().flat_map(|(option, value)| [*option, value]));
    let start = Instant::now();
    let machine = machine.start();
    machine.wait_serial(SAID);
    start.elapsed().as_secs_f64()
}

//! exec → the Linux test guest's first program says that it runs. Each machine has
//! a disk, a network card, a virtio console and a serial port.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use outrigger_tests::linux::{PATIENCE, guest, linux, wait_end, wait_serial};

use crate::median;

/// A boot takes seconds.
const ROUNDS: usize = 3;
const SAID: &str = "GUEST up";
/// Stops when the guest is up.
const JOB: &str = "console=ttyS0 quiet outrigger.job=";

pub fn run() {
    let disk = tempfile::NamedTempFile::new().expect("a file in the temporary directory");
    disk.as_file().set_len(64 << 20).expect("room in it");
    let (mut ours, mut microvm, mut q35) = (Vec::new(), Vec::new(), Vec::new());
    // In turns, so that all see the same noise.
    for _ in 0..ROUNDS {
        ours.push(outrigger());
        let machine = "microvm,acpi=off,rtc=off,pit=off,pic=off,isa-serial=on";
        microvm.push(qemu(machine, "device", disk.path()));
        q35.push(qemu("q35", "pci", disk.path()));
    }
    let [ours, microvm, q35] = [&mut ours, &mut microvm, &mut q35].map(|times| median(times));
    println!("outrigger, four device processes   {ours:>9.2} s");
    println!("QEMU microvm                       {microvm:>9.2} s");
    println!("QEMU q35                           {q35:>9.2} s");
    println!("ratio to microvm                   {:>9.3}", ours / microvm);
    println!(
        "ratio to q35                       {:>9.3}    (reach: at most 0.5)",
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

/// A machine whose virtio devices are called `virtio-…-BUS`.
fn qemu(machine: &str, bus: &str, disk: &Path) -> f64 {
    let start = Instant::now();
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-M", machine, "-accel", "kvm", "-m", "128"])
        .args(["-cpu", "max,-arch-capabilities"])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-serial", "stdio"])
        .args(["-global", "virtio-mmio.force-legacy=false"])
        .arg("-drive")
        .arg(format!("if=none,id=d,format=raw,file={}", disk.display()))
        .args(["-device", &format!("virtio-blk-{bus},drive=d")])
        .args(["-netdev", "user,id=n,restrict=on"])
        .args(["-device", &format!("virtio-net-{bus},netdev=n")])
        .args(["-device", &format!("virtio-serial-{bus}")])
        .args(["-chardev", "null,id=c", "-device", "virtconsole,chardev=c"])
        .args(["-append", JOB, "-kernel"])
        .arg(guest("vmlinux"))
        .arg("-initrd")
        .arg(guest("initramfs.cpio"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu-system-x86_64");
    let output = BufReader::new(qemu.stdout.take().expect("piped"));
    // Ends with QEMU, at the latest when the guest is through.
    let said = output
        .lines()
        .map_while(Result::ok)
        .any(|line| line.contains(SAID));
    let time = start.elapsed();
    // Ours, by its own handle; microvm without ACPI cannot power off.
    let _ = qemu.kill();
    let _ = qemu.wait();
    assert!(said, "{machine}: the guest did not come up");
    assert!(time < PATIENCE, "{machine} took {time:?}");
    Duration::as_secs_f64(&time)
}

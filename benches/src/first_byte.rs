//! Time from exec to the first byte that the guest writes.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use outrigger_tests::machine::{Machine, embedded_guest};

use crate::{ROUNDS, median};

const CMDLINE: &str = "job=first-byte";

pub fn run() {
    let (mut ours, mut qemu) = (Vec::new(), Vec::new());
    let mut missing = None;
    // In turns, so that both see the same noise.
    for _ in 0..ROUNDS {
        ours.push(outrigger());
        match missing {
            Some(_) => {}
            None => match microvm() {
                Ok(time) => qemu.push(time),
                Err(why) => missing = Some(why),
            },
        }
    }
    let ours = median(&mut ours);
    println!("outrigger, four device processes   {:>9.2} ms", ms(ours));
    match missing {
        Some(why) => println!("QEMU microvm                       missing: {why}"),
        None => {
            let qemu = median(&mut qemu);
            println!("QEMU microvm                       {:>9.2} ms", ms(qemu));
            println!(
                "ratio                              {:>9.3}    (target: at most 0.1)",
                ms(ours) / ms(qemu)
            );
        }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn outrigger() -> Duration {
    let machine = Machine::embedded(CMDLINE)
        .args(["--memory", "64M"])
        .disk(1 << 20)
        .net()
        .console();
    let machine = machine.prepare();
    let serial = machine.serial_path();
    let start = Instant::now();
    let machine = machine.start();
    // The file is on tmpfs or in the page cache; looking costs microseconds.
    while std::fs::metadata(&serial).map_or(0, |m| m.len()) == 0 {
        assert!(start.elapsed() < Duration::from_secs(30), "no byte came");
        std::thread::sleep(Duration::from_micros(20));
    }
    let time = start.elapsed();
    machine.expect(0);
    time
}

fn microvm() -> Result<Duration, String> {
    let start = Instant::now();
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-M",
            "microvm,acpi=off,rtc=off,pit=off,pic=off,isa-serial=on",
        ])
        .args([
            "-accel",
            "kvm",
            "-cpu",
            "max,-arch-capabilities",
            "-m",
            "64",
        ])
        .args(["-bios", "qboot.rom", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-no-reboot", "-serial", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .args(["-append", CMDLINE, "-kernel"])
        .arg(embedded_guest())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("qemu-system-x86_64: {e}"))?;
    let mut byte = [0];
    let mut output = qemu.stdout.take().expect("piped");
    let got = output.read(&mut byte).map_err(|e| e.to_string())?;
    let time = start.elapsed();
    // Ours, by its own handle; microvm without ACPI cannot power off.
    let _ = qemu.kill();
    let log = qemu.wait_with_output().map_err(|e| e.to_string())?;
    if got == 0 {
        let text = String::from_utf8_lossy(&log.stderr).into_owned();
        return Err(text.lines().next().unwrap_or("it said nothing").to_owned());
    }
    Ok(time)
}

//! A Linux guest whose disk, network, console and platform are one process each.
//! `tests/guest/build.sh` builds the guest; `test.sh` sets OUTRIGGER_LINUX_GUEST to its
//! directory.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use outrigger_tests::linux::{
    PATIENCE, check_image, guest, linux, net_parameters, serve_in_namespace, wait_end, wait_serial,
};
use outrigger_tests::machine::{Machine, Running, skip_kvm};
use outrigger_tests::wait_until;

/// Reads from the console's socket until `text` has arrived.
fn read_until(machine: &Running, stream: &mut UnixStream, seen: &mut String, text: &str) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = [0; 512];
    while !seen.contains(text) {
        let count = stream.read(&mut buffer).unwrap();
        let serial = machine.serial();
        assert!(
            count > 0,
            "the console closed; seen: {seen}\nserial: {serial}"
        );
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
}

#[test]
fn linux_with_two_cpus_uses_all_four_device_processes() {
    if skip_kvm() {
        return;
    }
    let machine = linux("vmlinux", "").disk(64 << 20).net().console();
    let port = serve_in_namespace(machine.process("net0").pid());
    let job = format!(
        "outrigger.job=cpus,disk,net,console outrigger.cpus=2 outrigger.lines=3 {}",
        net_parameters(port)
    );
    let machine = machine
        .cmdline(&job)
        .args(["--cpus", "2", "--memory", "256M"])
        .start();

    let console = machine.directory().join("console");
    wait_until("the console's socket exists", || console.exists());
    let mut stream = UnixStream::connect(console).unwrap();
    wait_serial(&machine, "STEP net: pass");
    let mut seen = String::new();
    read_until(&machine, &mut stream, &mut seen, "CONSOLE ready");
    for word in ["hello", "caf\u{e9}", "end"] {
        writeln!(stream, "{word}").unwrap();
        if word != "end" {
            read_until(&machine, &mut stream, &mut seen, &format!("ECHO {word}"));
        }
    }
    wait_end(&machine, 0);
    let serial = machine.serial();
    for step in ["cpus", "disk", "net", "console"] {
        assert!(serial.contains(&format!("STEP {step}: pass")), "{serial}");
    }
    assert!(serial.contains("GUEST pass"), "{serial}");
    check_image(&machine.directory().join("disk.img"));
}

#[test]
fn linux_boots_while_the_platform_is_killed() {
    if skip_kvm() {
        return;
    }
    let mut machine = linux("vmlinux", "outrigger.job=serial")
        .args(["--memory", "128M"])
        .start();
    // While the kernel boots, then while the guest prints.
    std::thread::sleep(Duration::from_millis(700));
    machine.replace_platform();
    for text in ["SERIAL 020", "SERIAL 100", "SERIAL 150"] {
        wait_serial(&machine, text);
        machine.replace_platform();
    }
    wait_end(&machine, 0);
    let serial = machine.serial();
    let got: Vec<&str> = serial
        .lines()
        .filter(|line| line.starts_with("SERIAL "))
        .map(str::trim_end)
        .collect();
    let expected: Vec<String> = (1..=200)
        .map(|n| format!("SERIAL {n:03} the quick brown fox"))
        .collect();
    assert_eq!(got, expected);
}

#[test]
fn a_reboot_keeps_the_contents_of_the_disk() {
    if skip_kvm() {
        return;
    }
    let machine = linux("vmlinux", "outrigger.job=reboot-once")
        .args(["--memory", "128M"])
        .disk(1 << 20)
        .start();
    wait_end(&machine, 0);
    assert!(
        machine.serial().contains("GUEST pass"),
        "{}",
        machine.serial()
    );
    assert_eq!(machine.serial().matches("GUEST up").count(), 2);
}

#[test]
fn linux_boots_from_a_bzimage() {
    if skip_kvm() {
        return;
    }
    let machine = linux("bzImage", "outrigger.job=cpus outrigger.cpus=1")
        .args(["--memory", "128M"])
        .start();
    wait_end(&machine, 0);
    assert!(
        machine.serial().contains("GUEST pass"),
        "{}",
        machine.serial()
    );
}

/// Writes a copy of the kernel without the note of its PVH entry point (Xen ELF note 18).
fn without_pvh_note(kernel: &Path, copy: &Path) {
    const NAME: &[u8] = b"Xen\0";
    let mut bytes = std::fs::read(kernel).unwrap();
    let note = |name_at: usize, bytes: &[u8]| {
        // The header of a note precedes its name: name size, value size, type.
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        name_at >= 12 && word(name_at - 12) == 4 && word(name_at - 4) == 18
    };
    let found: Vec<usize> = (0..bytes.len() - NAME.len())
        .filter(|&at| bytes[at..].starts_with(NAME) && note(at, &bytes))
        .collect();
    assert_eq!(found.len(), 1, "notes with a PVH entry point");
    bytes[found[0] - 4] = 0xff;
    std::fs::write(copy, bytes).unwrap();
}

/// The older boot protocol and the older interrupts.
#[test]
fn linux_boots_by_the_64_bit_protocol_and_uses_its_disk_by_intx() {
    if skip_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("vmlinux");
    without_pvh_note(&guest("vmlinux"), &kernel);
    let initrd = guest("initramfs.cpio").display().to_string();
    let machine = Machine::new(&kernel, "console=ttyS0 quiet pci=nomsi outrigger.job=disk")
        .args(["--initrd", &initrd, "--memory", "128M"])
        .disk(64 << 20)
        .start();
    wait_end(&machine, 0);
    assert!(
        machine.serial().contains("STEP disk: pass"),
        "{}",
        machine.serial()
    );
    check_image(&machine.directory().join("disk.img"));
}

#[test]
fn a_kernel_panic_resets_the_machine() {
    if skip_kvm() {
        return;
    }
    let machine = linux("vmlinux", "outrigger.job=crash")
        .args(["--memory", "128M", "--on-reset", "exit"])
        .start();
    // Without a panic device the kernel resets the machine (panic=-1).
    wait_end(&machine, 3);
}

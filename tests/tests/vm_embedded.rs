//! The embedded guest with real device processes.

use outrigger_protocol::control::MachineEvent;
use outrigger_tests::loops::Loop;
use outrigger_tests::machine::{Machine, skip_kvm};

const MIB: u64 = 1 << 20;

#[test]
fn the_main_job_uses_disk_net_and_console() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=main need=block,net,console")
        .args(["--memory", "64M"])
        .disk(64 * MIB)
        .net()
        .console()
        .start();
    machine.expect(0);
    let serial = machine.serial();
    assert!(serial.contains("guest: pass"), "{serial}");
    for device in ["disk 00:01", "net 00:02", "console 00:03"] {
        assert!(serial.contains(device), "{device} is missing: {serial}");
    }
    for id in ["disk0", "net0", "console0"] {
        machine.wait_event(
            "driver-ok",
            |event| matches!(event, MachineEvent::DriverOk { id: got, .. } if got == id),
        );
    }
    // What the guest wrote is in the image.
    let image = std::fs::read(machine.directory().join("disk.img")).unwrap();
    assert!(image[..4096].iter().any(|&b| b != 0));
    let last = &image[image.len() - 512..];
    assert!(last.iter().any(|&b| b != 0), "the last sector");
}

/// Whether this host has less than `mib` MiB of memory, including swap. Prints that.
fn skip_memory(mib: u64) -> bool {
    let info = rustix::system::sysinfo();
    let host = (info.totalram + info.totalswap) * u64::from(info.mem_unit) / MIB;
    if host < mib {
        eprintln!("skipped: this host has {host} MiB of memory, and the guest takes {mib}");
    }
    host < mib
}

fn ram(memory: &str, mib: u64) {
    if skip_kvm() || skip_memory(mib) {
        return;
    }
    let machine = Machine::embedded(&format!("job=ram expect-mib={mib}"))
        .args(["--memory", memory])
        .start();
    machine.expect(0);
    assert!(machine.serial().contains("MiB ok"), "{}", machine.serial());
}

#[test]
fn ram_of_64_mib_is_usable_at_both_ends() {
    ram("64M", 64);
}

#[test]
fn ram_of_6_gib_is_usable_below_and_above_the_hole() {
    ram("6G", 6144);
}

#[test]
fn ram_with_transparent_huge_pages() {
    ram("256M,hugepages=thp", 256);
}

#[test]
fn a_block_device_of_the_host_is_a_disk() {
    if skip_kvm() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(16 * MIB).unwrap();
    let Some(device) = Loop::new(file.path()) else {
        return;
    };
    let machine = Machine::embedded("job=main need=block")
        .args(["--memory", "64M"])
        .device(
            "disk0",
            "block",
            "device-disk",
            ["--blk-file", device.path()],
        )
        .start();
    machine.expect(0);
    let serial = machine.serial();
    assert!(
        serial.contains(&format!("{} sectors", 16 * MIB / 512)),
        "{serial}"
    );
    drop(machine);
    drop(device);
    let image = std::fs::read(file.path()).unwrap();
    assert!(
        image[..4096].iter().any(|&b| b != 0),
        "the guest's data is on it"
    );
}

/// Huge pages that are reserved on the host until this is dropped.
struct HugePages(String);

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    /// `None` when the host has none free, or does not let this user reserve any.
    fn reserve(count: u64) -> Option<Self> {
        let before = std::fs::read_to_string(POOL).ok()?;
        let had: u64 = before.trim().parse().ok()?;
        std::fs::write(POOL, (had + count).to_string()).ok()?;
        let reserved = HugePages(before);
        let now: u64 = std::fs::read_to_string(POOL).ok()?.trim().parse().ok()?;
        (now >= had + count).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(POOL, self.0.trim());
    }
}

#[test]
fn ram_of_huge_pages() {
    if skip_kvm() {
        return;
    }
    let Some(_pages) = HugePages::reserve(64) else {
        eprintln!("skipped: this host gives no huge pages");
        return;
    };
    ram("128M,hugepages=2M", 128);
}

#[test]
fn sixty_four_vcpus_start() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=ram").args(["--cpus", "64"]).start();
    machine.expect(0);
    let threads = machine.events();
    assert!(
        threads.contains(&MachineEvent::Started { vcpus: 64 }),
        "{threads:?}"
    );
}

#[test]
fn ram_is_sealed_shared_and_allocated_on_first_access() {
    if skip_kvm() || skip_memory(4096) {
        return;
    }
    let machine = Machine::embedded("job=idle")
        .args(["--memory", "4G"])
        .disk(MIB)
        .start();
    machine.wait_serial("idle");
    // 4 GiB are mapped; only the pages that the guest or the runner accessed are resident.
    let resident = machine.runner.resident();
    assert!(resident < 64 * MIB, "{resident} bytes resident");
    let fds = std::fs::read_dir(machine.runner.proc("fd")).unwrap();
    let ram: Vec<_> = fds
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            std::fs::read_link(path)
                .is_ok_and(|target| target.to_string_lossy().contains("outrigger-ram"))
        })
        .collect();
    assert_eq!(ram.len(), 2, "below and above the hole");
    for path in ram {
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        assert!(file.set_len(4096).is_err(), "the file can be shrunk");
    }
}

#[test]
fn the_exit_port_gives_the_exit_code() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=fail code=9").start();
    machine.expect(4);
    machine.wait_event("guest-exit", |event| {
        *event == MachineEvent::GuestExit { code: 9 }
    });
}

#[test]
fn a_triple_fault_prints_registers_and_ends_with_code_4() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=reset how=triple").start();
    machine.expect(4);
    assert!(
        machine
            .runner
            .log()
            .contains("vCPU 0: triple fault\n  rax "),
        "{}",
        machine.runner.log()
    );
}

#[test]
fn both_reset_registers_reset() {
    if skip_kvm() {
        return;
    }
    for how in ["i8042", "cf9"] {
        let machine = Machine::embedded(&format!("job=reset how={how}"))
            .args(["--on-reset", "exit"])
            .start();
        machine.expect(3);
    }
}

#[test]
fn a_guest_can_reset_the_machine_many_times() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=reset how=i8042").disk(MIB).start();
    outrigger_tests::wait_until("20 resets", || {
        machine.serial().matches("boot").count() >= 20
    });
    let status = machine.control("status").status.unwrap();
    assert!(status.resets >= 19, "{status:?}");
    assert!(machine.control("stop").ok);
    machine.expect(0);
}

#[test]
fn a_device_can_be_reset_during_io_and_set_up_again() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=reset-reinit count=20")
        .args(["--memory", "64M"])
        .disk(64 * MIB)
        .start();
    machine.passes();
}

#[test]
fn vrings_outside_memory_make_the_device_need_a_reset() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=bad-rings")
        .args(["--memory", "64M"])
        .disk(64 * MIB)
        .start();
    machine.expect(0);
    let serial = machine.serial();
    assert_eq!(serial.matches("needs a reset").count(), 3, "{serial}");
    assert!(serial.contains("guest: pass"), "{serial}");
    assert!(
        machine.process("disk0").is_running(),
        "the process is the same"
    );
}

#[test]
fn unclaimed_addresses_read_as_ones() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=ports").disk(MIB).start();
    machine.expect(0);
    let serial = machine.serial();
    assert!(serial.contains("0x500 reads 0xff"), "{serial}");
    assert!(serial.contains("switched off 0xffffffff"), "{serial}");
}

#[test]
fn the_rtc_has_the_time_of_the_host() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=rtc").start();
    machine.expect(0);
    let now = std::process::Command::new("date")
        .args(["-u", "+%Y-%m-%d"])
        .output()
        .unwrap();
    let today = String::from_utf8(now.stdout).unwrap();
    assert!(
        machine.serial().contains(today.trim()),
        "{}",
        machine.serial()
    );
}

#[test]
fn thirty_two_devices_are_found() {
    if skip_kvm() {
        return;
    }
    let mut machine = Machine::embedded("job=main").args(["--memory", "128M"]);
    let image = machine.disk_path();
    std::fs::File::create(&image).unwrap().set_len(MIB).unwrap();
    for index in 0..32 {
        let arguments = [
            "--blk-file".as_ref(),
            image.as_os_str(),
            "--read-only".as_ref(),
        ];
        machine = machine.device(&format!("d{index}"), "block", "device-disk", arguments);
    }
    let machine = machine.start();
    machine.wait_event(
        "the last device's driver",
        |event| matches!(event, MachineEvent::DriverOk { id, .. } if id == "d31"),
    );
    machine.expect(0);
    let serial = machine.serial();
    let found = serial
        .lines()
        .filter(|line| line.starts_with("disk "))
        .count();
    assert_eq!(found, 32, "{serial}");
}

#[test]
fn a_machine_without_platform_runs() {
    if skip_kvm() {
        return;
    }
    // There is no serial port and no power-off; DRIVER_OK shows that the guest runs.
    let machine = Machine::embedded("job=main")
        .without_platform()
        .disk(64 * MIB)
        .start();
    machine.wait_event("driver-ok", |event| {
        matches!(event, MachineEvent::DriverOk { .. })
    });
    assert!(machine.control("stop").ok);
    machine.expect(0);
}

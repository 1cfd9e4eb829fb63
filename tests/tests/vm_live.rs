//! Grows and flushes disks of a running machine, and reads their statistics, with `outrigger
//! ctl`.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use outrigger_protocol::device::DeviceStats;
use outrigger_tests::launcher::Launcher;
use outrigger_tests::linux::{PATIENCE, guest};
use outrigger_tests::machine::{embedded_guest, skip_kvm};
use outrigger_tests::process::Launch;
use outrigger_tests::wait_until;
use rustix::process::Signal;

const MIB: u64 = 1 << 20;

fn launch(kernel: &str, cmdline: &str, more: &[&str]) -> Launcher {
    let directory = tempfile::tempdir().unwrap();
    for name in ["disk.img", "other.img"] {
        let image = File::create(directory.path().join(name)).unwrap();
        image.set_len(64 * MIB).unwrap();
    }
    let mut arguments = vec!["run", "--kernel", kernel, "--cmdline", cmdline];
    arguments.extend(["--serial", "file,path=serial", "--control", "control"]);
    arguments.extend(more);
    Launcher::start_in(directory, &arguments)
}

/// Starts a guest that writes to its disk until it is stopped.
fn busy(more: &[&str]) -> Launcher {
    let kernel = embedded_guest().display().to_string();
    let mut all = vec!["--memory", "64M", "--disk", "path=disk.img,queues=4"];
    all.extend(more);
    let launcher = launch(&kernel, "job=disk-chaos count=0", &all);
    launcher.wait_file("serial", "disk-chaos: ready");
    launcher
}

fn stats(launcher: &Launcher) -> BTreeMap<String, DeviceStats> {
    serde_json::from_str(&launcher.do_ctl(&["stats", "--json"])).unwrap()
}

/// Returns the number of requests that a disk process has completed.
fn requests(launcher: &Launcher, disk: &str) -> u64 {
    let queues = &stats(launcher)[disk].queues;
    queues.iter().map(|queue| queue.latency.samples).sum()
}

fn size(launcher: &Launcher, name: &str) -> u64 {
    let path = launcher.directory().join(name);
    std::fs::metadata(path).unwrap().len()
}

/// Checks that `ctl` refuses a command, with one line on stderr.
fn expect_refused(launcher: &Launcher, arguments: &[&str], code: i32, part: &str) {
    let (got, printed, error) = launcher.ctl(arguments);
    assert_eq!(
        (got, printed.as_str()),
        (code, ""),
        "{arguments:?}: {error}"
    );
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(
        error.contains(part),
        "{arguments:?}: no {part:?} in: {error}"
    );
}

/// Linux gets the notification, reads the new size, and uses the new sectors.
#[test]
fn linux_uses_the_new_size_of_a_grown_disk() {
    if skip_kvm() {
        return;
    }
    let kernel = guest("vmlinux").display().to_string();
    let initrd = guest("initramfs-small.cpio").display().to_string();
    let cmdline = "console=ttyS0 quiet outrigger.job=grow outrigger.kib=98304";
    let more = [
        "--initrd",
        &initrd,
        "--memory",
        "128M",
        "--disk",
        "path=disk.img",
    ];
    let mut launcher = launch(&kernel, cmdline, &more);
    let start = Instant::now();
    let serial = launcher.directory().join("serial");
    while !std::fs::read_to_string(&serial).is_ok_and(|printed| printed.contains("GROW ready")) {
        assert!(start.elapsed() < PATIENCE, "{}", launcher.read("stderr"));
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let printed = launcher.do_ctl(&["resize", "disk0", "96M"]);
    assert_eq!(printed, "the guest sees 100663296 bytes\n");
    assert_eq!(launcher.wait(), 0, "{}", launcher.read("serial"));
    let serial = launcher.read("serial");
    assert!(serial.contains("STEP grow: pass"), "{serial}");
    assert_eq!(size(&launcher, "disk.img"), 96 * MIB);
    let image = File::open(launcher.directory().join("disk.img")).unwrap();
    let mut last = [0; 4096];
    image.read_exact_at(&mut last, 96 * MIB - 4096).unwrap();
    assert!(last.starts_with(b"#!/bin/busybox sh\n"));
    launcher.expect_no_process_left();
}

/// Also after a restart and a kill of the disk process.
#[test]
fn a_busy_disk_is_grown_flushed_and_measured_across_processes() {
    if skip_kvm() {
        return;
    }
    let mut launcher = busy(&["--disk", "path=other.img"]);
    for mib in [65, 66] {
        launcher.do_ctl(&["resize", "disk0", &format!("{mib}M")]);
        assert_eq!(size(&launcher, "disk.img"), mib * MIB);
    }
    launcher.do_ctl(&["flush", "disk0"]);
    let before = requests(&launcher, "disk0");
    wait_until("requests are counted", || {
        requests(&launcher, "disk0") > before
    });
    let all = stats(&launcher);
    let ids: Vec<&String> = all.keys().collect();
    assert_eq!(ids, ["disk0", "disk1"]);
    assert_eq!(
        (all["disk0"].queues.len(), all["disk1"].queues.len()),
        (4, 1)
    );
    for queue in &all["disk0"].queues {
        let kinds = queue.requests.by_type();
        let counted: u64 = kinds.iter().map(|(_, count)| count.count).sum();
        assert_eq!(counted, queue.latency.samples);
        assert!(
            kinds.iter().all(|(_, count)| count.errors == 0),
            "{kinds:?}"
        );
        assert!(queue.cpu_us.is_some());
    }
    let table = launcher.do_ctl(&["stats", "disk0"]);
    assert!(
        table.contains("P99.9") && !table.contains("disk1"),
        "{table}"
    );

    // Its successors have the new size and accept the same commands.
    launcher.do_ctl(&["restart", "disk0"]);
    launcher.do_ctl(&["resize", "disk0", "70M"]);
    let old = launcher.signal("device-disk", Signal::KILL);
    launcher.wait_successor("device-disk", old);
    wait_until("both disks answer", || launcher.ctl(&["stats"]).0 == 0);
    launcher.do_ctl(&["resize", "disk0", "71M"]);
    launcher.do_ctl(&["swap", "disk0", "path=disk.img,queues=4"]);
    let before = requests(&launcher, "disk0");
    wait_until("requests complete", || {
        requests(&launcher, "disk0") > before
    });
    assert_eq!(
        launcher.do_ctl(&["resize", "disk0"]),
        format!("the guest sees {} bytes\n", 71 * MIB)
    );
    launcher.do_ctl(&["stop"]);
    assert_eq!(launcher.wait(), 0, "{}", launcher.read("stderr"));
    launcher.expect_no_process_left();
}

#[test]
fn invalid_disk_commands_are_refused_and_change_nothing() {
    if skip_kvm() {
        return;
    }
    let mut launcher = busy(&["--net", "isolated"]);
    expect_refused(&launcher, &["resize", "disk0", "63M"], 1, "disk0: ");
    expect_refused(&launcher, &["resize", "disk0", "67108865"], 1, "multiple");
    expect_refused(&launcher, &["resize", "disk0", "64MB"], 2, "such as 512M");
    expect_refused(&launcher, &["resize", "disk0", "+1G"], 2, "such as 512M");
    expect_refused(&launcher, &["resize", "disk7", "65M"], 1, "no such device");
    expect_refused(&launcher, &["flush", "net0"], 1, "only disks");
    expect_refused(&launcher, &["stats", "platform"], 1, "only disks");
    assert_eq!(size(&launcher, "disk.img"), 64 * MIB);
    // The launcher cannot send commands to a process that it did not start.
    let image = launcher.directory().join("disk.img");
    let other = Launch::new("device-disk")
        .args(["--queues", "4", "--lock", "off", "--blk-file"])
        .args([&image])
        .listening();
    let socket = other.directory().join("socket");
    launcher.do_ctl(&["swap", "disk0", &format!("socket={}", socket.display())]);
    for arguments in [
        &["stats"][..],
        &["flush", "disk0"],
        &["resize", "disk0", "65M"],
    ] {
        expect_refused(
            &launcher,
            arguments,
            1,
            "the launcher did not start its process",
        );
    }
    launcher.do_ctl(&["swap", "disk0", "path=disk.img,queues=4,lock=off"]);
    launcher.do_ctl(&["flush", "disk0"]);
    // The runner alone does not have the disk commands.
    let runner = std::fs::read_dir(launcher.directory())
        .unwrap()
        .find_map(|entry| {
            let path = entry.unwrap().path().join("control");
            path.exists().then_some(path)
        });
    let runner = runner.unwrap().display().to_string();
    let (code, _, error) = launcher.ctl_at(&runner, &["flush", "disk0"]);
    assert!(
        code == 1 && error.contains("the disk's own control socket"),
        "{error}"
    );
    launcher.do_ctl(&["stop"]);
    assert_eq!(launcher.wait(), 0, "{}", launcher.read("stderr"));
    launcher.expect_no_process_left();
}

fn qemu_img(launcher_directory: &std::path::Path, arguments: &[&str]) {
    let mut command = std::process::Command::new("qemu-img");
    let output = command
        .args(arguments)
        .current_dir(launcher_directory)
        .output();
    let output = output.expect("./test.sh installs qemu-utils");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
}

/// The options in a disk's description reach its process, which inherits the open image. A
/// backing file is found relative to the image.
#[test]
fn a_disk_process_gets_every_option_of_its_description() {
    if skip_kvm() {
        return;
    }
    let kernel = embedded_guest().display().to_string();
    let start = |disk: &str| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        qemu_img(path, &["create", "-q", "-f", "qcow2", "base", "64M"]);
        let backed = [
            "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top",
        ];
        qemu_img(path, &backed);
        let cmdline = "job=disk-chaos count=0";
        let mut arguments = vec!["run", "--kernel", &kernel, "--cmdline", cmdline];
        arguments.extend(["--serial", "file,path=serial", "--control", "control"]);
        arguments.extend(["--memory", "64M", "--disk", disk]);
        Launcher::start_in(directory, &arguments)
    };
    for (disk, part) in [
        ("path=top,format=qcow2", "base"),
        ("path=top,format=qcow2,backing=deny", "base"),
        ("path=top", "qcow2"),
        ("path=top,format=qcow", "qcow"),
        (
            "path=top,format=qcow2,backing=allow,poll-us=99999",
            "poll-us",
        ),
    ] {
        let mut launcher = start(disk);
        assert_ne!(launcher.wait(), 0, "{disk}");
        let error = launcher.read("stderr");
        let printed = error
            .lines()
            .any(|line| line.contains("device-disk: ") && line.contains(part));
        assert!(printed, "{disk}: {error}");
    }
    let mut launcher =
        start("path=top,format=qcow2,backing=allow,cache=unsafe,queues=4,poll-us=50");
    launcher.wait_file("serial", "disk-chaos: ready");
    launcher.do_ctl(&["resize", "disk0", "65M"]);
    let before = requests(&launcher, "disk0");
    wait_until("requests complete", || {
        requests(&launcher, "disk0") > before
    });
    launcher.do_ctl(&["restart", "disk0"]);
    launcher.do_ctl(&["stop"]);
    assert_eq!(launcher.wait(), 0, "{}", launcher.read("stderr"));
    for image in ["base", "top"] {
        qemu_img(launcher.directory(), &["check", "-q", image]);
    }
    launcher.expect_no_process_left();
}

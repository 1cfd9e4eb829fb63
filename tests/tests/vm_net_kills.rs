//! device-net is killed, or swapped to another tap, while a Linux guest uses it. Frames may
//! be lost, and TCP sends them again. The guest sees no error, and its interface stays up.

use std::process::Command;
use std::time::Duration;

use outrigger_protocol::control::MachineEvent;
use outrigger_tests::launcher::Launcher;
use outrigger_tests::linux::{self, guest, linux, wait_end, wait_serial};
use outrigger_tests::machine::skip_kvm;
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::wait_until;
use rustix::process::Signal;
use rustix::thread::{UnshareFlags, unshare_unsafe};

const TAPS: [&str; 2] = ["tap7", "tap8"];

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}");
}

/// Moves this thread, and all processes that it starts, into a new network namespace with a
/// bridge and two taps. The taps exist whether or not a process serves them.
fn network() {
    // SAFETY: unshare(2) of the network namespace does not unshare the descriptor table.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
    ip("link set lo up");
    ip("link add br0 type bridge");
    ip("address add 10.0.2.1/24 dev br0");
    ip("link set br0 up");
    for tap in TAPS {
        ip(&format!("tuntap add dev {tap} mode tap vnet_hdr"));
        ip(&format!("link set {tap} master br0"));
        ip(&format!("link set {tap} up"));
    }
}

#[test]
fn a_download_continues_over_kills_of_device_net() {
    if skip_kvm() {
        return;
    }
    network();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("net.sock");
    let start = || -> Process {
        let launch = Launch::new("device-net").args(["--tap", TAPS[0]]);
        launch.lifetime(linux::PATIENCE).listening_at(&socket)
    };
    // Slowly, so that the kills happen during the download.
    let pace = Duration::from_millis(60);
    let port = linux::serve_slowly(pace);
    let job = format!("outrigger.job=net {}", linux::net_parameters(port));
    let mut machine = linux("vmlinux", &job)
        .args(["--memory", "128M"])
        .served("net0", "net", start(), &socket)
        .start();
    wait_serial(&machine, "GUEST up");
    let mut kills = 0;
    while machine.runner.is_running() && !machine.serial().contains("STEP net: ") {
        std::thread::sleep(Duration::from_millis(400));
        machine.process("net0").signal(Signal::KILL);
        machine.process("net0").wait();
        drop(machine.replace("net0", start()));
        kills += 1;
        wait_until(
            "the device is connected again, or the guest has ended",
            || {
                !machine.runner.is_running()
                    || machine.events().iter().filter(|e| is_back(e)).count() == kills
            },
        );
    }
    wait_end(&machine, 0);
    let serial = machine.serial();
    assert!(serial.contains("STEP net: pass"), "{serial}");
    println!("{kills} deaths of device-net");
    assert!(kills >= 5, "{kills}");
}

fn is_back(event: &MachineEvent) -> bool {
    matches!(event, MachineEvent::DeviceRunning { id, .. } if id == "net0")
}

#[test]
fn a_download_continues_over_swaps_to_another_tap() {
    if skip_kvm() {
        return;
    }
    network();
    let port = linux::serve_slowly(Duration::from_millis(60));
    let cmdline = format!(
        "console=ttyS0 quiet outrigger.job=net {}",
        linux::net_parameters(port)
    );
    let [kernel, initrd] = ["vmlinux", "initramfs.cpio"].map(|f| guest(f).display().to_string());
    let net = |tap: &str| format!("tap,name={tap},mac=52:54:00:00:00:07");
    let mut launcher = Launcher::start(&[
        "run",
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--cmdline",
        &cmdline,
        "--memory",
        "128M",
        "--net",
        &net(TAPS[0]),
        "--serial",
        "file,path=serial",
        "--control",
        "control",
    ]);
    launcher.wait_file("serial", "GUEST up");
    let mut swaps = 0;
    while !launcher.read("serial").contains("STEP net: ") {
        std::thread::sleep(Duration::from_millis(500));
        let (code, _, error) = launcher.ctl(&["swap", "net0", &net(TAPS[(swaps + 1) % 2])]);
        if code == 0 {
            swaps += 1;
        } else {
            // The guest may have ended meanwhile.
            assert!(launcher.read("serial").contains("STEP net: "), "{error}");
        }
    }
    assert_eq!(launcher.wait(), 0, "{}", launcher.read("stderr"));
    launcher.expect_no_process_left();
    let serial = launcher.read("serial");
    assert!(serial.contains("STEP net: pass"), "{serial}");
    println!("{swaps} swaps");
    assert!(swaps >= 3, "{swaps}");
}

//! device-net is killed while a Linux guest talks over it: frames may be lost, and TCP
//! makes up for them; the guest sees no error and its interface stays up.

use std::process::Command;
use std::time::Duration;

use outrigger_protocol::control::Event;
use outrigger_tests::linux::{self, linux, wait_end, wait_serial};
use outrigger_tests::machine::skip_kvm;
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::wait_until;
use rustix::process::Signal;
use rustix::thread::{UnshareFlags, unshare_unsafe};

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}");
}

#[test]
fn a_download_goes_on_over_the_deaths_of_device_net() {
    if skip_kvm() {
        return;
    }
    // All processes of this thread are in a network of their own, with a tap that is
    // there whether or not a process serves it.
    // SAFETY: the descriptor table stays shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
    ip("link set lo up");
    ip("tuntap add dev tap7 mode tap vnet_hdr");
    ip("address add 10.0.2.1/24 dev tap7");
    ip("link set tap7 up");
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("net.sock");
    let start = || -> Process {
        let launch = Launch::new("device-net").args(["--tap", "tap7"]);
        launch.lifetime(linux::PATIENCE).listening_at(&socket)
    };
    // A little at a time, so that the deaths come in the middle.
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
        wait_until("the device is back, or the guest done", || {
            !machine.runner.is_running()
                || machine.events().iter().filter(|e| is_back(e)).count() == kills
        });
    }
    wait_end(&machine, 0);
    let serial = machine.serial();
    assert!(serial.contains("STEP net: pass"), "{serial}");
    println!("{kills} deaths of device-net");
    assert!(kills >= 5, "{kills}");
}

fn is_back(event: &Event) -> bool {
    matches!(event, Event::DeviceRunning { id, .. } if id == "net0")
}

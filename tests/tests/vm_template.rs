//! The template device: a device that uses crate vhost-user-backend, in a machine that
//! knows only its device number.

use outrigger_tests::machine::{Machine, skip_kvm};
use outrigger_tests::process::Launch;
use outrigger_tests::wait_until;

#[test]
fn a_guest_writes_and_reads_the_template_device() {
    if skip_kvm() {
        return;
    }
    let launch = Launch::new("template-device");
    let socket = launch.directory().join("socket");
    let device = launch.args([socket.as_os_str(), "64".as_ref()]).spawn();
    wait_until("the device listens", || socket.exists());
    let machine = Machine::embedded("job=main need=block")
        .args([
            "--memory",
            "64M",
            "--device",
            &format!("x,type=2,socket={}", socket.display()),
        ])
        .start();
    machine.expect(0);
    let serial = machine.serial();
    assert!(
        serial.contains("131072 sectors, id \"template-device\", 4096 KiB written and verified"),
        "{serial}"
    );
    // The device ends with its front end and removes its socket.
    assert!(device.wait().success(), "{}", device.log());
    assert!(!socket.exists());
}

#[test]
fn the_template_device_has_at_most_150_lines() {
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../examples/template-device/src"
    );
    let lines = std::fs::read_dir(folder).unwrap().map(|file| {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        text.lines().count()
    });
    let lines: usize = lines.sum();
    assert!(lines <= 150, "{lines} lines");
}

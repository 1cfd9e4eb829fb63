//! Our device processes under QEMU: a Linux guest uses them and reports, and the host
//! checks what it left behind.

use std::path::PathBuf;

use outrigger_tests::images::{check_format, convert, qemu_img};
use outrigger_tests::linux;
use outrigger_tests::machine::skip_kvm;
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::qemu::{Board, Qemu, complaint};

/// device-disk with two queues and an empty image of a `format` in its directory.
fn disk(format: &str) -> (Process, PathBuf) {
    let launch = Launch::new("device-disk").lifetime(linux::PATIENCE);
    let image = launch.directory().join("disk.img");
    let path = image.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", format, path, "64M"]);
    let process = launch
        .args(["--queues=2", "--format", format, "--blk-file", path])
        .listening();
    (process, image)
}

/// device-net and the parameters with which the guest finds somebody behind it.
fn net() -> (Process, String) {
    let launch = Launch::new("device-net").lifetime(linux::PATIENCE);
    let process = launch.args(["--isolated"]).listening();
    let port = linux::serve_in_namespace(process.pid());
    (process, linux::net_parameters(port))
}

/// What the guest and the device processes have to say at the end.
fn check(serial: &str, steps: &[&str], devices: &[&Process]) {
    for step in steps {
        assert!(serial.contains(&format!("STEP {step}: pass")), "{serial}");
    }
    for device in devices {
        assert!(device.is_running(), "{}", device.log());
        // Neither the guest nor QEMU did anything that the device complains of.
        assert!(!device.log().contains("WARN"), "{}", device.log());
        assert!(!device.log().contains("ERROR"), "{}", device.log());
    }
}

#[test]
fn q35_with_two_cpus_uses_a_disk_of_two_queues_and_a_network() {
    if skip_kvm() {
        return;
    }
    let (disk, image) = disk("raw");
    let (net, parameters) = net();
    let job = format!("outrigger.job=cpus,disk,net outrigger.cpus=2 {parameters}");
    let machine = Qemu::new(Board::Q35, 2, 128, &job)
        .device("vhost-user-blk", &disk, ",num-queues=2")
        .net(&net)
        .start();
    machine.wait_serial("GUEST pass");
    // By ACPI.
    assert_eq!(machine.process.wait().code(), Some(0));
    let serial = machine.serial();
    check(&serial, &["cpus", "disk", "net"], &[&disk, &net]);
    linux::check_image(&image);
}

#[test]
fn microvm_uses_a_disk_of_two_queues_and_a_network() {
    if skip_kvm() {
        return;
    }
    let (disk, image) = disk("qcow2");
    let (net, parameters) = net();
    let job = format!("outrigger.job=disk,net {parameters}");
    let machine = Qemu::new(Board::Microvm, 1, 96, &job)
        .device("vhost-user-blk", &disk, ",num-queues=2")
        .net(&net)
        .start();
    // Without ACPI it cannot power off.
    let serial = machine.wait_serial("GUEST pass");
    drop(machine);
    check(&serial, &["disk", "net"], &[&disk, &net]);
    let raw = image.with_file_name("raw");
    check_format("qcow2", &image);
    convert(("qcow2", &image), ("raw", &raw));
    linux::check_image(&raw);
}

/// QEMU 10.0 has a front end for any type of device and keeps it from its users
/// (user_creatable is false in vhost-user-device.c), and has none for consoles. Where
/// that changes, this test fails and the console is to be plugged in above.
#[test]
fn a_console_has_no_front_end_in_qemu() {
    let prefix = "qemu-system-x86_64: -device";
    assert_eq!(
        complaint("vhost-user-device-pci"),
        format!(
            "{prefix} vhost-user-device-pci: Parameter 'driver' expects a pluggable device type"
        )
    );
    for kind in ["vhost-user-console-pci", "vhost-user-test-device-pci"] {
        assert_eq!(
            complaint(kind),
            format!("{prefix} {kind}: '{kind}' is not a valid device model name")
        );
    }
    // One that there is says what it lacks.
    assert!(complaint("vhost-user-blk-pci").contains("chardev"));
}

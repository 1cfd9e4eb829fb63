//! The device processes with QEMU as the front end: a Linux guest uses them and reports,
//! and the host checks the image afterwards.

use std::path::PathBuf;

use outrigger_tests::images::{check_format, convert, qemu_img};
use outrigger_tests::linux;
use outrigger_tests::machine::skip_kvm;
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::qemu::{Board, Qemu, qemu_error};

/// A device-disk with two queues and a new image of `format`, and the directory of both.
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

/// A device-net, and the kernel parameters that tell the guest the address of its peer.
fn net() -> (Process, String) {
    let launch = Launch::new("device-net").lifetime(linux::PATIENCE);
    let process = launch.args(["--isolated"]).listening();
    let port = linux::serve_in_namespace(process.pid());
    (process, linux::net_parameters(port))
}

/// Checks the output of the guest and the logs of the device processes.
fn check(serial: &str, steps: &[&str], devices: &[&Process]) {
    for step in steps {
        assert!(serial.contains(&format!("STEP {step}: pass")), "{serial}");
    }
    for device in devices {
        assert!(device.is_running(), "{}", device.log());
        // No device process has logged a warning about the guest or QEMU.
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
    // The guest powers off by ACPI.
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
    // Without ACPI the guest cannot power off.
    let serial = machine.wait_serial("GUEST pass");
    drop(machine);
    check(&serial, &["disk", "net"], &[&disk, &net]);
    let raw = image.with_file_name("raw");
    check_format("qcow2", &image);
    convert(("qcow2", &image), ("raw", &raw));
    linux::check_image(&raw);
}

/// QEMU 10.0 has no front end for consoles. Its front end for any device type is not
/// available to users (user_creatable is false in vhost-user-device.c). If that changes,
/// this test fails, and the console can be added to the tests above.
#[test]
fn qemu_has_no_front_end_for_a_console() {
    let prefix = "qemu-system-x86_64: -device";
    assert_eq!(
        qemu_error("vhost-user-device-pci"),
        format!(
            "{prefix} vhost-user-device-pci: Parameter 'driver' expects a pluggable device type"
        )
    );
    for kind in ["vhost-user-console-pci", "vhost-user-test-device-pci"] {
        assert_eq!(
            qemu_error(kind),
            format!("{prefix} {kind}: '{kind}' is not a valid device model name")
        );
    }
    // A front end that exists names the property that is missing.
    assert!(qemu_error("vhost-user-blk-pci").contains("chardev"));
}

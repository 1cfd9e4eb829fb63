//! Linux verifies disks of each format as fsx does: random reads, writes, zeroing, discards and
//! flushes, with and without its page cache. Then qemu-img checks the images.

use std::path::Path;
use std::time::Duration;

use outrigger_tests::chaos::{Random, long};
use outrigger_tests::images::{check_format, qemu_img};
use outrigger_tests::linux::{guest, wait_end_within};
use outrigger_tests::machine::{Machine, skip_kvm};
use outrigger_tests::process::Launch;

/// Number of operations on each disk.
fn operations() -> u32 {
    if long() { 4000 } else { 80 }
}

/// Time limit of the long run.
const LIMIT: Duration = Duration::from_secs(1700);
const SIZE: &str = "16M";

fn create(directory: &Path, format: &str) -> String {
    let path = directory.join(format).display().to_string();
    qemu_img(&["create", "-q", "-f", format, &path, SIZE]);
    path
}

#[test]
fn linux_verifies_disks_of_every_format() {
    if skip_kvm() {
        return;
    }
    let seed = Random::announced().below(1 << 30);
    let options = format!(
        "console=ttyS0 quiet outrigger.job=fsx outrigger.ops={} outrigger.seed={seed}",
        operations()
    );
    let initrd = guest("initramfs-fsx.cpio").display().to_string();
    let mut machine =
        Machine::new(&guest("vmlinux"), &options).args(["--initrd", &initrd, "--memory", "128M"]);
    let directory = tempfile::tempdir().unwrap();
    let disks = [
        ("raw", vec!["--queues", "2"]),
        ("raw", vec!["--cache", "none"]),
        ("qcow2", vec![]),
        ("qcow", vec!["--poll-us", "100"]),
    ];
    let mut images = Vec::new();
    for (number, (format, options)) in disks.into_iter().enumerate() {
        let place = directory.path().join(number.to_string());
        std::fs::create_dir(&place).unwrap();
        let image = create(&place, format);
        let arguments = ["--format", format, "--blk-file", &image].into_iter();
        let arguments: Vec<&str> = arguments.chain(options).collect();
        let process = Launch::new("device-disk").lifetime(LIMIT).args(arguments);
        let process = process.listening();
        let socket = process.directory().join("socket");
        machine = machine.served(&format!("disk{number}"), "block", process, &socket);
        images.push((format, image));
    }
    let machine = machine.lifetime(LIMIT).start();
    wait_end_within(&machine, 0, LIMIT);
    let serial = machine.serial();
    let printed = format!("{} operations on each of 4 devices", operations());
    assert!(serial.contains(&printed), "{serial}");
    // This also releases the locks of the images.
    drop(machine);
    for (format, image) in images {
        check_format(format, Path::new(&image));
    }
}

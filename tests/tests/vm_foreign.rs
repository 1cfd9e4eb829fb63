//! Device processes of other projects with the runner. `test.sh` sets OUTRIGGER_PEERS to
//! the directory with those of crates.io; QEMU's is in PATH.

use std::path::{Path, PathBuf};
use std::process::Command;

use outrigger_tests::binaries::peer;
use outrigger_tests::linux::{guest, linux, wait_end, wait_serial};
use outrigger_tests::machine::{Machine, skip_kvm};
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::wait_until;

/// Starts `launch` and waits until it has created `socket`.
fn serving(launch: Launch, socket: &Path) -> Process {
    let process = launch.spawn();
    wait_until("the socket exists", || {
        assert!(process.is_running(), "{}", process.log());
        socket.exists()
    });
    process
}

/// A qemu-storage-daemon that exports `image`, and its socket.
fn storage_daemon(image: &Path, queues: usize) -> (Process, PathBuf) {
    let launch = Launch::program(Path::new("qemu-storage-daemon"));
    let socket = launch.directory().join("socket");
    let export = format!(
        "type=vhost-user-blk,id=export,node-name=image,writable=on,num-queues={queues},\
         addr.type=unix,addr.path={}",
        socket.display()
    );
    let image = format!(
        "driver=file,node-name=image,locking=off,filename={}",
        image.display()
    );
    let process = serving(
        launch.args(["--blockdev", &image, "--export", &export]),
        &socket,
    );
    (process, socket)
}

/// device-disk offers all features that the driver accepted from qemu-storage-daemon.
#[test]
fn linux_root_moves_from_qemu_storage_daemon_to_device_disk() {
    if skip_kvm() {
        return;
    }
    let options =
        "root=/dev/vda rw init=/init console=ttyS0 quiet outrigger.job=cpus,root outrigger.cpus=2";
    let machine = Machine::new(&guest("vmlinux"), options);
    let image = machine.directory().join("root.ext4");
    std::fs::copy(guest("root.ext4"), &image).unwrap();
    let (process, socket) = storage_daemon(&image, 2);
    let image = image.display().to_string();
    let machine = machine
        .args(["--memory", "96M", "--cpus", "2"])
        .served("disk0", "block", process, &socket)
        .start();
    wait_serial(&machine, "STEP cpus: pass");
    let ours = Launch::new("device-disk")
        .args(["--queues", "2", "--lock", "off", "--blk-file", &image])
        .listening();
    let socket = ours.directory().join("socket").display().to_string();
    let reply = machine.control_line(&format!(
        r#"{{"command":"swap","id":"disk0","socket":"{socket}"}}"#
    ));
    assert!(reply.ok, "{reply:?}\n{}", machine.runner.log());
    wait_end(&machine, 0);
    assert!(machine.serial().contains("STEP root: pass"));
    let check = Command::new("e2fsck")
        .args(["-fn", &image])
        .output()
        .unwrap();
    assert!(check.status.success(), "{check:?}");
}

#[test]
fn linux_uses_vhost_device_rng_and_virtiofsd() {
    if skip_kvm() {
        return;
    }
    let machine = linux("vmlinux", "outrigger.job=rng,share");
    let rng = peer("vhost-device-rng");
    let prefix = rng.directory().join("socket");
    // It serves several sockets and appends a number to each path.
    let rng_socket = rng.directory().join("socket0");
    let rng = serving(
        rng.args(["--socket-path".as_ref(), prefix.as_os_str()]),
        &rng_socket,
    );

    let folder = machine.directory().join("folder");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("from-host"), b"a file of the host\n").unwrap();
    let sums = Command::new("md5sum")
        .arg("from-host")
        .current_dir(&folder)
        .output()
        .unwrap();
    std::fs::write(folder.join("SUMS"), sums.stdout).unwrap();
    let share = peer("virtiofsd").args(["--tag", "share", "--shared-dir"]);
    let share_socket = share.directory().join("socket");
    let share = share.args([
        folder.as_os_str(),
        "--socket-path".as_ref(),
        share_socket.as_os_str(),
    ]);
    let share = serving(share, &share_socket);

    let machine = machine
        .args(["--memory", "96M"])
        .served("rng0", "4", rng, &rng_socket)
        .served("share0", "26", share, &share_socket)
        .start();
    wait_end(&machine, 0);
    let copy = std::fs::read(folder.join("from-guest")).unwrap();
    assert_eq!(copy, b"a file of the host\n");
}

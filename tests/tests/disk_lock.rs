//! Image locks, tested against those of QEMU's programs.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use outrigger_tests::process::{Launch, Process};
use outrigger_tests::wait_until;
use rustix::process::Signal;
use tempfile::TempDir;

fn image() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    std::fs::write(&image, vec![0x5a; 1 << 20]).unwrap();
    (directory, image)
}

fn disk(image: &Path, options: &[&str]) -> Launch {
    Launch::new("device-disk")
        .args(["--blk-file".as_ref(), image.as_os_str()])
        .args(options)
}

/// The error of a device-disk that must not start on `image`.
fn refusal(image: &Path, options: &[&str]) -> String {
    let launch = disk(image, options);
    let socket = launch.directory().join("socket");
    let process = launch
        .args(["--socket-path".as_ref(), socket.as_os_str()])
        .spawn();
    assert_eq!(process.wait().code(), Some(1), "{}", process.log());
    let log = process.log();
    let start = format!(
        "device-disk: --blk-file {}: it is locked: ",
        image.display()
    );
    let why = log.strip_prefix(&start).unwrap_or_else(|| panic!("{log}"));
    assert_eq!(why.lines().count(), 1, "{log}");
    why.trim_end().to_owned()
}

/// Runs one of QEMU's programs.
fn qemu(program: &str, args: &[&str], image: &Path) -> Output {
    Command::new(program)
        .args(args)
        .arg(image)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}; ./test.sh installs it"))
}

const WRITE: &[&str] = &["-f", "raw", "-c", "write 0 512"];
const READ: &[&str] = &["-r", "-f", "raw", "-c", "read 0 512"];
/// Reads the whole image, without sharing the write permission.
fn convert(image: &Path, options: &[&str]) -> Output {
    let copy = image.with_extension("copy");
    Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "raw"])
        .args(options)
        .args([image, &copy])
        .output()
        .unwrap_or_else(|e| panic!("qemu-img: {e}; ./test.sh installs it"))
}

fn is_locked(output: &Output) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && error.contains("lock"),
        "{error}"
    );
}

fn works(output: &Output) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
}

/// qemu-storage-daemon with `image` open and no export.
fn daemon(image: &Path, read_only: &str) -> Process {
    let launch = Launch::program(Path::new("qemu-storage-daemon"));
    let ready = launch.directory().join("pid");
    let blockdev = format!(
        "driver=file,node-name=disk,filename={},read-only={read_only}",
        image.display()
    );
    let writable = if read_only == "on" { "off" } else { "on" };
    let socket = launch.directory().join("socket");
    let export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,writable={writable},addr.type=unix,addr.path={}",
        socket.display()
    );
    let process = launch
        .args(["--blockdev", &blockdev, "--export", &export])
        .args(["--pidfile".as_ref(), ready.as_os_str()])
        .spawn();
    wait_until("qemu-storage-daemon has its image", || {
        assert!(process.is_running(), "{}", process.log());
        ready.exists()
    });
    process
}

#[test]
fn qemu_does_not_write_to_an_image_in_use() {
    let (_directory, image) = image();
    let _disk = disk(&image, &[]).listening();
    is_locked(&qemu("qemu-io", WRITE, &image));
    is_locked(&convert(&image, &[]));
    // A program that does not lock is not stopped.
    works(&convert(&image, &["-U"]));
}

#[test]
fn qemu_reads_an_image_that_is_served_read_only() {
    let (_directory, image) = image();
    let _disk = disk(&image, &["--read-only"]).listening();
    works(&qemu("qemu-io", READ, &image));
    works(&convert(&image, &[]));
    is_locked(&qemu("qemu-io", WRITE, &image));
}

#[test]
fn an_image_that_qemu_writes_to_is_refused() {
    let (_directory, image) = image();
    let daemon = daemon(&image, "off");
    for options in [&[][..], &["--read-only"]] {
        let why = refusal(&image, options);
        let who = format!("process {} (", daemon.pid());
        assert!(why.starts_with(&who), "{why}");
        assert!(why.ends_with(") writes to it"), "{why}");
    }
    // --lock off overrides it.
    disk(&image, &["--lock", "off"]).listening();
    drop(daemon);
    disk(&image, &[]).listening();
}

#[test]
fn an_image_that_qemu_reads_is_served_read_only() {
    let (_directory, image) = image();
    let _daemon = daemon(&image, "on");
    disk(&image, &["--read-only"]).listening();
}

#[test]
fn two_disks_share_an_image_only_for_reading() {
    let (_directory, image) = image();
    let writer = disk(&image, &[]).listening();
    let who = format!("process {} (device-disk) ", writer.pid());
    let why = refusal(&image, &[]);
    assert_eq!(why, format!("{who}does not let others write to it"));
    assert_eq!(
        refusal(&image, &["--read-only"]),
        format!("{who}writes to it")
    );
    drop(writer);

    let first = disk(&image, &["--read-only"]).listening();
    let second = disk(&image, &["--read-only"]).listening();
    assert!(refusal(&image, &[]).ends_with("does not let others write to it"));
    drop((first, second));
}

#[test]
fn the_lock_ends_with_its_process() {
    let (_directory, image) = image();
    for _ in 0..5 {
        let process = disk(&image, &[]).listening();
        process.signal(Signal::KILL);
        process.wait();
        // The next process gets the lock at once.
        disk(&image, &[]).listening();
    }
}

/// A launcher opens the image once, and each process that inherits the open file shares its
/// lock. So the next process can start before the last one has ended.
#[test]
fn processes_with_the_same_open_file_share_the_lock() {
    let (_directory, image) = image();
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let start = || {
        let file = file.try_clone().unwrap().into();
        Launch::new("device-disk").pass("--blk-fd", file)
    };
    let first = start().listening();
    let second = start().listening();
    let is_taken = || {
        is_locked(&qemu("qemu-io", WRITE, &image));
        assert!(refusal(&image, &[]).contains("does not let others write to it"));
    };
    is_taken();
    first.signal(Signal::KILL);
    first.wait();
    is_taken();
    drop(second);
    // No process serves the image, but the launcher still has the lock.
    is_taken();
    drop(file);
    disk(&image, &[]).listening();
}

#[test]
fn an_inherited_file_must_be_open_for_its_use() {
    let (_directory, image) = image();
    let mistake = |file: File, options: &[&str]| {
        let launch = Launch::new("device-disk");
        let socket = launch.directory().join("socket");
        let process = launch
            .args(options)
            .args(["--socket-path".as_ref(), socket.as_os_str()])
            .pass("--blk-fd", file.into())
            .spawn();
        assert_eq!(process.wait().code(), Some(1), "{}", process.log());
        assert!(!socket.exists());
        process.log()
    };
    let log = mistake(File::open(&image).unwrap(), &[]);
    assert!(log.starts_with("device-disk: --blk-fd "), "{log}");
    assert!(log.ends_with(": not open for writing\n"), "{log}");
    let writable = File::options().write(true).open(&image).unwrap();
    let log = mistake(writable, &["--read-only"]);
    assert!(log.ends_with(": not open for reading\n"), "{log}");
    let log = mistake(File::open("/dev/null").unwrap(), &["--read-only"]);
    assert!(
        log.ends_with("neither a regular file nor a block device\n"),
        "{log}"
    );
    let file = File::open(&image).unwrap().into();
    let launch = Launch::new("device-disk").args(["--read-only"]);
    launch.pass("--blk-fd", file).listening();
}

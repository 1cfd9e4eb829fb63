//! The Linux test guest that `tests/guest/build.sh` makes (its directory is in
//! OUTRIGGER_LINUX_GUEST), and the host side of its steps.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::machine::{Machine, Running};

/// Deadline for a guest; emulated guest kernels are slow.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// A file of the guest's directory.
///
/// # Panics
/// OUTRIGGER_LINUX_GUEST is not set.
pub fn guest(file: &str) -> PathBuf {
    let directory = std::env::var_os("OUTRIGGER_LINUX_GUEST")
        .expect("OUTRIGGER_LINUX_GUEST is not set: run ./test.sh, or set it to what tests/guest/build.sh prints");
    Path::new(&directory).join(file)
}

/// A machine that boots this kernel with the full initramfs.
pub fn linux(kernel: &str, options: &str) -> Machine {
    let cmdline = format!("console=ttyS0 quiet {options}");
    let initrd = guest("initramfs.cpio").display().to_string();
    Machine::new(&guest(kernel), &cmdline).args(["--initrd", &initrd])
}

/// Waits until the serial port's output contains `text`.
///
/// # Panics
/// It does not in time, or the machine ends.
pub fn wait_serial(machine: &Running, text: &str) {
    let start = Instant::now();
    while !machine.serial().contains(text) {
        assert!(
            start.elapsed() < PATIENCE && machine.runner.is_running(),
            "the guest never said {text:?}\nserial: {}\nlog: {}",
            machine.serial(),
            machine.runner.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until the machine ends, which must be with this code.
///
/// # Panics
/// It ends with another code.
pub fn wait_end(machine: &Running, code: i32) {
    wait_end_within(machine, code, PATIENCE);
}

/// The same, with a `limit` of the caller's.
///
/// # Panics
/// It ends with another code, or not in time.
pub fn wait_end_within(machine: &Running, code: i32, limit: Duration) {
    let start = Instant::now();
    while machine.runner.is_running() && start.elapsed() < limit {
        std::thread::sleep(Duration::from_millis(20));
    }
    machine.expect(code);
}

/// The file that the guest fetches in its step `net`.
pub fn body() -> Vec<u8> {
    (0..12_000u32).flat_map(u32::to_le_bytes).collect()
}

/// The parameters of the step `net` for a peer that serves [`body`] at `port`.
pub fn net_parameters(port: u16) -> String {
    format!(
        "outrigger.ip=10.0.2.15/24 outrigger.peer=10.0.2.1 outrigger.port={port} outrigger.sum={}",
        md5(&body())
    )
}

/// Serves [`body`] by HTTP, once, at 10.0.2.1 in the network namespace of `pid`;
/// returns the port.
pub fn serve_in_namespace(pid: u32) -> u16 {
    serve(format!("/proc/{pid}/ns/net"), Duration::ZERO)
}

/// The same in this thread's network namespace, waiting for `pace` before each KiB.
pub fn serve_slowly(pace: Duration) -> u16 {
    serve("/proc/thread-self/ns/net".into(), pace)
}

fn serve(namespace: String, pace: Duration) -> u16 {
    let namespace = File::open(namespace).unwrap();
    let (sender, port) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // setns(2) changes the namespace of this thread only.
        let kind = Some(rustix::thread::LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(namespace.as_fd(), kind).unwrap();
        let listener = TcpListener::bind("10.0.2.1:0").unwrap();
        sender.send(listener.local_addr().unwrap().port()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = BufReader::new(stream.try_clone().unwrap());
        let mut line = String::new();
        while request.read_line(&mut line).unwrap() > 2 {
            line.clear();
        }
        let body = body();
        let len = body.len();
        write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {len}\r\n\r\n").unwrap();
        for piece in body.chunks(1024) {
            std::thread::sleep(pace);
            stream.write_all(piece).unwrap();
        }
    });
    port.recv_timeout(Duration::from_secs(10)).unwrap()
}

fn md5(data: &[u8]) -> String {
    let mut child = Command::new("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(data).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..32].to_owned()
}

/// Checks what the step `disk` wrote: a clean file system whose files have the checksums that
/// the guest recorded.
pub fn check_image(image: &Path) {
    let check = Command::new("e2fsck")
        .arg("-fn")
        .arg(image)
        .output()
        .unwrap();
    assert!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stdout)
    );
    let directory = tempfile::tempdir().unwrap();
    let dump = Command::new("debugfs")
        .arg("-R")
        .arg(format!("rdump / {}", directory.path().display()))
        .arg(image)
        .output()
        .unwrap();
    assert!(dump.status.success());
    let sums = Command::new("md5sum")
        .args(["--strict", "-c", "SUMS"])
        .current_dir(directory.path())
        .output()
        .unwrap();
    assert!(
        sums.status.success(),
        "{}{}",
        String::from_utf8_lossy(&sums.stdout),
        String::from_utf8_lossy(&sums.stderr)
    );
    assert!(sums.stdout.iter().filter(|&&b| b == b'\n').count() >= 6);
}

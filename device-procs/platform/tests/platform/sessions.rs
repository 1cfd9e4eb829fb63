//! Runners that connect and disconnect, and invalid ones.

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::Command;

use outrigger_protocol::channel;
use outrigger_protocol::trap::{FromPlatform, REGION_SIZE, ToPlatform, VERSION};
use outrigger_tests::binaries::binary;
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::{DEADLINE, wait_until};
use rustix::fs::SealFlags;
use rustix::process::Signal;

use crate::machine::{Machine, connected, memfd, option, receive};

fn listening() -> (Process, std::path::PathBuf) {
    let launch = Launch::new("device-platform");
    let serial = launch.directory().join("serial");
    let process = launch.args([option("--serial=file=", &serial)]).listening();
    (process, serial)
}

/// Expects that the process closes the connection.
fn expect_hang_up(mut stream: &UnixStream) {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut rest = Vec::new();
    // If data of ours is unread, the close arrives as ECONNRESET.
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset),
    }
}

#[test]
fn a_bad_hello_ends_its_connection_with_one_line_and_the_next_is_served() {
    let (process, serial) = listening();
    let machine = Machine::new(2);
    let good = machine.region.as_raw_fd();
    let bell = machine.doorbell.as_raw_fd();
    let small: OwnedFd = memfd(4096, SealFlags::SHRINK);
    let unsealed: OwnedFd = memfd(REGION_SIZE, SealFlags::empty());
    let blank: OwnedFd = memfd(REGION_SIZE, SealFlags::SHRINK);
    let hello = |version, vcpus| ToPlatform::Hello { version, vcpus };
    let cases: [(ToPlatform, Vec<RawFd>, &str); 9] = [
        (
            hello(VERSION + 1, 2),
            vec![good, bell],
            "greeting: the runner speaks version 2",
        ),
        (hello(VERSION, 2), vec![], "0 descriptors"),
        (hello(VERSION, 2), vec![good, bell, bell], "3 descriptors"),
        (
            hello(VERSION, 2),
            vec![small.as_raw_fd(), bell],
            "4096 bytes",
        ),
        (
            hello(VERSION, 2),
            vec![unsealed.as_raw_fd(), bell],
            "sealed",
        ),
        (
            hello(VERSION, 2),
            vec![blank.as_raw_fd(), bell],
            "magic 0x0",
        ),
        (hello(VERSION, 65), vec![good, bell], "65 vCPUs"),
        (hello(VERSION, 1), vec![good, bell], "2 vCPUs"),
        (ToPlatform::Reset, vec![], "got Reset instead of Hello"),
    ];
    for (i, (message, fds, said)) in cases.iter().enumerate() {
        let stream = process.connect();
        channel::send(&stream, message, fds).unwrap();
        expect_hang_up(&stream);
        wait_until("it says so", || process.log().lines().count() > i);
        let log = process.log();
        assert!(log.lines().nth(i).unwrap().contains(said), "{said}: {log}");
        assert_eq!(log.lines().count(), i + 1, "{log}");
    }
    let stream = process.connect();
    std::io::Write::write_all(&mut &stream, b"\x05\0\0\0hello").unwrap();
    expect_hang_up(&stream);
    // A connection that is closed at once is not logged.
    drop(process.connect());

    let stream = process.connect();
    machine.greet(&stream);
    machine.print(0, b"served");
    wait_until("the next is served", || {
        std::fs::read(&serial).unwrap() == b"served"
    });
    assert_eq!(process.log().lines().count(), cases.len() + 1);
}

#[test]
fn an_unexpected_message_ends_the_session_and_not_the_process() {
    let (process, _) = listening();
    let machine = Machine::new(1);
    let stream = process.connect();
    machine.greet(&stream);
    channel::send(&stream, &machine.hello(), &[]).unwrap();
    expect_hang_up(&stream);
    let stream = process.connect();
    machine.greet(&stream);
    assert_eq!(machine.read(0, 0x3fd, 1), 0x60);
    assert!(process.log().contains("unexpected message: Hello"));
}

#[test]
fn each_runner_finds_the_state_of_its_own_machine() {
    let (process, serial) = listening();
    let first = Machine::new(1);
    let stream = process.connect();
    first.greet(&stream);
    first.write(0, 0x3ff, 1, 0x11);
    first.print(0, b"first ");
    first.wait(0);
    // The second runner waits until the first has disconnected.
    let second = Machine::new(4);
    let next = process.connect();
    drop(stream);
    second.greet(&next);
    assert_eq!(second.read(3, 0x3ff, 1), 0);
    second.print(3, b"second ");
    second.wait(3);
    drop(next);
    let stream = process.connect();
    first.greet(&stream);
    assert_eq!(first.read(0, 0x3ff, 1), 0x11);
    first.print(0, b"first again");
    first.wait(0);
    process.signal(Signal::TERM);
    assert_eq!(process.wait().code(), Some(0));
    assert_eq!(
        std::fs::read_to_string(&serial).unwrap(),
        "first second first again"
    );
}

#[test]
fn a_connected_process_ends_with_its_runner() {
    let c = connected(1, &[]);
    // It is confined: seccomp filters, and no privileges.
    assert_eq!(c.process.status("", "Seccomp"), "2");
    assert_eq!(c.process.status("", "CapEff"), "0000000000000000");
    assert_eq!(c.process.status("", "Threads"), "1");
    c.machine.print(0, b"bye");
    c.machine.wait(0);
    drop(c.stream);
    assert_eq!(c.process.wait().code(), Some(0));
    assert_eq!(std::fs::read(&c.serial).unwrap(), b"bye");
    assert_eq!(c.process.log(), "");
}

#[test]
fn an_event_that_was_not_sent_is_sent_by_the_successor() {
    let machine = Machine::new(1);
    // Requested while no process was there.
    machine.write(0, 0xf4, 1, 3);
    let (_process, stream) = Launch::new("device-platform")
        .args(["--serial=null"])
        .connected();
    machine.greet(&stream);
    assert_eq!(receive(&stream), FromPlatform::Exit { code: 3 });
}

#[test]
fn capabilities_name_the_type() {
    let output = Command::new(binary("device-platform"))
        .arg("--print-capabilities")
        .output()
        .unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["type"], "platform");
    assert!(output.status.success());
}

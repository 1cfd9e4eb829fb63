//! The host side of the serial line.

use std::fs::File;
use std::io::Read;
use std::process::Stdio;

use outrigger_tests::process::{Launch, Process};
use outrigger_tests::wait_until;
use rustix::process::Signal;

use crate::machine::{Machine, connected, option};

/// A process whose standard output is a pipe without a reader yet.
fn piped() -> (Machine, std::os::unix::net::UnixStream, Process, File) {
    let machine = Machine::new(1);
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let mut launch = Launch::new("device-platform");
    launch
        .command()
        .stdin(Stdio::null())
        .stdout(Stdio::from(writer));
    let (process, stream) = launch.connected();
    machine.greet(&stream);
    (machine, stream, process, reader.into())
}

#[test]
fn a_slow_reader_loses_the_newest_output_and_blocks_nothing() {
    let (machine, stream, process, mut reader) = piped();
    let before = process.resident();
    // A pipe holds 64 KiB and the ring 16 KiB.
    let text: Vec<u8> = (0..200_000u32)
        .map(|i| b'0' + (i / 100 % 10) as u8)
        .collect();
    machine.print(0, &text);
    machine.wait(0);
    assert!(process.resident() < before + (1 << 20));
    let mut got = vec![0; 64 * 1024];
    reader.read_exact(&mut got).unwrap();
    wait_until("it says how much was lost", || {
        process.log().contains("bytes were lost")
    });
    machine.print(0, b"END");
    machine.wait(0);
    drop(machine);
    drop(stream);
    reader.read_to_end(&mut got).unwrap();
    assert_eq!(process.wait().code(), Some(0));
    let kept = got.len() - 3;
    assert!(
        kept > 64 * 1024 && kept <= 64 * 1024 + 16 * 1024 + 4096,
        "{kept}"
    );
    assert!(got[..kept] == text[..kept] && got.ends_with(b"END"));
    let log = process.log();
    assert_eq!(log.matches("new output is dropped").count(), 1, "{log}");
    let lost = format!("{} bytes were lost", text.len() - kept);
    assert!(log.contains(&lost), "{log}");
}

#[test]
fn a_closed_pipe_stops_only_the_output() {
    let (machine, _stream, process, reader) = piped();
    drop(reader);
    machine.print(0, &[b'x'; 100_000]);
    assert_eq!(machine.read(0, 0x3fd, 1), 0x60);
    wait_until("it says so", || process.log().contains("no more output"));
    assert_eq!(process.log().lines().count(), 1);
    assert!(process.is_running());
}

#[test]
fn sigterm_writes_pending_output() {
    let c = connected(1, &[]);
    let text: Vec<u8> = (0..5000u32).map(|i| b'a' + (i % 26) as u8).collect();
    c.machine.print(0, &text);
    c.machine.wait(0);
    c.process.signal(Signal::TERM);
    assert_eq!(c.process.wait().code(), Some(0));
    assert!(std::fs::read(&c.serial).unwrap() == text);
}

#[test]
fn sigterm_does_not_wait_long_for_a_reader() {
    let (machine, _stream, process, _reader) = piped();
    machine.print(0, &[b'x'; 100_000]);
    machine.wait(0);
    process.signal(Signal::TERM);
    // It ends although its output is never read.
    assert_eq!(process.wait().code(), Some(0));
    assert!(process.log().contains("their reader does not read"));
}

#[test]
fn a_wrong_output_option_is_one_line_and_ends_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let missing = option("--serial=file=", &dir.path().join("no/where"));
    let same = dir.path().join("same");
    for (options, said) in [
        (vec![missing], "No such file"),
        (
            vec![
                option("--serial=file=", &same),
                option("--debug-console=file=", &same),
            ],
            "leave it out",
        ),
    ] {
        let (_ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let process = Launch::new("device-platform")
            .args(options)
            .pass("--fd", theirs.into())
            .spawn();
        assert_eq!(process.wait().code(), Some(1));
        let log = process.log();
        assert!(log.contains(said) && log.lines().count() == 1, "{log}");
    }
}

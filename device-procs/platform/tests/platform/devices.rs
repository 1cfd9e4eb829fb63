//! The devices as a guest sees them.

use std::io::Write;
use std::process::Stdio;
use std::time::{SystemTime, UNIX_EPOCH};

use outrigger_protocol::channel;
use outrigger_protocol::trap::{Access, FromPlatform, Space, ToPlatform};
use outrigger_tests::process::{Launch, readable_within};
use outrigger_tests::{DEADLINE, wait_until};

use crate::machine::{Machine, connected, port_access, receive};

const IER: u64 = 0x3f9;
const IIR: u64 = 0x3fa;
const MCR: u64 = 0x3fc;
const LSR: u64 = 0x3fd;

#[test]
fn the_serial_port_sends_and_interrupts() {
    let c = connected(1, &[]);
    c.machine.print(0, b"quiet ");
    assert_eq!(c.machine.read(0, LSR, 1), 0x60);
    assert!(!c.machine.raised());
    c.machine.write(0, IER, 1, 0x02);
    assert_eq!(c.machine.read(0, IER, 1), 0x02);
    assert!(c.machine.raised());
    assert_eq!(c.machine.read(0, IIR, 1), 0xc2);
    assert_eq!(c.machine.read(0, IIR, 1), 0xc1);
    c.machine.print(0, b"loud");
    assert!(readable_within(&c.machine.line, DEADLINE));
    wait_until("the file has it all", || {
        std::fs::read(&c.serial).unwrap() == b"quiet loud"
    });
}

#[test]
fn input_is_received_with_an_interrupt_and_echoed() {
    let (mut keyboard, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let (screen, output) = std::os::unix::net::UnixStream::pair().unwrap();
    let machine = Machine::new(1);
    let mut launch = Launch::new("device-platform");
    launch
        .command()
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .stdout(Stdio::from(std::os::fd::OwnedFd::from(output)));
    let (_process, stream) = launch.connected();
    machine.greet(&stream);
    machine.write(0, IER, 1, 0x01);
    // More than the FIFO holds.
    let text: Vec<u8> = (0..1000u32).map(|i| b'a' + (i % 26) as u8).collect();
    keyboard.write_all(&text).unwrap();
    let mut echoed = Vec::new();
    while echoed.len() < text.len() {
        assert!(readable_within(&machine.line, DEADLINE), "no interrupt");
        machine.line.read().unwrap();
        // As a driver that reads only the interrupt identification and takes one byte at a
        // time.
        while machine.read(0, IIR, 1) & 0x0f == 0x04 {
            let byte = machine.read(0, 0x3f8, 1) as u8;
            machine.print(0, &[byte]);
            echoed.push(byte);
        }
    }
    assert_eq!(echoed, text);
    screen.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut shown = vec![0; text.len()];
    std::io::Read::read_exact(&mut &screen, &mut shown).unwrap();
    assert_eq!(shown, text);
}

#[test]
fn loopback_returns_what_is_sent() {
    let c = connected(1, &[]);
    c.machine.write(0, MCR, 1, 0x1a);
    // RTS and OUT2 come back as CTS and DCD: how drivers detect the port.
    assert_eq!(c.machine.read(0, 0x3fe, 1) & 0xf0, 0x90);
    c.machine.write(0, IER, 1, 0x01);
    c.machine.print(0, b"xyz");
    assert_eq!(c.machine.read(0, LSR, 1), 0x61);
    assert_eq!(c.machine.read(0, IIR, 1), 0xc4);
    assert!(c.machine.raised());
    for byte in *b"xyz" {
        assert_eq!(c.machine.read(0, 0x3f8, 1), u64::from(byte));
    }
    assert_eq!(c.machine.read(0, LSR, 1), 0x60);
    c.machine.write(0, MCR, 1, 0x08);
    c.machine.print(0, b"out");
    wait_until("the file has only what went out", || {
        std::fs::read(&c.serial).unwrap() == b"out"
    });
}

#[test]
fn the_clock_shows_the_time_of_day() {
    let c = connected(1, &[]);
    let read = |register: u64| {
        c.machine.write(0, 0x70, 1, register);
        let bcd = c.machine.read(0, 0x71, 1);
        (bcd >> 4) * 10 + (bcd & 15)
    };
    // Read until two readings agree, as drivers do.
    let registers = [0x32, 0x09, 0x08, 0x07, 0x04, 0x02, 0x00];
    let mut time = registers.map(read);
    wait_until("two readings agree", || {
        let again = registers.map(read);
        std::mem::replace(&mut time, again) == again
    });
    let [century, year, month, day, hour, minute, second] = time;
    let text =
        format!("{century:02}{year:02}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}");
    let seconds = std::process::Command::new("date")
        .args(["-u", "+%s", "-d", &text])
        .output()
        .unwrap()
        .stdout;
    let seconds: u64 = String::from_utf8(seconds).unwrap().trim().parse().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    assert!(now.as_secs().abs_diff(seconds) < 60, "{text}");
    c.machine.write(0, 0x70, 1, 0x0a);
    assert_eq!(c.machine.read(0, 0x71, 1) & 0x80, 0);
    c.machine.write(0, 0x70, 1, 0x0d);
    assert_eq!(c.machine.read(0, 0x71, 1), 0x80);
}

#[test]
fn events_reach_the_runner_once_until_it_resets() {
    let c = connected(2, &[]);
    let reset = || {
        channel::send(&c.stream, &ToPlatform::Reset, &[]).unwrap();
        assert_eq!(receive(&c.stream), FromPlatform::ResetDone);
    };
    for (port, size, value, event) in [
        (0xf4, 1, 0, FromPlatform::Exit { code: 0 }),
        (0xf4, 4, 0x1_0007, FromPlatform::Exit { code: 7 }),
        (0x604, 2, 0x2000, FromPlatform::PowerOff),
        (0x605, 1, 0x20, FromPlatform::PowerOff),
        (0xcf9, 1, 0x06, FromPlatform::ResetRequest),
        (0x64, 1, 0xfe, FromPlatform::ResetRequest),
    ] {
        c.machine.write(0, port, size, value);
        assert_eq!(receive(&c.stream), event);
        // The guest does not wait for its reset. If this were sent, the next message would
        // not be the answer to the reset.
        c.machine.write(0, port, size, value);
        c.machine.write(1, 0x64, 1, 0xfe);
        reset();
    }
    // These request nothing.
    c.machine.write(0, 0xcf9, 1, 0x02);
    c.machine.write(0, 0x604, 2, 0x1c00);
    c.machine.write(0, 0x64, 1, 0xd1);
    assert_eq!(c.machine.read(0, 0x64, 1) & 0x03, 0);
    reset();
}

#[test]
fn a_reset_finishes_open_requests_and_keeps_the_output() {
    let c = connected(2, &[]);
    c.machine.write(0, 0x3ff, 1, 0x55);
    c.machine.write(0, 0x70, 1, 0x50);
    c.machine.write(0, 0x71, 1, 0x77);
    assert_eq!(c.machine.read(0, 0x3ff, 1), 0x55);
    c.machine.print(0, b"before ");
    c.machine.print(1, b"!");
    channel::send(&c.stream, &ToPlatform::Reset, &[]).unwrap();
    assert_eq!(receive(&c.stream), FromPlatform::ResetDone);
    assert!(c.machine.slot(0).is_done() && c.machine.slot(1).is_done());
    assert_eq!(c.machine.read(0, 0x3ff, 1), 0);
    c.machine.write(0, 0x70, 1, 0x50);
    assert_eq!(c.machine.read(0, 0x71, 1), 0x77, "the battery is gone");
    c.machine.print(0, b" after");
    wait_until("the file has it all", || {
        std::fs::read(&c.serial).unwrap() == b"before ! after"
    });
}

#[test]
fn unclaimed_addresses_read_as_ones() {
    let c = connected(1, &[]);
    for port in [
        0x0, 0x21, 0x80, 0x2f8, 0x3f7, 0x400, 0xcfc, 0x5ff, 0x606, 0xffff,
    ] {
        for (size, ones) in [(1, 0xff), (2, 0xffff), (4, 0xffff_ffff)] {
            // Of the ports that follow, only 0x3f8, 0x402 and 0x600 are claimed.
            let claimed = [0x3f8, 0x402, 0x600]
                .iter()
                .any(|p| (port..port + size).contains(p));
            if !claimed {
                assert_eq!(c.machine.read(0, port, size as u8), ones, "{port:#x}");
            }
            c.machine
                .write(0, if claimed { 0x80 } else { port }, size as u8, 0);
        }
    }
    for size in [1, 2, 4, 8] {
        let access = Access {
            space: Space::Memory,
            address: 0xfed0_0000,
            size,
            write: None,
        };
        let ones = !0 >> (64 - 8 * u32::from(size));
        assert_eq!(c.machine.access(0, &access), ones);
        let write = Some(0);
        c.machine.access(0, &Access { write, ..access });
    }
    // Sizes that no vCPU produces; what comes back does not matter.
    for size in [0, 3, 7, 255] {
        c.machine.access(0, &port_access(0x3fd, size, None));
    }
    assert_eq!(c.machine.read(0, LSR, 1), 0x60);
}

#[test]
fn writes_of_two_vcpus_are_carried_out_in_the_order_of_their_tickets() {
    let c = connected(2, &[]);
    // One thread acts for both vCPUs, so tickets are in program order; each write waits only
    // for the previous one in its own slot.
    let text: Vec<u8> = (0..4000u32).map(|i| b'!' + (i * 7 % 90) as u8).collect();
    let mut random = 12345u32;
    for &byte in &text {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        c.machine.print((random >> 31) as usize, &[byte]);
    }
    c.machine.wait(0);
    c.machine.wait(1);
    drop(c.stream);
    assert_eq!(c.process.wait().code(), Some(0));
    assert!(std::fs::read(&c.serial).unwrap() == text);
}

#[test]
fn debug_ports_share_the_serial_sink_unless_told_otherwise() {
    let c = connected(1, &[]);
    for port in [0xe9, 0x402, 0xf1] {
        assert_eq!(c.machine.read(0, port, 1), 0xe9);
    }
    c.machine.write(0, 0xe9, 1, b'a'.into());
    c.machine.print(0, b"b");
    c.machine.write(0, 0x402, 2, b'c'.into());
    c.machine.write(0, 0xf1, 1, b'd'.into());
    wait_until("all are in one file", || {
        std::fs::read(&c.serial).unwrap() == b"abcd"
    });

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("debug");
    let c = connected(1, &[&format!("--debug-console=file={}", path.display())]);
    c.machine.write(0, 0xe9, 1, b'a'.into());
    c.machine.print(0, b"b");
    wait_until("each is in its own file", || {
        std::fs::read(&c.serial).unwrap() == b"b" && std::fs::read(&path).unwrap() == b"a"
    });

    let c = connected(1, &["--debug-console=stderr"]);
    for byte in *b"to the log" {
        c.machine.write(0, 0xe9, 1, byte.into());
    }
    wait_until("it is on stderr", || c.process.log().contains("to the log"));
}

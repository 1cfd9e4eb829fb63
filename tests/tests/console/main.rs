//! device-console as seen by the guest and by the client at the other end.

mod inherited;
mod pty;
mod stdio;
mod unix;

use std::io::Read;
use std::path::PathBuf;

use outrigger_tests::console::send;
use outrigger_tests::guest::{EVENT_IDX, Guest};
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::queue::Buffer;
use outrigger_tests::ram::Ram;
use outrigger_tests::{console, wait_until};

/// Number of chains that fill the transmit queue.
const CHAINS: usize = 64;
/// Bytes of one such chain.
const CHAIN: usize = 16 * 1024;

fn boot(process: &Process) -> Guest {
    let ram = Ram::new(&[(0, 1 << 20), (1 << 32, 16 << 20)]);
    let mut guest = Guest::new(process.connect(), ram);
    guest.negotiate(EVENT_IDX | 1);
    guest.share_memory();
    guest.add_queue(64);
    guest.add_queue(CHAINS as u16);
    guest
}

/// Returns `len` bytes that include every value.
fn text(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at ^ at >> 8 ^ at >> 16) as u8).collect()
}

/// Reads exactly `len` bytes.
fn read_exactly(mut from: impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

/// Lets the guest write until the device accepts no more, while the reader reads nothing: the
/// device waits and its memory stays bounded. Then the reader gets all output in order. `read`
/// reads exactly the given number of bytes.
fn slow_reader_gets_it_all(
    process: &Process,
    guest: &mut Guest,
    mut read: impl FnMut(usize) -> Vec<u8>,
) {
    let text = text(CHAINS * CHAIN);
    let at = guest.ram.put(&text);
    let queue = &mut guest.queues[console::TX];
    let before = process.resident();
    for from in (0..text.len()).step_by(CHAIN) {
        queue.add(&[Buffer::readable(at + from as u64, CHAIN as u32)]);
    }
    queue.kick();
    // Wait until the kernel's buffers are full and the device makes no more progress.
    let mut last = (u16::MAX, u64::MAX);
    wait_until("nothing moves any more", || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        let now = (queue.device_used_index(), process.ticks());
        std::mem::replace(&mut last, now) == now
    });
    assert_ne!(last.0, queue.avail_index, "all of it went somewhere");
    assert!(process.resident() < before + (4 << 20), "it hoards");
    // Stopping the queue does not wait for the reader, and the guest continues afterwards.
    let base = guest.stop(console::TX);
    guest.start(console::TX, base);
    assert!(read(text.len()) == text, "bytes are lost or changed");
    assert_eq!(guest.queues[console::TX].wait_all().len(), CHAINS);
}

#[test]
fn file_output_is_appended() {
    let launch = Launch::new("device-console");
    let path = launch.directory().join("output");
    std::fs::write(&path, "before\n").unwrap();
    let process = launch
        .args(["--file".as_ref(), path.as_os_str()])
        .listening();
    let mut guest = boot(&process);
    let text = text(300_000);
    for piece in text.chunks(70_000) {
        send(&mut guest, piece);
    }
    let file = std::fs::read(&path).unwrap();
    assert!(file == [b"before\n", &text[..]].concat());
}

#[test]
fn guest_continues_when_the_file_system_is_full() {
    let process = Launch::new("device-console")
        .args(["--file", "/dev/full"])
        .listening();
    let mut guest = boot(&process);
    for _ in 0..10 {
        send(&mut guest, &text(50_000));
    }
    assert!(process.log().contains("writing the console's file failed"));
}

#[test]
fn size_is_not_offered_without_a_terminal() {
    use vhost::VhostBackend;
    let (process, _path) = unix::start();
    let guest = boot(&process);
    assert_eq!(guest.frontend.get_features().unwrap() & 1, 0);
}

#[test]
fn unusual_descriptor_chains_are_handled() {
    let (process, path) = unix::start();
    let mut client = unix::connect(&path);
    let mut guest = boot(&process);
    let at = guest.ram.put(b"abcdefgh");
    let transmit = &mut guest.queues[console::TX];
    // An empty buffer, a writable buffer in the transmit queue, and a split chain.
    transmit.run(&[Buffer::readable(at, 0)]);
    transmit.run(&[Buffer::writable(at, 8)]);
    let pieces: Vec<_> = (0..8).map(|i| Buffer::readable(at + i, 1)).collect();
    transmit.run(&pieces);
    assert_eq!(read_exactly(&client, 8), b"abcdefgh");

    // Input buffers of size 0; the input waits for a larger one.
    let receive = &mut guest.queues[console::RX];
    receive.add(&[Buffer::readable(at, 8)]);
    receive.add(&[Buffer::writable(at, 0)]);
    receive.kick();
    std::io::Write::write_all(&mut client, b"input").unwrap();
    assert_eq!(console::receive(&mut guest), b"");
    assert_eq!(console::receive(&mut guest), b"");
    for expected in [&b"in"[..], b"pu", b"t"] {
        console::post(&mut guest, 1, 2);
        assert_eq!(console::receive(&mut guest), expected);
    }
}

#[test]
fn refuses_contradictory_options() {
    for args in [
        &["--stdio", "--pty"][..],
        &["--file", "/x", "--unix", "/y"],
        &["--stdio", "--pty-link", "/x"],
        &["--unix-fd", "3", "--pty-link", "/x"],
        &["--pty", "--pty-fd", "3"],
        &["--unix-fd", "3", "--file-fd", "4"],
        &["--backlog-fd", "3"],
        &[],
    ] {
        let process = Launch::new("device-console").args(args).spawn();
        assert_eq!(
            process.wait().code(),
            Some(2),
            "{args:?}: {}",
            process.log()
        );
    }
    for args in [
        ["--file", "/nonexistent/file"],
        ["--unix", "/nonexistent/socket"],
    ] {
        let launch = Launch::new("device-console");
        let path: PathBuf = launch.directory().join("socket");
        let process = launch
            .args(["--socket-path".as_ref(), path.as_os_str()])
            .args(args)
            .spawn();
        assert_eq!(process.wait().code(), Some(1));
        assert_eq!(process.log().lines().count(), 1, "{}", process.log());
    }
}

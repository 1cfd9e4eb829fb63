//! `--unix`: a console on a unix socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use outrigger_tests::console::{post, receive, receive_all, send};
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::{DEADLINE, wait_until};

use crate::{boot, read_exactly, slow_reader_gets_it_all, text};

pub fn start() -> (Process, PathBuf) {
    let launch = Launch::new("device-console");
    let path = launch.directory().join("console");
    let process = launch
        .args(["--unix".as_ref(), path.as_os_str()])
        .listening();
    (process, path)
}

pub fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

#[test]
fn passes_all_bytes_unchanged() {
    let (process, path) = start();
    let mut client = connect(&path);
    let mut guest = boot(&process);
    let bytes = text(100_000);
    for piece in bytes.chunks(9000) {
        send(&mut guest, piece);
        assert!(read_exactly(&client, piece.len()) == piece);
    }
    post(&mut guest, 20, 1000);
    let writer = std::thread::spawn(move || {
        client.write_all(&text(100_000)).unwrap();
        client
    });
    assert!(receive_all(&mut guest, bytes.len()) == bytes);
    writer.join().unwrap();
}

#[test]
fn slow_client_gets_all_output_and_memory_stays_bounded() {
    let (process, path) = start();
    let client = connect(&path);
    let mut guest = boot(&process);
    // The first output shows that the client is accepted.
    send(&mut guest, b"?");
    assert_eq!(read_exactly(&client, 1), b"?");
    slow_reader_gets_it_all(&process, &mut guest, |len| read_exactly(&client, len));
}

#[test]
fn input_waits_for_buffers_of_the_guest() {
    let (process, path) = start();
    let mut client = connect(&path);
    client.set_nonblocking(true).unwrap();
    let mut guest = boot(&process);
    // The client writes as much as fits, and more each time the guest reads.
    let bytes = text(1 << 20);
    let (mut written, mut got) = (0, Vec::new());
    post(&mut guest, 4, 4096);
    while got.len() < bytes.len() {
        written += client.write(&bytes[written..]).unwrap_or(0);
        got.extend(receive_all(&mut guest, 1));
    }
    assert!(got == bytes);
}

#[test]
fn keeps_the_last_output_for_the_next_client() {
    let (process, path) = start();
    let mut guest = boot(&process);
    let bytes = text(200_000);
    for piece in bytes.chunks(10_000) {
        send(&mut guest, piece); // there is no client, and the guest does not wait
    }
    let client = connect(&path);
    assert!(read_exactly(&client, 65_536) == bytes[200_000 - 65_536..]);
    send(&mut guest, b"and on");
    assert_eq!(read_exactly(&client, 6), b"and on");
    wait_until("it says what is lost", || {
        process.log().contains("134464 bytes")
    });
    // Also after the guest has disconnected.
    drop(client);
    send(&mut guest, b"the end");
    drop(guest);
    assert_eq!(read_exactly(connect(&path), 7), b"the end");
}

#[test]
fn one_client_is_served_and_others_wait() {
    let (process, path) = start();
    let mut guest = boot(&process);
    post(&mut guest, 8, 64);
    for round in 0..5u8 {
        let mut first = connect(&path);
        first.write_all(&[b'a', round]).unwrap();
        assert_eq!(receive_all(&mut guest, 2), [b'a', round]);
        let mut second = connect(&path);
        second.write_all(&[b'b', round]).unwrap();
        send(&mut guest, &[b'1', round]);
        assert_eq!(read_exactly(&first, 2), [b'1', round]);
        // Now the second client is served, and its input is not lost.
        drop(first);
        assert_eq!(receive_all(&mut guest, 2), [b'b', round]);
        send(&mut guest, &[b'2', round]);
        assert_eq!(read_exactly(&second, 2), [b'2', round]);
    }
}

#[test]
fn client_that_closes_its_sending_side_stays_connected() {
    let (process, path) = start();
    let client = connect(&path);
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut guest = boot(&process);
    post(&mut guest, 1, 64);
    for _ in 0..3 {
        send(&mut guest, b"still here");
        assert_eq!(read_exactly(&client, 10), b"still here");
    }
}

#[test]
fn input_of_a_client_that_disconnects_at_once_is_delivered() {
    let (process, path) = start();
    let mut guest = boot(&process);
    // These clients disconnect before the guest provides buffers.
    for name in [b"one ", b"two "] {
        connect(&path).write_all(name).unwrap();
    }
    let client = connect(&path);
    send(&mut guest, b"welcome");
    assert_eq!(read_exactly(&client, 7), b"welcome");
    post(&mut guest, 2, 64);
    assert_eq!(receive_all(&mut guest, 8), b"one two ");
}

#[test]
fn input_for_one_guest_is_not_delivered_to_the_next() {
    let (process, path) = start();
    let mut guest = boot(&process);
    connect(&path).write_all(b"secret").unwrap();
    let client = connect(&path);
    send(&mut guest, b"x");
    assert_eq!(read_exactly(&client, 1), b"x"); // so the first client was closed
    drop(guest);
    let mut guest = boot(&process);
    let mut client = client;
    post(&mut guest, 1, 64);
    client.write_all(b"hello").unwrap();
    assert_eq!(receive(&mut guest), b"hello");
}

#[test]
fn stale_socket_is_replaced() {
    let (mut process, path) = start();
    let directory = process.keep_directory();
    drop(process);
    let launch = Launch::new("device-console").args(["--unix".as_ref(), path.as_os_str()]);
    let process = launch.listening();
    let mut client = connect(&path);
    let mut guest = boot(&process);
    send(&mut guest, b"again");
    let mut heard = [0; 5];
    client.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"again");
    drop(directory);
}

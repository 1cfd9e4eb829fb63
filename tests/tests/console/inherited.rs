//! Inherited files: when the process is killed, its successor uses the same files, and neither
//! the guest nor the client at the other end loses data that had arrived.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;

use outrigger_tests::console::{TX, post, receive_all, send};
use outrigger_tests::guest::Guest;
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::queue::Buffer;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::{CHAIN, CHAINS, boot, pty, read_exactly, text, unix};

fn start(option: &str, file: impl AsFd) -> Process {
    let file = file.as_fd().try_clone_to_owned().unwrap();
    Launch::new("device-console").pass(option, file).listening()
}

/// Kills `process`, and connects its guest to the process that `next` starts.
fn replace(process: Process, guest: Guest, next: impl FnOnce() -> Process) -> (Process, Guest) {
    process.signal(Signal::KILL);
    process.wait();
    let next = next();
    let guest = guest.move_to(next.connect());
    (next, guest)
}

/// Lets the guest write as much as fits into its ring. Returns the bytes.
fn write_in_chains(guest: &mut Guest) -> Vec<u8> {
    let text = text(CHAINS * CHAIN);
    let at = guest.ram.put(&text);
    for from in (0..text.len()).step_by(CHAIN) {
        let chain = Buffer::readable(at + from as u64, CHAIN as u32);
        guest.queues[TX].add(&[chain]);
    }
    guest.queues[TX].kick();
    text
}

/// Opens a pseudo-terminal as a launcher does. Returns it with the path of its slave.
fn pseudo_terminal() -> (OwnedFd, std::path::PathBuf) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let path = ptsname(&master, Vec::new()).unwrap();
    (master, path.into_string().unwrap().into())
}

/// Input waits in the terminal until the guest provides buffers, also while no process runs.
#[test]
fn input_is_kept_across_processes() {
    let (master, path) = pseudo_terminal();
    let mut process = start("--pty-fd", &master);
    let mut slave = pty::open(&path);
    let mut guest = boot(&process);
    let typed = text(3000);
    let (mut sent, mut heard) = (0, Vec::new());
    for round in 0..10 {
        // The process is notified of the input, but has no buffer for it.
        slave.write_all(&typed[sent..sent + 200]).unwrap();
        send(&mut guest, b".");
        assert_eq!(read_exactly(&slave, 1), b".");
        (process, guest) = replace(process, guest, || {
            slave.write_all(&typed[sent + 200..sent + 300]).unwrap();
            start("--pty-fd", &master)
        });
        sent += 300;
        post(&mut guest, 3, 100);
        let mut now = receive_all(&mut guest, 300);
        assert!(now == typed[sent - 300..sent], "round {round}");
        heard.append(&mut now);
        // In the next round, another process gets the buffers that wait for input.
        let base = guest.stop(0);
        guest.queues[0].clear();
        guest.start(0, 0);
        assert!(base >= 3);
    }
    assert!(heard == typed);
}

/// The output of a completed chain appears once. At most the chain that was being written
/// appears again from its start.
#[test]
fn output_is_kept_across_processes() {
    let (master, path) = pseudo_terminal();
    let process = start("--pty-fd", &master);
    let slave = pty::open(&path);
    let mut guest = boot(&process);
    let text = write_in_chains(&mut guest);
    let early = read_exactly(&slave, 2 * CHAIN + 1000);
    assert!(early == text[..early.len()]);
    let (_process, mut guest) = replace(process, guest, || start("--pty-fd", &master));
    let done = usize::from(guest.queues[TX].used_index.max(2)) * CHAIN;
    let mut heard = early;
    // At least this much arrives.
    heard.extend(read_exactly(&slave, text.len() - heard.len()));
    // If part of a chain was written twice, there is more to read.
    let same = heard.iter().zip(&text).take_while(|(a, b)| a == b).count();
    if same < text.len() {
        let repeated = (done..text.len())
            .step_by(CHAIN)
            .filter(|begin| same > *begin && same - begin < CHAIN)
            .map(|begin| same - begin)
            .find(|len| heard[same..] == text[same - len..text.len() - len]);
        let repeated = repeated.expect("bytes are lost or changed");
        heard.extend(read_exactly(&slave, repeated));
        assert!(heard[same..] == text[same - repeated..]);
    }
    assert_eq!(guest.queues[TX].wait_all().len(), CHAINS);
}

/// When its queue is stopped in the middle of a chain, the process stores the rest, so that its
/// successor repeats nothing.
#[test]
fn a_stop_during_output_repeats_and_loses_nothing() {
    let (master, path) = pseudo_terminal();
    let backlog = memfd_create("backlog", MemfdFlags::CLOEXEC).unwrap();
    let start = || {
        Launch::new("device-console")
            .pass("--pty-fd", master.try_clone().unwrap())
            .pass("--backlog-fd", backlog.try_clone().unwrap())
            .listening()
    };
    let mut process = start();
    let slave = pty::open(&path);
    let mut guest = boot(&process);
    let text = write_in_chains(&mut guest);
    let mut heard = Vec::new();
    for _ in 0..3 {
        heard.extend(read_exactly(&slave, CHAIN + 1000));
        guest.stop(TX);
        (process, guest) = replace(process, guest, start);
    }
    heard.extend(read_exactly(&slave, text.len() - heard.len()));
    assert!(heard == text, "bytes are lost or repeated");
    assert_eq!(guest.queues[TX].wait_all().len(), CHAINS);
    drop(process);
}

#[test]
fn socket_clients_are_served_by_the_next_process() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let listener = UnixListener::bind(&path).unwrap();
    let process = start("--unix-fd", &listener);
    let mut guest = boot(&process);
    let client = unix::connect(&path);
    send(&mut guest, b"first");
    assert_eq!(read_exactly(&client, 5), b"first");

    let mut early = None;
    let (process, mut guest) = replace(process, guest, || {
        early = Some(unix::connect(&path));
        start("--unix-fd", &listener)
    });
    let mut early = early.unwrap();
    early.write_all(b"typed early").unwrap();
    post(&mut guest, 1, 64);
    assert_eq!(receive_all(&mut guest, 11), b"typed early");
    send(&mut guest, b"second");
    assert_eq!(read_exactly(&early, 6), b"second");
    drop(early);

    // A process without a driver does not accept clients while another has a driver.
    let _other = start("--unix-fd", &listener);
    for _ in 0..20 {
        let client = unix::connect(&path);
        send(&mut guest, b"still");
        assert_eq!(read_exactly(&client, 5), b"still", "{}", process.log());
    }
}

#[test]
fn file_output_continues_in_the_next_process() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("output");
    let file = File::options().create(true).append(true).open(&path);
    let file = file.unwrap();
    let mut process = start("--file-fd", &file);
    let mut guest = boot(&process);
    let text = text(50_000);
    for piece in text.chunks(10_000) {
        send(&mut guest, piece);
        (process, guest) = replace(process, guest, || start("--file-fd", &file));
    }
    assert!(std::fs::read(&path).unwrap() == text);
}

#[test]
fn unread_output_is_kept_across_processes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let listener = UnixListener::bind(&path).unwrap();
    let backlog = memfd_create("backlog", MemfdFlags::CLOEXEC).unwrap();
    let start = || {
        Launch::new("device-console")
            .pass("--unix-fd", listener.try_clone().unwrap().into())
            .pass("--backlog-fd", backlog.try_clone().unwrap())
            .listening()
    };
    let mut process = start();
    let mut guest = boot(&process);
    let text = text(90_000);
    for piece in text.chunks(10_000) {
        send(&mut guest, piece);
        (process, guest) = replace(process, guest, start);
    }
    let client = unix::connect(&path);
    send(&mut guest, b"END");
    let kept = &text[text.len() - (65_536 - 3)..];
    // Without a reader, new output replaces the oldest.
    let heard = read_exactly(&client, 65_536);
    let all = [&text[text.len() - 65_536..], b"END"].concat();
    assert!(heard == all[..65_536] || heard == [kept, b"END"].concat());
}

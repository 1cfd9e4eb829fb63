//! `--pty`: a console on a pseudo-terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use outrigger_tests::console::{post, receive_all, send};
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::{DEADLINE, wait_until};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use vhost::vhost_user::VhostUserFrontend;

use crate::{boot, read_exactly, slow_reader_gets_it_all, text};

fn start() -> (Process, PathBuf) {
    let process = Launch::new("device-console").args(["--pty"]).listening();
    let log = process.log();
    let path = log.split("pseudo-terminal ").nth(1).unwrap().trim();
    (process, path.into())
}

pub fn open(path: &PathBuf) -> File {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)
        .unwrap()
}

#[test]
fn passes_all_bytes_unchanged() {
    let (process, path) = start();
    let mut guest = boot(&process);
    let mut slave = open(&path);
    let bytes = text(20_000);
    for piece in bytes.chunks(1500) {
        send(&mut guest, piece);
        assert!(read_exactly(&slave, piece.len()) == piece);
    }
    post(&mut guest, 8, 256);
    for piece in bytes.chunks(1500) {
        slave.write_all(piece).unwrap();
        assert!(receive_all(&mut guest, piece.len()) == piece);
    }
}

#[test]
fn terminal_does_not_echo_guest_output() {
    // With echo, the terminal would send the guest its own output.
    let (process, path) = start();
    let mut guest = boot(&process);
    post(&mut guest, 1, 64);
    send(&mut guest, b"login: ");
    let mut slave = open(&path);
    assert_eq!(read_exactly(&slave, 7), b"login: ");
    slave.write_all(b"\n").unwrap();
    assert_eq!(receive_all(&mut guest, 1), b"\n");
    assert!(guest.queues[0].take().is_none());
}

#[test]
fn keeps_output_until_the_terminal_is_opened() {
    let (process, path) = start();
    let mut guest = boot(&process);
    let bytes = text(100_000);
    for round in 0..3 {
        for piece in bytes.chunks(10_000) {
            send(&mut guest, piece);
        }
        let slave = open(&path);
        let heard = read_exactly(&slave, 65_536);
        assert!(heard == bytes[100_000 - 65_536..], "round {round}");
    }
}

#[test]
fn slow_reader_gets_all_output_and_memory_stays_bounded() {
    let (process, path) = start();
    let mut guest = boot(&process);
    let slave = open(&path);
    slow_reader_gets_it_all(&process, &mut guest, |len| read_exactly(&slave, len));
}

#[test]
fn reports_size_and_size_changes_to_the_guest() {
    let (process, path) = start();
    let slave = open(&path);
    let size = |ws_col, ws_row| Winsize {
        ws_col,
        ws_row,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&slave, size(100, 30)).unwrap();
    let mut guest = boot(&process);
    assert_eq!(guest.features & 1, 1, "VIRTIO_CONSOLE_F_SIZE");
    let (mut channel, theirs) = UnixStream::pair().unwrap();
    channel.set_read_timeout(Some(DEADLINE)).unwrap();
    guest.frontend.set_backend_request_fd(&theirs).unwrap();
    post(&mut guest, 2, 64);
    send(&mut guest, b"x");
    assert_eq!(guest.config(0, 4), [100, 0, 30, 0]);

    // A change is reported once, with the next input.
    let message = [2u32, 1, 0].map(u32::to_le_bytes).concat();
    for (columns, rows) in [(120, 40), (80, 25)] {
        tcsetwinsize(&slave, size(columns, rows)).unwrap();
        (&slave).write_all(b"x").unwrap();
        let mut got = [0; 12];
        channel.read_exact(&mut got).unwrap();
        while got != message[..] {
            channel.read_exact(&mut got).unwrap();
        }
        wait_until("the size is known", || {
            guest.config(0, 4) == [columns as u8, 0, rows as u8, 0]
        });
    }
}

#[test]
fn creates_a_link_and_replaces_only_links() {
    let directory = tempfile::tempdir().unwrap();
    let link = directory.path().join("tty");
    let launch = || {
        let launch = Launch::new("device-console");
        launch.args(["--pty".as_ref(), "--pty-link".as_ref(), link.as_os_str()])
    };
    for _ in 0..2 {
        let process = launch().listening();
        let mut guest = boot(&process);
        send(&mut guest, b"here");
        let slave = open(&link);
        assert!(
            !tcgetattr(slave.as_fd())
                .unwrap()
                .local_modes
                .contains(rustix::termios::LocalModes::ECHO)
        );
        assert_eq!(read_exactly(&slave, 4), b"here");
    }
    std::fs::remove_file(&link).unwrap();
    std::fs::write(&link, "a file").unwrap();
    let socket = directory.path().join("socket");
    let process = launch()
        .args(["--socket-path".as_ref(), socket.as_os_str()])
        .spawn();
    assert_eq!(process.wait().code(), Some(1));
    assert_eq!(std::fs::read(&link).unwrap(), b"a file");
}

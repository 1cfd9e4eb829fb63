//! `--stdio`: a console on pipes and on a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;

use outrigger_tests::console::{post, receive_all, send};
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::{DEADLINE, wait_until};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Signal;
use rustix::termios::{LocalModes, OutputModes, Termios, Winsize, tcgetattr, tcsetwinsize};
use vhost::vhost_user::VhostUserFrontend;

use crate::{boot, read_exactly, slow_reader_gets_it_all, text};

/// A process with pipes as standard input and output, and both ends of these.
struct Piped {
    process: Process,
    input: File,
    output: File,
    theirs: [OwnedFd; 2],
}

fn piped() -> Piped {
    let (stdin, input) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let (output, stdout) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let theirs = [stdin.try_clone().unwrap(), stdout.try_clone().unwrap()];
    let mut launch = Launch::new("device-console").args(["--stdio"]);
    launch.command().stdin(stdin).stdout(stdout);
    Piped {
        process: launch.listening(),
        input: input.into(),
        output: output.into(),
        theirs,
    }
}

#[test]
fn pipes_pass_all_bytes_unchanged() {
    let mut piped = piped();
    let mut guest = boot(&piped.process);
    let bytes = text(50_000);
    for piece in bytes.chunks(3000) {
        send(&mut guest, piece);
        assert!(read_exactly(&piped.output, piece.len()) == piece);
    }
    post(&mut guest, 8, 512);
    // Ctrl-A has no special meaning without a terminal.
    for piece in [&bytes[..], b"\x01x\x01\x01\x03"] {
        for piece in piece.chunks(3000) {
            piped.input.write_all(piece).unwrap();
            assert!(receive_all(&mut guest, piece.len()) == piece);
        }
    }
    // The process must not set O_NONBLOCK, because other processes share these files.
    for fd in &piped.theirs {
        assert!(!fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK));
    }
}

#[test]
fn end_of_input_does_not_end_output() {
    let mut piped = piped();
    let mut guest = boot(&piped.process);
    post(&mut guest, 2, 64);
    piped.input.write_all(b"last words").unwrap();
    drop(piped.input);
    assert_eq!(receive_all(&mut guest, 10), b"last words");
    for _ in 0..3 {
        send(&mut guest, b"still talking");
        assert_eq!(read_exactly(&piped.output, 13), b"still talking");
    }
}

#[test]
fn guest_continues_when_the_reader_closes() {
    let Piped {
        process,
        output,
        theirs,
        ..
    } = piped();
    drop((output, theirs));
    let mut guest = boot(&process);
    for _ in 0..20 {
        send(&mut guest, &text(50_000));
    }
    assert!(process.is_running());
    assert!(process.resident() < 64 << 20);
}

#[test]
fn slow_reader_gets_all_output_and_memory_stays_bounded() {
    let piped = piped();
    let mut guest = boot(&piped.process);
    slow_reader_gets_it_all(&piped.process, &mut guest, |len| {
        read_exactly(&piped.output, len)
    });
}

#[test]
fn input_from_a_file_is_read_to_the_end() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes = text(30_000);
    std::fs::write(file.path(), &bytes).unwrap();
    let mut launch = Launch::new("device-console").args(["--stdio"]);
    launch.command().stdin(File::open(file.path()).unwrap());
    let process = launch.listening();
    let mut guest = boot(&process);
    post(&mut guest, 4, 1024);
    assert!(receive_all(&mut guest, bytes.len()) == bytes);
}

/// A process with a terminal, of which the test has the other end.
struct TestTerminal {
    process: Process,
    keyboard: File,
    slave: OwnedFd,
}

fn terminal() -> TestTerminal {
    let (mut master, mut slave) = (-1, -1);
    let size = Winsize {
        ws_row: 30,
        ws_col: 100,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let none = std::ptr::null_mut();
    // SAFETY: openpty creates two descriptors that nothing else owns.
    let (master, slave) = unsafe {
        assert_eq!(
            libc::openpty(&mut master, &mut slave, none, none.cast(), none.cast()),
            0
        );
        libc::fcntl(master, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::fcntl(slave, libc::F_SETFD, libc::FD_CLOEXEC);
        (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave))
    };
    tcsetwinsize(&master, size).unwrap();
    let mut launch = Launch::new("device-console").args(["--stdio"]);
    let command = launch.command();
    command.stdin(slave.try_clone().unwrap());
    command.stdout(slave.try_clone().unwrap());
    let own = || {
        rustix::process::setsid()?;
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        Ok(())
    };
    // SAFETY: the closure only makes async-signal-safe system calls.
    unsafe { command.pre_exec(own) };
    TestTerminal {
        process: launch.listening(),
        keyboard: master,
        slave,
    }
}

impl TestTerminal {
    fn mode(&self) -> Termios {
        tcgetattr(&self.slave).unwrap()
    }

    fn is_raw(&self) -> bool {
        let mode = self.mode();
        !mode
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
            && !mode.output_modes.contains(OutputModes::OPOST)
    }

    fn has_saved_mode(&self) -> bool {
        let mode = self.mode();
        let wanted = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        mode.local_modes.contains(wanted) && mode.output_modes.contains(OutputModes::OPOST)
    }
}

#[test]
fn terminal_is_raw_while_the_driver_is_active() {
    let mut terminal = terminal();
    assert!(terminal.has_saved_mode(), "no driver uses it yet");
    for _ in 0..2 {
        let mut guest = boot(&terminal.process);
        assert!(terminal.is_raw());
        let bytes: Vec<u8> = (0..=255).collect();
        send(&mut guest, &bytes);
        assert_eq!(read_exactly(&terminal.keyboard, 256), bytes);
        // All keys reach the guest, including Ctrl-C; Ctrl-A must be pressed twice.
        post(&mut guest, 8, 300);
        let typed: Vec<u8> = [&[1], &bytes[..]].concat();
        assert_eq!(typed[1..3], [0, 1]);
        terminal.keyboard.write_all(&typed[2..]).unwrap();
        assert_eq!(receive_all(&mut guest, 255), bytes[1..]);
        terminal.keyboard.write_all(b"\x01\x01.").unwrap();
        assert_eq!(receive_all(&mut guest, 2), b"\x01.");
        drop(guest);
        wait_until("the terminal is as it was", || terminal.has_saved_mode());
    }
    let log = terminal.process.log();
    assert_eq!(log.matches("Ctrl-A x").count(), 1, "printed once: {log}");
}

#[test]
fn ctrl_a_x_works_although_the_guest_reads_nothing() {
    let mut terminal = terminal();
    let _guest = boot(&terminal.process);
    assert!(terminal.is_raw());
    terminal
        .keyboard
        .write_all(b"input that the guest does not read\x01")
        .unwrap();
    terminal.keyboard.write_all(b"x").unwrap();
    assert_eq!(terminal.process.wait().code(), Some(10));
    assert!(terminal.has_saved_mode());
}

#[test]
fn terminal_is_restored_however_the_process_ends() {
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        let terminal = terminal();
        let _guest = boot(&terminal.process);
        assert!(terminal.is_raw());
        terminal.process.signal(signal);
        assert_eq!(terminal.process.wait().code(), Some(0));
        assert!(terminal.has_saved_mode(), "{signal:?}");
    }
}

#[test]
fn size_change_is_reported_at_once() {
    let terminal = terminal();
    let mut guest = boot(&terminal.process);
    assert_eq!(guest.config(0, 4), [100, 0, 30, 0]);
    let (mut channel, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    channel.set_read_timeout(Some(DEADLINE)).unwrap();
    guest.frontend.set_backend_request_fd(&theirs).unwrap();
    for (columns, rows) in [(132, 43), (80, 25)] {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // The kernel sends SIGWINCH to the foreground process group of the terminal.
        tcsetwinsize(terminal.keyboard.as_fd(), size).unwrap();
        let mut message = [0; 12];
        channel.read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(guest.config(0, 4), [columns as u8, 0, rows as u8, 0]);
    }
}

#[test]
fn slow_terminal_gets_all_output_and_memory_stays_bounded() {
    let terminal = terminal();
    let mut guest = boot(&terminal.process);
    slow_reader_gets_it_all(&terminal.process, &mut guest, |len| {
        read_exactly(&terminal.keyboard, len)
    });
}

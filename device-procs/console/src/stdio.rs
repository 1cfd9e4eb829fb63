//! Standard input and output as console. If input is a terminal, it is put into raw mode
//! while a driver uses the console.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use device_core::{Poller, signals};
use rustix::fs::OFlags;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use crate::backend::{ConsoleBackend, TerminalSize, Written, register};
use crate::escape::Escape;
use crate::stream::{CHUNK, Stream};

// Event tokens.
const INPUT: u64 = 0;
const OUTPUT: u64 = 1;
const RESIZED: u64 = 2;

/// Most input in bytes that is kept while the guest does not read. More is lost, because
/// reading must go on to find Ctrl-A x when the guest hangs.
const MAX_TYPED: usize = 64 * 1024;

/// The standard streams.
pub struct Stdio {
    input: Option<Stream>,
    output: Stream,
    terminal: Option<Terminal>,
    /// Writing has failed, and that is logged.
    output_failed: bool,
}

/// A terminal. It is in raw mode only while a driver uses the console: before and after,
/// messages are displayed normally and Ctrl-C works.
struct Terminal {
    mode: Arc<Mode>,
    raw: bool,
    /// The escape key has been explained to the user.
    explained: bool,
    /// Readable when the size has changed (SIGWINCH).
    resized: OwnedFd,
    escape: Escape,
    /// Input that the guest has not read yet.
    typed: Vec<u8>,
    /// Bytes of input that were lost.
    lost: u64,
}

/// The terminal's mode at the start of the program.
pub struct Mode {
    fd: OwnedFd,
    original: Termios,
}

impl Mode {
    /// Restores the terminal's mode.
    pub fn restore(&self) {
        // On an error there is nothing left to do.
        let _ = tcsetattr(&self.fd, OptionalActions::Now, &self.original);
    }
}

impl Stdio {
    /// Uses the process's standard streams. The process must have one thread, so that all
    /// later threads block SIGWINCH.
    ///
    /// # Errors
    /// A stream is closed.
    pub fn open() -> anyhow::Result<Self> {
        let input = Stream::shared(rustix::stdio::stdin(), OFlags::RDONLY)
            .map_err(|e| anyhow::anyhow!("standard input: {e}"))?;
        let output = Stream::shared(rustix::stdio::stdout(), OFlags::WRONLY)
            .map_err(|e| anyhow::anyhow!("standard output: {e}"))?;
        let terminal = isatty(&input).then(|| Terminal::new(&input)).transpose()?;
        Ok(Stdio {
            input: Some(input),
            output,
            terminal,
            output_failed: false,
        })
    }

    /// The mode to restore at the end, if input is a terminal.
    pub fn mode(&self) -> Option<Arc<Mode>> {
        self.terminal.as_ref().map(|it| Arc::clone(&it.mode))
    }

    /// Reads some bytes. The console goes on after the end of input.
    fn read_some(&mut self, buf: &mut [u8]) -> usize {
        let Some(input) = &self.input else { return 0 };
        match input.read(buf) {
            Ok(0) => {}
            Ok(len) => return len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return 0,
            Err(error) => tracing::warn!(%error, "reading standard input failed"),
        }
        self.input = None;
        0
    }

    /// Reads all input from a terminal in raw mode. Before a driver uses the console, input
    /// stays in the terminal, where the next process finds it.
    fn read_terminal(&mut self) {
        if self.terminal.as_ref().is_some_and(|it| !it.raw) {
            return;
        }
        let mut buf = [0; CHUNK];
        loop {
            let len = self.read_some(&mut buf);
            let Some(terminal) = &mut self.terminal else {
                return;
            };
            if len == 0 {
                return;
            }
            terminal.handle_input(&buf[..len]);
        }
    }
}

impl Terminal {
    fn new(input: &Stream) -> io::Result<Self> {
        let original = tcgetattr(input)?;
        let fd = input.as_fd().try_clone_to_owned()?;
        Ok(Terminal {
            mode: Arc::new(Mode { fd, original }),
            raw: false,
            explained: false,
            resized: resize_events()?,
            escape: Escape::default(),
            typed: Vec::new(),
            lost: 0,
        })
    }

    fn make_raw(&mut self) {
        if std::mem::replace(&mut self.raw, true) {
            return;
        }
        if !std::mem::replace(&mut self.explained, true) {
            eprintln!("console: Ctrl-A x ends it, Ctrl-A Ctrl-A sends Ctrl-A");
        }
        let mut mode = self.mode.original.clone();
        mode.make_raw();
        if let Err(error) = tcsetattr(&self.mode.fd, OptionalActions::Now, &mode) {
            tracing::warn!(%error, "setting the terminal to raw mode failed");
        }
    }

    fn handle_input(&mut self, typed: &[u8]) {
        if self.escape.filter(typed, &mut self.typed) {
            signals::restore();
            std::process::exit(outrigger_cli::CONSOLE_QUIT.into());
        }
        let excess = self.typed.len().saturating_sub(MAX_TYPED);
        if excess > 0 {
            if self.lost == 0 {
                tracing::warn!("the guest does not read its console; input is lost");
            }
            self.lost += excess as u64;
            self.typed.truncate(MAX_TYPED);
        }
    }
}

/// A descriptor that is readable after SIGWINCH (signalfd(2)).
fn resize_events() -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set and sigaddset changes it; the old mask is not
    // requested. signalfd returns a new descriptor, which only `OwnedFd` owns.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGWINCH);
        // Later threads inherit the mask of this one.
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        match libc::signalfd(-1, set.as_ptr(), flags) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

impl ConsoleBackend for Stdio {
    fn register_sources(&mut self, poller: &Poller) -> io::Result<()> {
        if let Some(input) = &self.input {
            register(poller, input, INPUT)?;
        }
        register(poller, &self.output, OUTPUT)?;
        if let Some(terminal) = &self.terminal {
            poller.add_readable(&terminal.resized, RESIZED)?;
        }
        Ok(())
    }

    fn handle_event(&mut self, token: u64, _poller: &Poller) {
        let Some(terminal) = &mut self.terminal else {
            return;
        };
        if token == RESIZED {
            // The event's content does not matter: the size is read again anyway.
            let mut event = [0; size_of::<libc::signalfd_siginfo>()];
            while rustix::io::read(&terminal.resized, &mut event).is_ok() {}
        } else {
            self.read_terminal();
        }
    }

    fn driver_connected(&mut self) {
        if let Some(terminal) = &mut self.terminal {
            terminal.make_raw();
        }
    }

    fn driver_disconnected(&mut self) {
        if let Some(terminal) = &mut self.terminal {
            terminal.mode.restore();
            terminal.raw = false;
            terminal.typed.clear();
        }
    }

    fn read(&mut self, buf: &mut [u8], _poller: &Poller) -> usize {
        if self.terminal.is_none() {
            return self.read_some(buf);
        }
        self.read_terminal();
        let Some(terminal) = &mut self.terminal else {
            return 0;
        };
        let len = terminal.typed.len().min(buf.len());
        buf[..len].copy_from_slice(&terminal.typed[..len]);
        terminal.typed.drain(..len);
        len
    }

    fn write(&mut self, bytes: &[u8], _poller: &Poller) -> Written {
        match self.output.write(bytes) {
            Ok(len) => Written::Some(len),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Written::Full,
            Err(error) => {
                if !std::mem::replace(&mut self.output_failed, true) {
                    tracing::warn!(%error, "writing standard output failed");
                }
                Written::Absent
            }
        }
    }

    fn size(&self) -> Option<TerminalSize> {
        let terminal = self.terminal.as_ref()?;
        let size = tcgetwinsize(&terminal.mode.fd).ok()?;
        Some((size.ws_col, size.ws_row))
    }
}

//! Standard input and output; if input is a terminal, the guest gets it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use device_core::{Poller, signals};
use rustix::fs::OFlags;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use crate::backend::{ConsoleBackend, TerminalSize, Written, watch};
use crate::escape::Escape;
use crate::stream::{CHUNK, Stream};

const INPUT: u64 = 0;
const OUTPUT: u64 = 1;
const RESIZED: u64 = 2;

/// What may have been typed while the guest takes nothing, in bytes. More is
/// lost: reading on is what finds the way out of a guest that hangs.
const TYPED: usize = 64 * 1024;

/// The standard streams.
pub struct Stdio {
    input: Option<Stream>,
    output: Stream,
    terminal: Option<Terminal>,
    gone: bool,
}

/// A terminal that the guest has while its driver is there; before and after, it
/// is like any other, so that messages look as they should and Ctrl-C works.
struct Terminal {
    mode: Arc<Mode>,
    raw: bool,
    announced: bool,
    /// Readable when its size has changed (SIGWINCH).
    resized: OwnedFd,
    escape: Escape,
    typed: Vec<u8>,
    lost: u64,
}

/// How the terminal was when we came.
pub struct Mode {
    fd: OwnedFd,
    original: Termios,
}

impl Mode {
    /// Makes the terminal what it was.
    pub fn restore(&self) {
        // Nobody is left to be told.
        let _ = tcsetattr(&self.fd, OptionalActions::Now, &self.original);
    }
}

impl Stdio {
    /// Takes the standard streams of the process, which must have one thread.
    ///
    /// # Errors
    /// When one is closed.
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
            gone: false,
        })
    }

    /// The mode to put the terminal into at the end, if it is one.
    pub fn mode(&self) -> Option<Arc<Mode>> {
        self.terminal.as_ref().map(|it| Arc::clone(&it.mode))
    }

    /// Reads some bytes; the end of input ends only the input.
    fn read_some(&mut self, buf: &mut [u8]) -> usize {
        let Some(input) = &self.input else { return 0 };
        match input.read(buf) {
            Ok(0) => {}
            Ok(len) => return len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return 0,
            Err(error) => tracing::warn!("standard input: {error}"),
        }
        self.input = None;
        0
    }

    /// Takes all that has been typed to the guest. What is typed before its driver comes
    /// waits in the terminal, where a process that takes over finds it.
    fn pump(&mut self) {
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
            terminal.take(&buf[..len]);
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
            announced: false,
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
        if !std::mem::replace(&mut self.announced, true) {
            eprintln!("console: Ctrl-A x ends it, Ctrl-A Ctrl-A sends Ctrl-A");
        }
        let mut mode = self.mode.original.clone();
        mode.make_raw();
        if let Err(error) = tcsetattr(&self.mode.fd, OptionalActions::Now, &mode) {
            tracing::warn!("the terminal does not become raw: {error}");
        }
    }

    fn take(&mut self, typed: &[u8]) {
        if self.escape.filter(typed, &mut self.typed) {
            signals::finish();
            std::process::exit(outrigger_cli::CONSOLE_QUIT.into());
        }
        let excess = self.typed.len().saturating_sub(TYPED);
        if excess > 0 {
            if self.lost == 0 {
                tracing::warn!("the guest reads nothing; input is lost");
            }
            self.lost += excess as u64;
            self.typed.truncate(TYPED);
        }
    }
}

/// A descriptor that is readable after SIGWINCH (signalfd(2)).
fn resize_events() -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set and sigaddset changes it; the old mask
    // is not asked for. signalfd makes a descriptor that nobody else owns.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGWINCH);
        // In this thread, and so in all that it starts later.
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        match libc::signalfd(-1, set.as_ptr(), flags) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

impl ConsoleBackend for Stdio {
    fn attach(&mut self, poller: &Poller) -> io::Result<()> {
        if let Some(input) = &self.input {
            watch(poller, input, INPUT)?;
        }
        watch(poller, &self.output, OUTPUT)?;
        if let Some(terminal) = &self.terminal {
            poller.add_readable(&terminal.resized, RESIZED)?;
        }
        Ok(())
    }

    fn ready(&mut self, token: u64, _poller: &Poller) {
        let Some(terminal) = &mut self.terminal else {
            return;
        };
        if token == RESIZED {
            // What it says is known; the size itself is asked for each time.
            let mut event = [0; size_of::<libc::signalfd_siginfo>()];
            while rustix::io::read(&terminal.resized, &mut event).is_ok() {}
        } else {
            self.pump();
        }
    }

    fn opened(&mut self) {
        if let Some(terminal) = &mut self.terminal {
            terminal.make_raw();
        }
    }

    fn closed(&mut self) {
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
        self.pump();
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
                if !std::mem::replace(&mut self.gone, true) {
                    tracing::warn!("standard output: {error}");
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

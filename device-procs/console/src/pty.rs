//! A pseudo-terminal (pty(7)). This process holds the master; users open the slave, any
//! number of times.

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use device_core::Poller;
use rustix::fs::{Mode, OFlags, inotify};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcgetwinsize, tcsetattr};

use crate::backend::{ConsoleBackend, TerminalSize, Written};
use crate::stream::Stream;

// Event tokens.
const MASTER: u64 = 0;
const OPENED: u64 = 1;

/// A pseudo-terminal's master.
pub struct Pty {
    master: Stream,
    path: PathBuf,
    /// Readable when a process opens the slave, which the master does not report
    /// (inotify(7)).
    opened: OwnedFd,
}

impl Pty {
    /// Makes a pseudo-terminal in raw mode.
    ///
    /// # Errors
    /// openpt(3) fails, for example because no pseudo-terminals are left.
    pub fn open() -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        Self::new(master)
    }

    /// Uses an inherited master of an unlocked pseudo-terminal.
    ///
    /// # Errors
    /// It is not the master of an unlocked pseudo-terminal.
    pub fn adopt(fd: RawFd) -> io::Result<Self> {
        let master = device_core::fd::inherit(fd)?;
        Self::new(master).map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::NOTTY) => io::Error::other("not the master of a pseudo-terminal"),
            Some(Errno::IO) => io::Error::other("a pseudo-terminal that is not unlocked"),
            _ => error,
        })
    }

    fn new(master: OwnedFd) -> io::Result<Self> {
        let name = ptsname(&master, Vec::new())?;
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(name.as_bytes()));
        // The mode stays after this slave is closed. Once a slave was open, the master
        // reports a hang-up while there is none.
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(&path, flags, Mode::empty())?;
        let mut mode = tcgetattr(&slave)?;
        mode.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &mode)?;
        let opened = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(&opened, &path, inotify::WatchFlags::OPEN)?;
        Ok(Pty {
            master: Stream::own(master)?,
            path,
            opened,
        })
    }

    /// Path of the slave.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes `link` a symbolic link to the slave. It replaces a symbolic link that a previous
    /// process left, but no other file.
    ///
    /// # Errors
    /// symlink(2) fails.
    pub fn link(&self, link: &Path) -> io::Result<()> {
        if link.symlink_metadata().is_ok_and(|it| it.is_symlink()) {
            std::fs::remove_file(link)?;
        }
        std::os::unix::fs::symlink(&self.path, link)
    }
}

impl ConsoleBackend for Pty {
    fn register_sources(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(&self.master, MASTER)?;
        poller.add_readable(&self.opened, OPENED)
    }

    fn handle_event(&mut self, token: u64, _poller: &Poller) {
        if token == OPENED {
            // The event's content does not matter: the caller writes the backlog now.
            let mut events = [0; 1024];
            while rustix::io::read(&self.opened, &mut events).is_ok() {}
        }
    }

    fn read(&mut self, buf: &mut [u8], _poller: &Poller) -> usize {
        // EIO: no process has the slave open.
        self.master.read(buf).unwrap_or(0)
    }

    fn write(&mut self, bytes: &[u8], _poller: &Poller) -> Written {
        if self.master.is_hung_up() {
            return Written::Absent;
        }
        match self.master.write(bytes) {
            Ok(0) => Written::Full,
            Ok(len) => Written::Some(len),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Written::Full,
            Err(_) => Written::Absent,
        }
    }

    /// The kernel signals a change of size to the slave's users and not to the master, so
    /// the size is read again at each batch.
    fn size(&self) -> Option<TerminalSize> {
        let size = tcgetwinsize(self.master.as_fd()).ok()?;
        Some((size.ws_col, size.ws_row))
    }
}

//! A file as console: output only.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use device_core::Poller;
use rustix::fs::OFlags;

use crate::backend::{ConsoleBackend, Written, register};
use crate::stream::Stream;

/// A file to which output is appended.
pub struct File {
    stream: Stream,
    /// The last write failed, and that is logged.
    failed: bool,
}

impl File {
    /// Opens or creates the file.
    ///
    /// # Errors
    /// open(2) fails.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .custom_flags(flags.bits() as i32)
            .open(path)?;
        Ok(File {
            stream: Stream::own(OwnedFd::from(file))?,
            failed: false,
        })
    }

    /// Uses an inherited descriptor.
    ///
    /// # Errors
    /// It is not open for writing.
    pub fn adopt(fd: RawFd) -> io::Result<Self> {
        let fd = device_core::fd::inherit_open_for(fd, false, true)?;
        Ok(File {
            stream: Stream::shared(fd.as_fd(), OFlags::WRONLY)?,
            failed: false,
        })
    }
}

impl ConsoleBackend for File {
    fn register_sources(&mut self, poller: &Poller) -> io::Result<()> {
        register(poller, &self.stream, 0)
    }

    fn read(&mut self, _buf: &mut [u8], _poller: &Poller) -> usize {
        0
    }

    fn write(&mut self, bytes: &[u8], _poller: &Poller) -> Written {
        match self.stream.write(bytes) {
            Ok(len) => {
                self.failed = false;
                Written::Some(len)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Written::Full,
            Err(error) => {
                if !std::mem::replace(&mut self.failed, true) {
                    tracing::error!(%error, "writing the console's file failed");
                }
                Written::Absent
            }
        }
    }
}

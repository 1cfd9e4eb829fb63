//! A file: output only.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use device_core::Poller;
use rustix::fs::OFlags;

use crate::backend::{ConsoleBackend, Written, watch};
use crate::stream::Stream;

/// A file that output is appended to.
pub struct File {
    stream: Stream,
    failed: bool,
}

impl File {
    /// Opens or creates it.
    ///
    /// # Errors
    /// open(2)'s own.
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

    /// Takes over a file that somebody else has opened for writing.
    ///
    /// # Errors
    /// When there is none.
    pub fn adopt(fd: RawFd) -> io::Result<Self> {
        let fd = device_core::fd::inherit_open_for(fd, false, true)?;
        Ok(File {
            stream: Stream::shared(fd.as_fd(), OFlags::WRONLY)?,
            failed: false,
        })
    }
}

impl ConsoleBackend for File {
    fn attach(&mut self, poller: &Poller) -> io::Result<()> {
        watch(poller, &self.stream, 0)
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
                    tracing::error!("writing the file: {error}");
                }
                Written::Absent
            }
        }
    }
}

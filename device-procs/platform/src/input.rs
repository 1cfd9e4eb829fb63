//! The serial line's input: standard input. A terminal keeps its mode, so input arrives
//! line by line.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::PollFlags;
use rustix::io::Errno;

use crate::wait::is_ready;

/// The source of input.
pub struct Input {
    /// `None` after the end of input.
    fd: Option<OwnedFd>,
    ready: bool,
}

impl Input {
    /// Standard input.
    ///
    /// # Errors
    /// It is closed.
    pub fn stdin() -> io::Result<Self> {
        Ok(Input {
            fd: Some(rustix::stdio::stdin().try_clone_to_owned()?),
            ready: true,
        })
    }

    /// No input.
    pub fn none() -> Self {
        Input {
            fd: None,
            ready: false,
        }
    }

    /// The descriptor to wait for.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// There may be something to read.
    pub fn set_ready(&mut self) {
        self.ready = self.fd.is_some();
    }

    /// Whether there may be something to read.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Reads available input into `buffer`; returns its length.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        let Some(fd) = self.fd.as_ref().filter(|_| self.ready) else {
            return 0;
        };
        // Other processes share the open file, which may block.
        if !is_ready(fd, PollFlags::IN) {
            self.ready = false;
            return 0;
        }
        match rustix::io::read(fd, buffer) {
            Ok(0) => *self = Input::none(),
            Ok(len) => return len,
            Err(Errno::INTR | Errno::AGAIN) => self.ready = false,
            Err(error) => {
                tracing::warn!(%error, "serial: reading failed; there is no more input");
                *self = Input::none();
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_is_read_without_blocking_until_it_ends() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut input = Input {
            fd: Some(reader),
            ready: true,
        };
        let mut buffer = [0; 4];
        assert_eq!(input.read(&mut buffer), 0);
        assert!(!input.is_ready());
        rustix::io::write(&writer, b"abcdef").unwrap();
        input.set_ready();
        assert_eq!(input.read(&mut buffer), 4);
        assert_eq!(input.read(&mut buffer), 2);
        drop(writer);
        assert_eq!(input.read(&mut buffer), 0);
        assert!(input.fd().is_none());
        input.set_ready();
        assert!(!input.is_ready());
    }
}

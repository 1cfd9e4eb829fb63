//! What a console can be connected to.

use std::io;

use device_core::Poller;

/// What became of bytes that were to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// The first so many are gone.
    Some(usize),
    /// Whoever reads is slow: a source reports when there is room.
    Full,
    /// Nobody is there to read them.
    Absent,
}

/// Columns and rows of a terminal.
pub type TerminalSize = (u16, u16);

/// The other end of the console. No method waits.
pub trait ConsoleBackend: Send {
    /// Registers its descriptors.
    ///
    /// # Errors
    /// epoll(7)'s.
    fn attach(&mut self, poller: &Poller) -> io::Result<()>;

    /// A descriptor registered as `token` is ready; reading and writing come
    /// afterwards, in any case.
    fn ready(&mut self, _token: u64, _poller: &Poller) {}

    /// A driver has come.
    fn opened(&mut self) {}

    /// The driver has left.
    fn closed(&mut self) {}

    /// Reads input; returns its length, 0 when there is none now.
    fn read(&mut self, buf: &mut [u8], poller: &Poller) -> usize;

    /// Writes output, some of it.
    fn write(&mut self, bytes: &[u8], poller: &Poller) -> Written;

    /// The terminal's size, if it is a terminal.
    fn size(&self) -> Option<TerminalSize> {
        None
    }
}

/// Registers `fd`, which may be a regular file: that never has to be waited for.
///
/// # Errors
/// epoll(7)'s.
pub fn watch(poller: &Poller, fd: impl std::os::fd::AsFd, token: u64) -> io::Result<()> {
    match poller.add(fd, token) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        result => result,
    }
}

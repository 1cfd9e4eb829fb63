//! The interface to what a console is connected to on the host.

use std::io;

use device_core::Poller;

/// Result of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// This many bytes from the start were written.
    Some(usize),
    /// There is no room now. An event source becomes ready when there is.
    Full,
    /// There is no reader.
    Absent,
}

/// Columns and rows of a terminal.
pub type TerminalSize = (u16, u16);

/// The host side of the console. No method blocks.
pub trait ConsoleBackend: Send {
    /// Registers its descriptors with `poller`.
    ///
    /// # Errors
    /// epoll_ctl(2) fails.
    fn register_sources(&mut self, poller: &Poller) -> io::Result<()>;

    /// A descriptor that was registered with `token` is ready. The caller tries to read and
    /// write afterwards in any case.
    fn handle_event(&mut self, _token: u64, _poller: &Poller) {}

    /// A driver has started to use the console.
    fn driver_connected(&mut self) {}

    /// The driver is gone.
    fn driver_disconnected(&mut self) {}

    /// Reads input; returns its length, which is 0 when there is none now.
    fn read(&mut self, buf: &mut [u8], poller: &Poller) -> usize;

    /// Writes some of the output in `bytes`.
    fn write(&mut self, bytes: &[u8], poller: &Poller) -> Written;

    /// The terminal's size; `None` for anything but a terminal.
    fn size(&self) -> Option<TerminalSize> {
        None
    }
}

/// Registers `fd`. A regular file, which epoll refuses, is always ready and needs no
/// registration.
///
/// # Errors
/// epoll_ctl(2) fails.
pub fn register(poller: &Poller, fd: impl std::os::fd::AsFd, token: u64) -> io::Result<()> {
    match poller.add(fd, token) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        result => result,
    }
}

//! Descriptors that are read and written without ever waiting.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use device_core::fd::set_nonblocking;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::retry_on_intr;

/// Most bytes of one write: what a pipe or a terminal that is writable takes
/// without blocking (pipe(7)).
pub const CHUNK: usize = 4096;

/// A descriptor.
pub struct Stream {
    fd: OwnedFd,
    /// The open file is others' as well, so that it may block.
    shared: bool,
}

impl Stream {
    /// A descriptor whose open file nobody else uses.
    ///
    /// # Errors
    /// fcntl(2)'s.
    pub fn own(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        Ok(Stream { fd, shared: false })
    }

    /// One of the standard streams, or another that somebody else uses, too. Whether to
    /// block is a property of the open file, which we have inherited and share with
    /// whoever started us. So it is opened again where that works; a socket, a file, which has a position that
    /// is good to share, and somebody else's terminal are used with a look before
    /// each step.
    ///
    /// # Errors
    /// When it is closed.
    pub fn shared(fd: BorrowedFd<'_>, access: OFlags) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if matches!(kind, FileType::CharacterDevice | FileType::Fifo)
            && let Ok(fd) = rustix::fs::open(path, flags, Mode::empty())
        {
            return Ok(Stream { fd, shared: false });
        }
        let fd = rustix::io::fcntl_dupfd_cloexec(fd, 3)?;
        Ok(Stream { fd, shared: true })
    }

    fn would_block(&self, wanted: PollFlags) -> bool {
        self.shared
            && !self
                .poll(wanted)
                .intersects(wanted | PollFlags::HUP | PollFlags::ERR)
    }

    fn poll(&self, wanted: PollFlags) -> PollFlags {
        let mut fds = [PollFd::new(&self.fd, wanted)];
        let now = Timespec::default();
        match retry_on_intr(|| poll(&mut fds, Some(&now))) {
            Ok(_) => fds[0].revents(),
            Err(_) => PollFlags::empty(),
        }
    }

    /// Whether nobody has the other end.
    pub fn is_hung_up(&self) -> bool {
        self.poll(PollFlags::empty()).contains(PollFlags::HUP)
    }

    /// Reads some bytes; 0 is the end.
    ///
    /// # Errors
    /// `WouldBlock` when there are none, or the kernel's.
    pub fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        if self.would_block(PollFlags::IN) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(retry_on_intr(|| rustix::io::read(&self.fd, &mut *buf))?)
    }

    /// Writes some of the first [`CHUNK`] of `bytes`.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room, or the kernel's.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        if self.would_block(PollFlags::OUT) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let bytes = &bytes[..bytes.len().min(CHUNK)];
        Ok(retry_on_intr(|| rustix::io::write(&self.fd, bytes))?)
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::fcntl_getfl;

    fn kind<T>(result: io::Result<T>) -> Option<io::ErrorKind> {
        result.err().map(|error| error.kind())
    }

    #[test]
    fn inherited_pipes_do_not_block_and_stay_as_they_are() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let input = Stream::shared(reader.as_fd(), OFlags::RDONLY).unwrap();
        let output = Stream::shared(writer.as_fd(), OFlags::WRONLY).unwrap();
        let mut buf = [0; CHUNK];
        assert_eq!(kind(input.read(&mut buf)), Some(io::ErrorKind::WouldBlock));
        while output.write(&[7; 10_000]).is_ok() {}
        assert_eq!(kind(output.write(b"x")), Some(io::ErrorKind::WouldBlock));
        assert_eq!(input.read(&mut buf).unwrap(), CHUNK);
        assert_eq!(output.write(&[7; 10_000]).unwrap(), CHUNK);
        for fd in [&reader, &writer] {
            assert!(!fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK));
        }
    }

    #[test]
    fn inherited_sockets_do_not_block_and_stay_as_they_are() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let stream = Stream::shared(ours.as_fd(), OFlags::RDWR).unwrap();
        let mut buf = [0; 16];
        assert_eq!(kind(stream.read(&mut buf)), Some(io::ErrorKind::WouldBlock));
        while stream.write(&[7; CHUNK]).is_ok() {}
        assert_eq!(kind(stream.write(b"x")), Some(io::ErrorKind::WouldBlock));
        assert!(!fcntl_getfl(&ours).unwrap().contains(OFlags::NONBLOCK));
        assert!(!stream.is_hung_up());
        drop(theirs);
        assert!(stream.is_hung_up());
        assert_eq!(kind(stream.write(b"x")), Some(io::ErrorKind::BrokenPipe));
    }
}

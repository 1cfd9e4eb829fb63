//! Descriptors that are read and written without blocking.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use device_core::fd::set_nonblocking;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::retry_on_intr;

/// Most bytes of one write: a writable pipe or terminal takes that many without blocking
/// (PIPE_BUF in pipe(7)).
pub const CHUNK: usize = 4096;

/// A descriptor that never blocks.
pub struct Stream {
    fd: OwnedFd,
    /// Other processes share the open file, so it may block.
    shared: bool,
}

impl Stream {
    /// Wraps a descriptor whose open file no other process uses.
    ///
    /// # Errors
    /// fcntl(2) fails.
    pub fn own(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        Ok(Stream { fd, shared: false })
    }

    /// Wraps a standard stream or another descriptor that other processes use, too.
    /// O_NONBLOCK belongs to the open file, which is shared with them, so it must not be
    /// set there. Pipes and devices are opened again instead. Where that fails, and for
    /// sockets and regular files (whose position is to be shared), poll(2) precedes each call.
    ///
    /// # Errors
    /// The descriptor is closed.
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

    /// Whether the other end is closed.
    pub fn is_hung_up(&self) -> bool {
        self.poll(PollFlags::empty()).contains(PollFlags::HUP)
    }

    /// Reads some bytes; 0 is the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` when there is no input, otherwise the error of read(2).
    pub fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        if self.would_block(PollFlags::IN) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(retry_on_intr(|| rustix::io::read(&self.fd, &mut *buf))?)
    }

    /// Writes some of `bytes`, at most [`CHUNK`].
    ///
    /// # Errors
    /// `WouldBlock` when there is no room, otherwise the error of write(2).
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
    fn inherited_pipes_do_not_block_and_keep_their_flags() {
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
    fn inherited_sockets_do_not_block_and_keep_their_flags() {
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

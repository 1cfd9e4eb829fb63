//! The destinations of output: `--serial` and `--debug-console`.
//!
//! A regular file gets every byte exactly once, whether this program opens it or inherits
//! it: each byte has its offset, so a second write after a kill does no harm. In other
//! files, and in files that are open for appending, the piece that was being written when
//! the process was killed is written again.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::fs::{FileType, OFlags, fcntl_getfl};
use rustix::io::Errno;

use crate::state::OutputStream;
use crate::wait::is_ready;

/// Most bytes of one write: a writable pipe takes that many without blocking (PIPE_BUF in
/// pipe(7)).
pub const CHUNK: usize = 4096;
/// Time after which a failed write to a file is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// A value of `--serial` or `--debug-console`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutputTarget {
    /// Standard output, and for the serial line standard input.
    Stdio,
    /// Standard error.
    Stderr,
    /// A file, which is created or appended to.
    File(PathBuf),
    /// An inherited file, which is appended to.
    Fd(RawFd),
    /// Output is discarded.
    Null,
}

impl OutputTarget {
    /// Parses `stdio|file=PATH|fd=N|null`.
    ///
    /// # Errors
    /// `text` has another form; the error lists the allowed ones.
    pub fn serial(text: &str) -> Result<Self, String> {
        match text {
            "stdio" => Ok(OutputTarget::Stdio),
            _ => Self::common(text).ok_or_else(|| "must be stdio, file=PATH, fd=N or null".into()),
        }
    }

    /// Parses `stderr|file=PATH|fd=N|null`.
    ///
    /// # Errors
    /// `text` has another form; the error lists the allowed ones.
    pub fn debug(text: &str) -> Result<Self, String> {
        match text {
            "stderr" => Ok(OutputTarget::Stderr),
            _ => Self::common(text).ok_or_else(|| "must be stderr, file=PATH, fd=N or null".into()),
        }
    }

    fn common(text: &str) -> Option<Self> {
        match text.split_once('=') {
            None if text == "null" => Some(OutputTarget::Null),
            Some(("file", path)) if !path.is_empty() => Some(OutputTarget::File(path.into())),
            Some(("fd", number)) => {
                let number = number.parse().ok().filter(|&number| number >= 0);
                number.map(OutputTarget::Fd)
            }
            _ => None,
        }
    }
}

/// An open destination.
enum Sink {
    Null,
    /// A regular file that is written at offsets, and its device and inode numbers.
    File(File, [u64; 2]),
    /// Any other file.
    Stream(OwnedFd),
}

/// Why output cannot be written now.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Blocked {
    /// The reader is slow: epoll reports when there is room.
    Full,
    /// A write failed; it is tried again at this time.
    Until(Instant),
}

/// An output with its state.
pub struct Output {
    name: &'static str,
    sink: Sink,
    blocked: Option<Blocked>,
    /// Bytes that were dropped since the output was last drained.
    dropped: u64,
}

impl Output {
    /// Opens `target`.
    ///
    /// # Errors
    /// The file cannot be opened; the error names the option and the file.
    pub fn open(name: &'static str, target: &OutputTarget) -> anyhow::Result<Self> {
        let sink = match target {
            OutputTarget::Null => Ok(Sink::Null),
            OutputTarget::Stdio => {
                reopen("/proc/self/fd/1", rustix::stdio::stdout()).map(Sink::Stream)
            }
            OutputTarget::Stderr => {
                reopen("/proc/self/fd/2", rustix::stdio::stderr()).map(Sink::Stream)
            }
            OutputTarget::File(path) => open(path),
            OutputTarget::Fd(fd) => adopt(*fd),
        };
        let sink = sink.map_err(|error| match target {
            OutputTarget::Fd(fd) => anyhow::anyhow!("--{name} fd={fd}: {error}"),
            OutputTarget::File(path) => {
                anyhow::anyhow!("--{name} file={}: {error}", path.display())
            }
            _ => anyhow::anyhow!("--{name}: {error}"),
        })?;
        Ok(Output {
            name,
            sink,
            blocked: None,
            dropped: 0,
        })
    }

    /// Whether both write to the same regular file.
    pub fn is_same_file(&self, other: &Output) -> bool {
        matches!((&self.sink, &other.sink), (Sink::File(_, a), Sink::File(_, b)) if a == b)
    }

    /// Aligns `stream` with the file at the start of a session: output goes on at the end
    /// of the file if the stream is new, began in another file, or if another process
    /// truncated or wrote to the file.
    ///
    /// # Errors
    /// fstat(2) fails.
    pub fn align(&mut self, stream: &mut OutputStream) -> io::Result<()> {
        self.blocked = None;
        if let Sink::File(file, identity) = &self.sink {
            let size = rustix::fs::fstat(file)?.st_size as u64;
            // The previous process may have died between writing bytes and removing them
            // from the ring. Any other size means that another process changed the file.
            let written = size.wrapping_sub(stream.base.wrapping_add(stream.tail));
            if stream.file != *identity || written > stream.pending() {
                stream.base = size.wrapping_sub(stream.tail);
                stream.file = *identity;
            }
        }
        Ok(())
    }

    /// Writes some of `bytes`, which start at position `stream.tail`; returns how many are
    /// finished, which is 0 when the output is blocked.
    pub fn write(&mut self, stream: &OutputStream, bytes: &[u8]) -> usize {
        if self.blocked.is_some() {
            return 0;
        }
        let written = match &self.sink {
            Sink::Null => return bytes.len(),
            Sink::File(file, _) => {
                rustix::io::pwrite(file, bytes, stream.base.wrapping_add(stream.tail))
            }
            Sink::Stream(fd) if !is_ready(fd, PollFlags::OUT) => Err(Errno::AGAIN),
            Sink::Stream(fd) => rustix::io::write(fd, bytes),
        };
        match (written, &self.sink) {
            (Ok(len), _) => return len,
            (Err(Errno::INTR), _) => {}
            (Err(Errno::AGAIN), _) => self.blocked = Some(Blocked::Full),
            (Err(error), Sink::File(..)) => {
                tracing::warn!(%error, "{}: writing failed; it is tried again each second", self.name);
                self.blocked = Some(Blocked::Until(Instant::now() + RETRY));
            }
            (Err(error), _) => {
                tracing::warn!(%error, "{}: writing failed; there is no more output", self.name);
                self.sink = Sink::Null;
                return bytes.len();
            }
        }
        0
    }

    /// Counts a byte that is dropped because the ring is full. Logged once until
    /// [`Output::set_drained`].
    pub fn drop_byte(&mut self) {
        if self.dropped == 0 {
            tracing::warn!(
                "{}: the reader does not read; new output is dropped",
                self.name
            );
        }
        self.dropped += 1;
    }

    /// All output is written.
    pub fn set_drained(&mut self) {
        let dropped = std::mem::take(&mut self.dropped);
        if dropped > 0 {
            tracing::warn!(
                "{}: the reader reads again; {dropped} bytes were lost",
                self.name
            );
        }
    }

    /// Why it cannot write now.
    pub fn blocked(&self) -> Option<Blocked> {
        self.blocked
    }

    /// Lets the next write be tried.
    pub fn unblock(&mut self) {
        self.blocked = None;
    }

    /// The descriptor to wait for.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.sink {
            Sink::Stream(fd) => Some(fd.as_fd()),
            _ => None,
        }
    }
}

/// Opens a standard stream again, as an open file of our own. O_NONBLOCK belongs to the open
/// file, and other processes share the inherited one. Where that is not possible (a socket,
/// another user's terminal), poll(2) precedes each small write.
fn reopen(path: &str, inherited: BorrowedFd) -> io::Result<OwnedFd> {
    // Regular files are not opened again, because the offset belongs to the open file, too,
    // and must be shared.
    let kind = FileType::from_raw_mode(rustix::fs::fstat(inherited)?.st_mode);
    if kind != FileType::RegularFile
        && let Ok(file) = options().open(path)
    {
        return Ok(file.into());
    }
    inherited.try_clone_to_owned()
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    options.write(true).custom_flags(flags.bits() as i32);
    options
}

fn open(path: &Path) -> io::Result<Sink> {
    sink(options().create(true).open(path)?)
}

fn adopt(fd: RawFd) -> io::Result<Sink> {
    let fd = device_core::fd::inherit_open_for(fd, false, true)?;
    // pwrite(2) ignores the offset in a file that is open for appending.
    if fcntl_getfl(&fd)?.contains(OFlags::APPEND) {
        return Ok(Sink::Stream(fd));
    }
    sink(fd.into())
}

fn sink(file: File) -> io::Result<Sink> {
    let stat = rustix::fs::fstat(&file)?;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Sink::File(file, [stat.st_dev, stat.st_ino]),
        _ => Sink::Stream(file.into()),
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    fn write_all(output: &mut Output, stream: &mut OutputStream, bytes: &[u8]) {
        stream.head += bytes.len() as u64;
        output.align(stream).unwrap();
        let len = output.write(stream, bytes);
        assert_eq!(len, bytes.len());
        stream.tail += len as u64;
    }

    #[test]
    fn targets_parse() {
        assert_eq!(OutputTarget::serial("stdio"), Ok(OutputTarget::Stdio));
        assert_eq!(
            OutputTarget::debug("file=a=b"),
            Ok(OutputTarget::File("a=b".into()))
        );
        assert_eq!(OutputTarget::debug("null"), Ok(OutputTarget::Null));
        assert_eq!(OutputTarget::serial("fd=7"), Ok(OutputTarget::Fd(7)));
        for wrong in [
            "", "stderr", "file", "file=", "null=", "pty", "fd", "fd=", "fd=-1", "fd=x",
        ] {
            assert!(OutputTarget::serial(wrong).is_err(), "{wrong}");
        }
        assert!(OutputTarget::debug("stdio").is_err());
    }

    #[test]
    fn bytes_written_to_a_file_twice_appear_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "old ").unwrap();
        let target = OutputTarget::File(path.clone());
        let mut output = Output::open("serial", &target).unwrap();
        let mut stream = OutputStream::default();
        write_all(&mut output, &mut stream, b"one ");
        // The successor does not know that "two " is written.
        let mut copy = stream;
        write_all(&mut output, &mut stream, b"two ");
        let mut successor = Output::open("serial", &target).unwrap();
        write_all(&mut successor, &mut copy, b"two three ");
        assert_eq!(std::fs::read(&path).unwrap(), b"old one two three ");
        // A truncated file and a new file: output goes on at the end, without a hole.
        std::fs::write(&path, "").unwrap();
        write_all(&mut successor, &mut copy, b"four ");
        assert_eq!(std::fs::read(&path).unwrap(), b"four ");
        let other = dir.path().join("other");
        let mut output = Output::open("serial", &OutputTarget::File(other.clone())).unwrap();
        write_all(&mut output, &mut copy, b"five");
        assert_eq!(std::fs::read(&other).unwrap(), b"five");
        assert!(!output.is_same_file(&successor));
    }

    #[test]
    fn an_inherited_file_is_written_at_offsets_unless_it_is_open_for_appending() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let open = |append: bool| {
            let mut options = File::options();
            options.create(true).write(true).append(append);
            let fd = options.open(&path).unwrap().into_raw_fd();
            Output::open("serial", &OutputTarget::Fd(fd)).unwrap()
        };
        let mut stream = OutputStream::default();
        write_all(&mut open(false), &mut stream, b"one ");
        let mut copy = stream;
        write_all(&mut open(false), &mut stream, b"two ");
        write_all(&mut open(false), &mut copy, b"two three ");
        assert_eq!(std::fs::read(&path).unwrap(), b"one two three ");
        write_all(&mut open(true), &mut copy, b"four");
        assert_eq!(std::fs::read(&path).unwrap(), b"one two three four");
        assert!(open(true).fd().is_some() && open(false).fd().is_none());
    }

    #[test]
    fn a_full_pipe_blocks_and_a_broken_one_discards() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut output = Output {
            name: "test",
            sink: Sink::Stream(writer),
            blocked: None,
            dropped: 0,
        };
        let stream = OutputStream::default();
        let mut total = 0;
        loop {
            match output.write(&stream, &[0; CHUNK]) {
                0 => break,
                len => total += len,
            }
        }
        assert!(total >= CHUNK);
        assert!(output.blocked() == Some(Blocked::Full));
        drop(reader);
        output.unblock();
        assert_eq!(output.write(&stream, b"xy"), 2);
        assert!(output.fd().is_none());
    }
}

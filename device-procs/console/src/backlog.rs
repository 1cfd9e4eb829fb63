//! Output that nobody was there to read.
//!
//! It is kept in a file, so that it can outlive this process in one that is inherited.
//! Each step leaves the file such that a successor finds all that was acknowledged to
//! the guest.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// Bytes that are kept.
const SIZE: usize = 64 * 1024;

/// What a file that is in use begins with.
const MAGIC: u64 = u64::from_le_bytes(*b"backlog1");
// Offsets in the file. The counters are of all bytes that there ever were.
const MAGIC_AT: usize = 0;
/// Bytes that were kept.
const HEAD_AT: usize = 8;
/// Bytes that were read or discarded.
const TAIL_AT: usize = 16;
/// Bytes that were discarded, until that was told.
const LOST_AT: usize = 24;
const BYTES_AT: usize = 64;
const LEN: usize = BYTES_AT + SIZE;

/// The last [`SIZE`] bytes. What is older is discarded and counted.
pub struct Backlog(MmapRegion<()>);

impl Backlog {
    /// An empty one, which goes with this process.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new() -> io::Result<Self> {
        let memory = memfd_create("backlog", MemfdFlags::CLOEXEC)?;
        Self::within(memory.into())
    }

    /// The one in a file that somebody else keeps; an empty file becomes one.
    ///
    /// # Errors
    /// When there is no such file, or something else is in it.
    pub fn adopt(fd: RawFd) -> io::Result<Self> {
        Self::within(device_core::fd::inherit_open_for(fd, true, true)?.into())
    }

    fn within(file: File) -> io::Result<Self> {
        match fstat(&file)?.st_size {
            0 => ftruncate(&file, LEN as u64)?,
            len if len == LEN as i64 => {}
            _ => return Err(io::Error::other("neither empty nor a backlog")),
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, 0), LEN);
        let backlog = Backlog(mapping.map_err(io::Error::other)?);
        let (magic, head, tail) = (
            backlog.load(MAGIC_AT),
            backlog.load(HEAD_AT),
            backlog.load(TAIL_AT),
        );
        let new = (magic, head, tail) == (0, 0, 0);
        if !new && (magic != MAGIC || head.wrapping_sub(tail) > SIZE as u64) {
            return Err(io::Error::other("neither empty nor a backlog"));
        }
        backlog.store(MAGIC_AT, MAGIC);
        Ok(backlog)
    }

    fn load(&self, offset: usize) -> u64 {
        let place = self.0.get_atomic_ref::<AtomicU64>(offset);
        place.map_or(0, |place| place.load(Ordering::Acquire))
    }

    fn store(&self, offset: usize, value: u64) {
        // The places are within the mapping, and aligned.
        if let Ok(place) = self.0.get_atomic_ref::<AtomicU64>(offset) {
            place.store(value, Ordering::Release);
        }
    }

    /// How many bytes are kept; never more than there is room for, whatever another
    /// process writes there.
    fn len(&self) -> usize {
        let kept = self.load(HEAD_AT).wrapping_sub(self.load(TAIL_AT));
        kept.min(SIZE as u64) as usize
    }

    /// Calls `copy` with the one or two pieces of `count` bytes from the position `from`
    /// on, and with where each begins in them.
    fn pieces(
        &self,
        from: u64,
        count: usize,
        mut copy: impl FnMut(usize, vm_memory::VolatileSlice),
    ) {
        let at = (from % SIZE as u64) as usize;
        let first = count.min(SIZE - at);
        for (begin, at, len) in [(0, at, first), (first, 0, count - first)] {
            // They are within the mapping.
            if let Ok(slice) = self.0.get_slice(BYTES_AT + at, len) {
                copy(begin, slice);
            }
        }
    }

    /// How many bytes fit in without any being discarded.
    pub fn room(&self) -> usize {
        SIZE - self.len()
    }

    /// Keeps `bytes`, which come after all that is here.
    pub fn keep(&mut self, bytes: &[u8]) {
        let excess = (self.len() + bytes.len()).saturating_sub(SIZE);
        self.store(LOST_AT, self.load(LOST_AT).wrapping_add(excess as u64));
        self.take(excess.min(self.len()));
        let bytes = &bytes[bytes.len().saturating_sub(SIZE)..];
        let head = self.load(HEAD_AT);
        self.pieces(head, bytes.len(), |begin, slice| {
            slice.copy_from(&bytes[begin..begin + slice.len()]);
        });
        self.store(HEAD_AT, head.wrapping_add(bytes.len() as u64));
    }

    /// Copies the oldest bytes to `buf`, as many as there is room for; returns how many.
    pub fn oldest(&self, buf: &mut [u8]) -> usize {
        let count = self.len().min(buf.len());
        self.pieces(self.load(TAIL_AT), count, |begin, slice| {
            slice.copy_to(&mut buf[begin..begin + slice.len()]);
        });
        count
    }

    /// The first `count` bytes have been read.
    pub fn take(&mut self, count: usize) {
        let count = count.min(self.len()) as u64;
        self.store(TAIL_AT, self.load(TAIL_AT).wrapping_add(count));
    }

    /// How many bytes were discarded since the last time that this was asked.
    pub fn take_lost(&mut self) -> u64 {
        let lost = self.load(LOST_AT);
        self.store(LOST_AT, 0);
        lost
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    fn all(backlog: &mut Backlog) -> Vec<u8> {
        let mut all = Vec::new();
        let mut buf = [0; 1000];
        loop {
            match backlog.oldest(&mut buf) {
                0 => return all,
                len => {
                    backlog.take(len);
                    all.extend(&buf[..len]);
                }
            }
        }
    }

    #[test]
    fn the_last_bytes_are_kept_in_order() {
        let mut backlog = Backlog::new().unwrap();
        let stream: Vec<u8> = (0..3 * SIZE).map(|at| (at % 251) as u8).collect();
        for piece in stream.chunks(1000) {
            backlog.keep(piece);
        }
        assert_eq!(backlog.take_lost(), 2 * SIZE as u64);
        assert!(all(&mut backlog) == stream[2 * SIZE..]);
        assert_eq!(backlog.take_lost(), 0);
    }

    #[test]
    fn one_piece_may_be_more_than_there_is_room_for() {
        let mut backlog = Backlog::new().unwrap();
        backlog.keep(b"old");
        let stream: Vec<u8> = (0..SIZE + 10).map(|at| (at % 251) as u8).collect();
        backlog.keep(&stream);
        assert_eq!(backlog.take_lost(), 13);
        assert!(all(&mut backlog) == stream[10..]);
    }

    #[test]
    fn a_successor_finds_what_was_kept() {
        let file = tempfile::tempfile().unwrap();
        let adopt = |file: &File| Backlog::adopt(file.try_clone().unwrap().into_raw_fd());
        let mut backlog = adopt(&file).unwrap();
        backlog.keep(b"first second");
        backlog.take(6);
        drop(backlog);
        let mut backlog = adopt(&file).unwrap();
        assert_eq!(all(&mut backlog), b"second");
        drop(backlog);

        for len in [1, LEN - 1] {
            file.set_len(len as u64).unwrap();
            assert!(adopt(&file).is_err());
        }
        std::os::unix::fs::FileExt::write_all_at(&file, b"something else", 0).unwrap();
        file.set_len(LEN as u64).unwrap();
        assert!(adopt(&file).is_err());
    }
}

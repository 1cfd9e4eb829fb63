//! Output that is kept while there is no reader.
//!
//! It lies in a file, so that it outlives this process if the file is inherited. After
//! each step the file contains all output that was completed to the guest, so a successor
//! can go on at any point.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// Capacity in bytes.
const SIZE: usize = 64 * 1024;

/// Marks a file that contains a backlog.
const MAGIC: u64 = u64::from_le_bytes(*b"backlog1");
// Offsets in the file. The counters count all bytes since the file was created.
const MAGIC_AT: usize = 0;
/// Bytes that were appended.
const HEAD_AT: usize = 8;
/// Bytes that were read or discarded.
const TAIL_AT: usize = 16;
/// Bytes that were discarded and not reported yet.
const LOST_AT: usize = 24;
const BYTES_AT: usize = 64;
const LEN: usize = BYTES_AT + SIZE;

/// A ring buffer of the last [`SIZE`] bytes. Older bytes are discarded and counted.
pub struct Backlog(MmapRegion<()>);

impl Backlog {
    /// An empty backlog in memory, which is lost with this process.
    ///
    /// # Errors
    /// memfd_create(2) or mmap(2) fails.
    pub fn new() -> io::Result<Self> {
        let memory = memfd_create("backlog", MemfdFlags::CLOEXEC)?;
        Self::open(memory.into())
    }

    /// The backlog in an inherited file; an empty file is initialised.
    ///
    /// # Errors
    /// The descriptor is not open for reading and writing, or the file contains something
    /// else.
    pub fn adopt(fd: RawFd) -> io::Result<Self> {
        Self::open(device_core::fd::inherit_open_for(fd, true, true)?.into())
    }

    fn open(file: File) -> io::Result<Self> {
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
        // Never fails: all offsets are aligned and within the mapping.
        if let Ok(place) = self.0.get_atomic_ref::<AtomicU64>(offset) {
            place.store(value, Ordering::Release);
        }
    }

    /// Number of bytes that are kept; never above the capacity, whatever another process
    /// writes to the file.
    fn len(&self) -> usize {
        let kept = self.load(HEAD_AT).wrapping_sub(self.load(TAIL_AT));
        kept.min(SIZE as u64) as usize
    }

    /// Calls `copy` for the one or two contiguous pieces of the `count` bytes at position
    /// `from`, with the offset of each piece in those bytes.
    fn pieces(
        &self,
        from: u64,
        count: usize,
        mut copy: impl FnMut(usize, vm_memory::VolatileSlice),
    ) {
        let at = (from % SIZE as u64) as usize;
        let first = count.min(SIZE - at);
        for (begin, at, len) in [(0, at, first), (first, 0, count - first)] {
            // Never fails: the pieces are within the mapping.
            if let Ok(slice) = self.0.get_slice(BYTES_AT + at, len) {
                copy(begin, slice);
            }
        }
    }

    /// Number of bytes that can be appended without discarding any.
    pub fn room(&self) -> usize {
        SIZE - self.len()
    }

    /// Appends `bytes`; discards the oldest bytes if there is no room.
    pub fn append(&mut self, bytes: &[u8]) {
        let excess = (self.len() + bytes.len()).saturating_sub(SIZE);
        self.store(LOST_AT, self.load(LOST_AT).wrapping_add(excess as u64));
        self.consume(excess.min(self.len()));
        let bytes = &bytes[bytes.len().saturating_sub(SIZE)..];
        let head = self.load(HEAD_AT);
        self.pieces(head, bytes.len(), |begin, slice| {
            slice.copy_from(&bytes[begin..begin + slice.len()]);
        });
        self.store(HEAD_AT, head.wrapping_add(bytes.len() as u64));
    }

    /// Copies the oldest bytes to `buf`, as many as fit; returns how many.
    pub fn peek(&self, buf: &mut [u8]) -> usize {
        let count = self.len().min(buf.len());
        self.pieces(self.load(TAIL_AT), count, |begin, slice| {
            slice.copy_to(&mut buf[begin..begin + slice.len()]);
        });
        count
    }

    /// Removes the oldest `count` bytes.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.len()) as u64;
        self.store(TAIL_AT, self.load(TAIL_AT).wrapping_add(count));
    }

    /// Number of bytes that were discarded since the last call.
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
            match backlog.peek(&mut buf) {
                0 => return all,
                len => {
                    backlog.consume(len);
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
            backlog.append(piece);
        }
        assert_eq!(backlog.take_lost(), 2 * SIZE as u64);
        assert!(all(&mut backlog) == stream[2 * SIZE..]);
        assert_eq!(backlog.take_lost(), 0);
    }

    #[test]
    fn an_append_larger_than_the_capacity_keeps_its_end() {
        let mut backlog = Backlog::new().unwrap();
        backlog.append(b"old");
        let stream: Vec<u8> = (0..SIZE + 10).map(|at| (at % 251) as u8).collect();
        backlog.append(&stream);
        assert_eq!(backlog.take_lost(), 13);
        assert!(all(&mut backlog) == stream[10..]);
    }

    #[test]
    fn a_successor_finds_what_was_kept() {
        let file = tempfile::tempfile().unwrap();
        let adopt = |file: &File| Backlog::adopt(file.try_clone().unwrap().into_raw_fd());
        let mut backlog = adopt(&file).unwrap();
        backlog.append(b"first second");
        backlog.consume(6);
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

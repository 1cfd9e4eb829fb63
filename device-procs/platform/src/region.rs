//! The runner's shared region. It contains the platform's own area, which makes this process
//! replaceable. Offsets are relative to `trap::STATE_OFFSET`:
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0 | 12 | magic, version, selector (32 bits each) |
//! | 1 KiB | 1 KiB | first copy of [`PlatformState`] |
//! | 2 KiB | 1 KiB | second copy |
//! | 4 KiB | 16 KiB | ring of the serial line's output |
//! | 20 KiB | 4 KiB | ring of the debug console's output |
//!
//! The selector says which copy is current. A request is carried out in this order: the
//! new state is written to the other copy, the selector changes (one store, which makes the
//! request happen), and the slot is completed. So a successor finds either all effects of a
//! request or none, and can tell which, because the state contains the last request carried
//! out and its answer. Bytes in a ring are valid once the state's `head` includes them.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use outrigger_protocol::trap::{
    MAGIC, MAX_VCPUS, REGION_SIZE, SLOTS_OFFSET, STATE_OFFSET, STATE_SIZE, TrapHeader, TrapSlot,
    VERSION,
};
use rustix::fs::SealFlags;
use rustix::mm::{MapFlags, ProtFlags};
use zerocopy::{FromBytes, IntoBytes};

use crate::error::Error;
use crate::state::{OutputStream, PlatformState, STREAMS};

/// "ORPS" in little-endian order.
const AREA_MAGIC: u32 = 0x5350_524f;
/// Version of the area and of [`PlatformState`].
const AREA_VERSION: u32 = 1;

/// Offsets of the two copies.
const COPIES: [usize; 2] = [1024, 2048];
const COPY_WORDS: usize = size_of::<PlatformState>() / 8;
/// Offset and size of the rings.
const RINGS: [(usize, usize); STREAMS] = [(4096, 16 * 1024), (20 * 1024, 4096)];
/// Sizes of the rings in bytes.
pub const RING_SIZES: [usize; STREAMS] = [RINGS[0].1, RINGS[1].1];

const _: () = assert!(size_of::<PlatformState>().is_multiple_of(8));
const _: () = assert!(size_of::<PlatformState>() <= COPIES[1] - COPIES[0]);
const _: () = assert!(COPIES[1] + size_of::<PlatformState>() <= RINGS[0].0);
const _: () = assert!(RINGS[0].0 + RINGS[0].1 <= RINGS[1].0);
const _: () = assert!(RINGS[1].0 + RINGS[1].1 <= STATE_SIZE);

/// The start of the area.
#[repr(C)]
struct AreaHeader {
    magic: AtomicU32,
    version: AtomicU32,
    selector: AtomicU32,
}

/// The region, mapped.
pub struct StateRegion {
    start: *mut u8,
    vcpus: usize,
    /// Index of the current copy.
    current: Cell<usize>,
}

impl StateRegion {
    /// Maps the region that came with the runner's Hello, for `vcpus` vCPUs.
    ///
    /// # Errors
    /// Its size, seals or header are wrong, or `vcpus` is out of range.
    pub fn map(fd: &OwnedFd, vcpus: u32) -> Result<Self, Error> {
        let count = vcpus as usize;
        if count == 0 || count > MAX_VCPUS {
            return Err(Error::Region(format!("{vcpus} vCPUs, but 1 to 64 fit")));
        }
        let size = rustix::fs::fstat(fd)
            .map_err(Error::io("the region's size"))?
            .st_size;
        if size != REGION_SIZE as i64 {
            return Err(Error::Region(format!(
                "{size} bytes instead of {REGION_SIZE}"
            )));
        }
        // Without the seal another process could shrink the file and cause SIGBUS here.
        let sealed =
            rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if !sealed {
            return Err(Error::Region("not a memfd sealed against shrinking".into()));
        }
        // SAFETY: the kernel chooses the address of the new mapping, so it replaces none.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                REGION_SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )
        }
        .map_err(Error::io("mapping the region"))?;
        let region = StateRegion {
            start: start.cast(),
            vcpus: count,
            current: Cell::new(0),
        };
        let header = region.header();
        let found = [&header.magic, &header.version, &header.vcpus]
            .map(|field| field.load(Ordering::Acquire));
        if found != [MAGIC, VERSION, vcpus] {
            return Err(Error::Region(format!(
                "its header says magic {:#x}, version {}, {} vCPUs",
                found[0], found[1], found[2]
            )));
        }
        Ok(region)
    }

    /// The header that runner and platform share.
    pub fn header(&self) -> &TrapHeader {
        self.at(0)
    }

    /// The slots, one for each vCPU.
    pub fn slots(&self) -> &[TrapSlot] {
        let first: *const TrapSlot = self.at(SLOTS_OFFSET);
        // SAFETY: `map` has checked that all slots lie within the region, which stays
        // mapped as long as `self`; slots consist of atomics.
        unsafe { std::slice::from_raw_parts(first, self.vcpus) }
    }

    /// Loads the state that the previous process left; `None` in a new region.
    ///
    /// # Errors
    /// The state is invalid, or of another version.
    pub fn load(&self) -> Result<Option<PlatformState>, Error> {
        let area = self.area_header();
        if area.magic.load(Ordering::Acquire) != AREA_MAGIC {
            return Ok(None);
        }
        let version = area.version.load(Ordering::Relaxed);
        if version != AREA_VERSION {
            return Err(Error::Region(format!(
                "registers of version {version}, this program knows {AREA_VERSION}"
            )));
        }
        let current = area.selector.load(Ordering::Acquire) as usize;
        let Some(&copy) = COPIES.get(current) else {
            return Err(Error::Region(format!(
                "its selector is {current}, not 0 or 1"
            )));
        };
        let mut words = [0u64; COPY_WORDS];
        for (word, kept) in words.iter_mut().zip(self.copy(copy)) {
            *word = kept.load(Ordering::Relaxed);
        }
        let state = PlatformState::read_from_bytes(words.as_bytes())
            .map_err(|_| Error::Region("the registers have an invalid value".into()))?;
        state
            .check(RING_SIZES)
            .map_err(|why| Error::Region(why.into()))?;
        self.current.set(current);
        Ok(Some(state))
    }

    /// Writes the first state to a new region.
    pub fn initialise(&self, state: &PlatformState) {
        self.commit(state);
        let area = self.area_header();
        area.version.store(AREA_VERSION, Ordering::Relaxed);
        area.magic.store(AREA_MAGIC, Ordering::Release);
    }

    /// Makes `state` current, atomically.
    pub fn commit(&self, state: &PlatformState) {
        let next = 1 - self.current.get();
        for (bytes, word) in state
            .as_bytes()
            .chunks_exact(8)
            .zip(self.copy(COPIES[next]))
        {
            let mut value = [0; 8];
            value.copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(value), Ordering::Relaxed);
        }
        self.area_header()
            .selector
            .store(next as u32, Ordering::Release);
        self.current.set(next);
    }

    /// Appends a byte to ring `at` and advances `stream`; returns false when the ring is full.
    pub fn push(&self, at: usize, stream: &mut OutputStream, byte: u8) -> bool {
        let ring = self.ring(at);
        if stream.pending() >= ring.len() as u64 {
            return false;
        }
        ring[stream.head as usize % ring.len()].store(byte, Ordering::Relaxed);
        stream.head = stream.head.wrapping_add(1);
        true
    }

    /// Copies the oldest unwritten bytes of ring `at` to `buffer`; returns how many.
    pub fn peek(&self, at: usize, stream: &OutputStream, buffer: &mut [u8]) -> usize {
        let ring = self.ring(at);
        let len = (stream.pending() as usize).min(buffer.len());
        for (i, byte) in buffer[..len].iter_mut().enumerate() {
            let position = (stream.tail as usize).wrapping_add(i);
            *byte = ring[position % ring.len()].load(Ordering::Relaxed);
        }
        len
    }

    fn area_header(&self) -> &AreaHeader {
        self.at(STATE_OFFSET)
    }

    fn copy(&self, offset: usize) -> &[AtomicU64; COPY_WORDS] {
        self.at(STATE_OFFSET + offset)
    }

    fn ring(&self, at: usize) -> &[AtomicU8] {
        let (offset, size) = RINGS[at];
        let first: *const AtomicU8 = self.at(STATE_OFFSET + offset);
        // SAFETY: the assertions above show that the rings lie within the region, which stays
        // mapped as long as `self`.
        unsafe { std::slice::from_raw_parts(first, size) }
    }

    /// The object at `offset`. `T` consists of atomics and fits there.
    fn at<T>(&self, offset: usize) -> &T {
        debug_assert!(offset + size_of::<T>() <= REGION_SIZE);
        // SAFETY: this function is private, and all offsets in this module are constants that
        // are aligned for their types and lie within the region, which stays mapped as long
        // as `self`. Other processes change it at any time, but `T` consists of atomics.
        unsafe { &*self.start.add(offset).cast::<T>() }
    }
}

impl Drop for StateRegion {
    fn drop(&mut self) {
        // SAFETY: no borrow of the region outlives `self`. If munmap fails, the region stays
        // mapped, which does no harm.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), REGION_SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::SERIAL;
    use rustix::fs::MemfdFlags;

    fn region() -> (OwnedFd, StateRegion) {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("test", flags).unwrap();
        rustix::fs::ftruncate(&fd, REGION_SIZE as u64).unwrap();
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        rustix::io::pwrite(&fd, [MAGIC, VERSION, 2].as_bytes(), 0).unwrap();
        let region = StateRegion::map(&fd, 2).unwrap();
        (fd, region)
    }

    #[test]
    fn a_successor_finds_the_last_committed_state() {
        let (fd, region) = region();
        assert!(region.load().unwrap().is_none());
        let mut state = PlatformState::power_on();
        region.initialise(&state);
        for seq in 0..5 {
            state.set_applied(1, seq, u64::from(seq));
            region.commit(&state);
            let successor = StateRegion::map(&fd, 2).unwrap();
            assert_eq!(successor.load().unwrap(), Some(state));
            // A partly written copy is not seen.
            let other = COPIES[1 - region.current.get()];
            for word in region.copy(other) {
                word.store(u64::MAX, Ordering::Relaxed);
            }
            assert_eq!(successor.load().unwrap(), Some(state));
        }
    }

    #[test]
    fn invalid_regions_are_refused() {
        let (fd, region) = region();
        region.initialise(&PlatformState::power_on());
        assert!(StateRegion::map(&fd, 3).is_err());
        let put = |offset: usize, value: u32| {
            rustix::io::pwrite(&fd, value.as_bytes(), offset as u64).unwrap();
        };
        put(STATE_OFFSET + 8, 2);
        assert!(region.load().is_err());
        put(STATE_OFFSET + 8, 1);
        put(STATE_OFFSET + 4, 77);
        assert!(region.load().unwrap_err().to_string().contains("77"));
        put(4, 9);
        assert!(StateRegion::map(&fd, 2).is_err());
    }

    #[test]
    fn a_ring_returns_bytes_in_order_up_to_its_size() {
        let (_fd, region) = region();
        // Positions wrap within this test.
        let mut stream = OutputStream {
            head: u64::MAX - 5,
            tail: u64::MAX - 5,
            ..OutputStream::default()
        };
        let mut taken = 0;
        while region.push(SERIAL, &mut stream, taken as u8) {
            taken += 1;
        }
        assert_eq!(taken, RING_SIZES[SERIAL]);
        let mut buffer = vec![0; taken + 1];
        assert_eq!(region.peek(SERIAL, &stream, &mut buffer), taken);
        assert!((0..taken).all(|i| buffer[i] == i as u8));
    }
}

//! A split virtqueue as it lies in guest memory (virtio 1.2 section 2.7): its three
//! areas are looked up once, and are plain atomic numbers from then on.
//!
//! The driver changes them at any time. So each function here is one load or one store,
//! and what was loaded is all that counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{AtomicInteger, GuestAddress, GuestMemoryBackend};

use crate::GuestMemory;

/// Length of a descriptor in bytes, and the alignment of their table.
pub(crate) const DESCRIPTOR: u32 = 16;
/// Length of the flags and the index before the elements of the used ring, in bytes.
const HEADER: u64 = 4;
/// Length of an element of the used ring, in bytes.
const ELEMENT: u64 = 8;

/// One descriptor (virtio 1.2 section 2.7.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// Where the buffer begins.
    pub address: GuestAddress,
    /// Length of the buffer in bytes.
    pub len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// From its 16 bytes, two words of which the lower half comes first.
    pub fn from_words([address, rest]: [u64; 2]) -> Self {
        let (address, rest) = (u64::from_le(address), u64::from_le(rest));
        Descriptor {
            address: GuestAddress(address),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    fn has(self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }

    /// The one that follows in the chain.
    pub fn next(self) -> Option<u16> {
        self.has(VRING_DESC_F_NEXT).then_some(self.next)
    }

    /// Whether the device writes to the buffer.
    pub fn is_writable(self) -> bool {
        self.has(VRING_DESC_F_WRITE)
    }

    /// Whether the buffer is a table of further descriptors.
    pub fn is_indirect(self) -> bool {
        self.has(VRING_DESC_F_INDIRECT)
    }
}

/// Where a ring is, in guest-physical addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingLayout {
    pub descriptors: GuestAddress,
    pub available: GuestAddress,
    pub used: GuestAddress,
}

/// The areas of one ring. The references are good as long as `_memory`, and no function
/// returns one.
pub(crate) struct SplitRing {
    size: u16,
    /// Whether wishes for notifications are indices (VIRTIO_F_EVENT_IDX), not flags.
    event_idx: bool,
    /// Two words each.
    descriptors: &'static [AtomicU64],
    /// Flags, index, heads, and the used index at which the driver wants an interrupt.
    available: &'static [AtomicU16],
    /// Flags and index.
    used: &'static [AtomicU16],
    /// Head and length each.
    elements: &'static [AtomicU32],
    /// The available index at which the device wants its doorbell rung.
    wake: &'static [AtomicU16],
    /// Keeps all this mapped.
    _memory: Arc<GuestMemory>,
}

const FLAGS: usize = 0;
const INDEX: usize = 1;
const HEADS: usize = 2;

impl SplitRing {
    /// A ring of `size` entries, which is a power of two. `None` if an area is not aligned
    /// as it must be (virtio 1.2 section 2.7), or not in one piece of memory.
    pub fn new(
        memory: &Arc<GuestMemory>,
        place: RingLayout,
        size: u16,
        event_idx: bool,
    ) -> Option<Self> {
        let count = usize::from(size);
        let elements = GuestAddress(place.used.0.checked_add(HEADER)?);
        let wake = GuestAddress(elements.0.checked_add(ELEMENT * u64::from(size))?);
        // The used ring is one area, too: its parts must not be in different regions.
        let used_len = HEADER + ELEMENT * u64::from(size) + 2;
        memory.get_slice(place.used, used_len as usize).ok()?;
        // SAFETY: the references are kept beside `_memory`, and nowhere else.
        unsafe {
            Some(SplitRing {
                size,
                event_idx,
                descriptors: area(memory, place.descriptors, 2 * count, DESCRIPTOR.into())?,
                available: area(memory, place.available, HEADS + count + 1, 2)?,
                used: area(memory, place.used, HEADS, 4)?,
                elements: area(memory, elements, 2 * count, 4)?,
                wake: area(memory, wake, 1, 2)?,
                _memory: Arc::clone(memory),
            })
        }
    }

    /// Whether wishes for notifications are indices.
    pub fn set_event_idx(&mut self, on: bool) {
        self.event_idx = on;
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The place of index `index` in a ring.
    fn slot(&self, index: u16) -> usize {
        usize::from(index) & (usize::from(self.size) - 1)
    }

    /// Up to where the driver has made requests available.
    pub fn available_index(&self) -> u16 {
        u16::from_le(self.available[INDEX].load(Ordering::Acquire))
    }

    /// The head at `index` of the available ring.
    pub fn head(&self, index: u16) -> u16 {
        u16::from_le(self.available[HEADS + self.slot(index)].load(Ordering::Relaxed))
    }

    /// The descriptor `index`. `None` if there is none.
    pub fn descriptor(&self, index: u16) -> Option<Descriptor> {
        let at = 2 * usize::from(index);
        let words = self.descriptors.get(at..at + 2)?;
        Some(Descriptor::from_words([
            words[0].load(Ordering::Relaxed),
            words[1].load(Ordering::Relaxed),
        ]))
    }

    /// Up to where requests are completed.
    pub fn used_index(&self) -> u16 {
        u16::from_le(self.used[INDEX].load(Ordering::Acquire))
    }

    /// Puts a completed request at `index` of the used ring; the driver does not see it yet.
    pub fn complete(&self, index: u16, head: u16, written: u32) {
        let at = 2 * self.slot(index);
        self.elements[at].store(u32::from(head).to_le(), Ordering::Relaxed);
        self.elements[at + 1].store(written.to_le(), Ordering::Relaxed);
    }

    /// Lets the driver see what is completed before `index`.
    pub fn publish(&self, index: u16) {
        self.used[INDEX].store(index.to_le(), Ordering::Release);
    }

    /// Asks the driver not to ring. With indices the one that was asked for last is in the
    /// past, so it does not.
    pub fn disable_doorbell(&self) {
        if !self.event_idx {
            self.used[FLAGS].store((VRING_USED_F_NO_NOTIFY as u16).to_le(), Ordering::Relaxed);
        }
    }

    /// Asks the driver to ring for what it makes available from `next` on; returns whether
    /// there is some already, for which it may not ring (virtio 1.2 section 2.7.10).
    pub fn enable_doorbell(&self, next: u16) -> bool {
        if self.event_idx {
            self.wake[0].store(next.to_le(), Ordering::Relaxed);
        } else {
            self.used[FLAGS].store(0, Ordering::Relaxed);
        }
        // The wish must be visible before the look.
        fence(Ordering::SeqCst);
        self.available_index() != next
    }

    /// Whether the driver wants an interrupt for what was completed from `old` up to `new`
    /// (virtio 1.2 section 2.7.7).
    pub fn wants_interrupt(&self, old: u16, new: u16) -> bool {
        // The used index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let last = HEADS + usize::from(self.size);
            let event = u16::from_le(self.available[last].load(Ordering::Relaxed));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = u16::from_le(self.available[FLAGS].load(Ordering::Relaxed));
            u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }
}

/// `count` numbers from `address` on, which is a multiple of `alignment`. `None` if it is
/// not, or they are not all in one region.
///
/// # Safety
/// The numbers are not used after `memory`.
unsafe fn area<T: AtomicInteger>(
    memory: &GuestMemory,
    address: GuestAddress,
    count: usize,
    alignment: u64,
) -> Option<&'static [T]> {
    let slice = memory.get_slice(address, count * size_of::<T>()).ok()?;
    let start = slice.ptr_guard_mut().as_ptr().cast::<T>();
    // A region may begin anywhere, and then the two alignments differ.
    if !address.0.is_multiple_of(alignment) || !start.is_aligned() {
        return None;
    }
    // SAFETY: the slice is `count` aligned numbers of guest memory, which is mapped as
    // long as the caller uses them; atomic numbers may be shared with anyone.
    Some(unsafe { std::slice::from_raw_parts(start, count) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_aligned_and_in_one_region() {
        let place = |descriptors, available, used| RingLayout {
            descriptors: GuestAddress(descriptors),
            available: GuestAddress(available),
            used: GuestAddress(used),
        };
        // The third begins where no number may.
        let regions = [(0, 0x1000), (0x1000, 0x1000), (0x3001, 0x1000)];
        let regions = regions.map(|(at, len)| (GuestAddress(at), len));
        let memory = Arc::new(GuestMemory::from_ranges(&regions).unwrap());
        let fits = |place| SplitRing::new(&memory, place, 8, true).is_some();
        assert!(fits(place(0xf80, 0x1000, 0x1100)));
        // Up to the last byte.
        assert!(fits(place(0x1f80, 0x1000 - 22, 0x100)));
        for wrong in [
            place(0xf88, 0, 0x100), // misaligned
            place(0, 0x101, 0x200),
            place(0, 0x100, 0x202),
            place(0xf90, 0, 0x100), // in two regions
            place(0, 0xffe, 0x100),
            place(0, 0x100, 0xffc),
            place(0, 0x100, 0xfbc),
            place(0x1f90, 0, 0x100), // beyond the end
            place(0, 0x1ffe, 0x100),
            place(0, 0x100, 0x1fbc),
            place(u64::MAX - 15, 0, 0x100),
            place(0, u64::MAX - 1, 0x100),
            place(0, 0x100, u64::MAX - 3),
            place(0x3010, 0, 0x100), // misaligned in this process
        ] {
            assert!(!fits(wrong), "{wrong:?}");
        }
        assert!(fits(place(0, 0x100, 0xfb8)));
    }
}

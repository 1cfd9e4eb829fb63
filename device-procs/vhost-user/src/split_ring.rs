//! A split virtqueue in guest memory (virtio 1.2 section 2.7). Its areas are looked up once
//! and are plain atomic numbers from then on.
//!
//! The driver may change them at any time. So each function does one load or one store, and
//! the caller uses the value that was loaded.
//!
//! We do not use crate virtio-queue, which costs 106 to 490 ns a chain against about 4 ns
//! here. It is the oracle of the ring's tests instead.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{AtomicInteger, GuestAddress, GuestMemoryBackend};

use crate::GuestMemory;

/// Length of a descriptor in bytes, and the alignment of the descriptor table.
pub(crate) const DESCRIPTOR: u32 = 16;
/// Length of flags and index, in front of the elements of the used ring, in bytes.
const HEADER: u64 = 4;
/// Length of an element of the used ring, in bytes.
const ELEMENT: u64 = 8;

/// One descriptor (virtio 1.2 section 2.7.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// Address of the buffer.
    pub address: GuestAddress,
    /// Length of the buffer in bytes.
    pub len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// Decodes the 16 bytes of a descriptor, as two little-endian words.
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

    /// The next descriptor of the chain; `None` for the last one.
    pub fn next(self) -> Option<u16> {
        self.has(VRING_DESC_F_NEXT).then_some(self.next)
    }

    /// Whether the device writes to the buffer (and the driver reads it).
    pub fn is_writable(self) -> bool {
        self.has(VRING_DESC_F_WRITE)
    }

    /// Whether the buffer is an indirect descriptor table.
    pub fn is_indirect(self) -> bool {
        self.has(VRING_DESC_F_INDIRECT)
    }
}

/// The guest-physical addresses of a ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingLayout {
    pub descriptors: GuestAddress,
    pub available: GuestAddress,
    pub used: GuestAddress,
}

/// The areas of one ring. The references are valid as long as `_memory` is mapped, and no
/// function returns one.
pub(crate) struct SplitRing {
    size: u16,
    /// Whether notifications are controlled by indices (VIRTIO_F_EVENT_IDX) or by flags.
    event_idx: bool,
    /// Two words for each descriptor.
    descriptors: &'static [AtomicU64],
    /// Flags, index, heads, and `used_event`: the used index at which the driver wants an
    /// interrupt.
    available: &'static [AtomicU16],
    /// Flags and index of the used ring.
    used: &'static [AtomicU16],
    /// Head and written length for each element of the used ring.
    elements: &'static [AtomicU32],
    /// `avail_event`: the available index at which the device wants a notification.
    avail_event: &'static [AtomicU16],
    /// Keeps the areas mapped.
    _memory: Arc<GuestMemory>,
}

const FLAGS: usize = 0;
const INDEX: usize = 1;
const HEADS: usize = 2;

impl SplitRing {
    /// Looks up a ring of `size` entries, which is a power of two. `None` if an area is
    /// misaligned (virtio 1.2 section 2.7), or does not lie in one memory region.
    pub fn new(
        memory: &Arc<GuestMemory>,
        layout: RingLayout,
        size: u16,
        event_idx: bool,
    ) -> Option<Self> {
        let count = usize::from(size);
        let elements = GuestAddress(layout.used.0.checked_add(HEADER)?);
        let avail_event = GuestAddress(elements.0.checked_add(ELEMENT * u64::from(size))?);
        // The parts of the used ring must not lie in different regions either.
        let used_len = HEADER + ELEMENT * u64::from(size) + 2;
        memory.get_slice(layout.used, used_len as usize).ok()?;
        // SAFETY: the references are stored beside `_memory`, which keeps the areas mapped,
        // and are not copied anywhere else.
        unsafe {
            Some(SplitRing {
                size,
                event_idx,
                descriptors: area(memory, layout.descriptors, 2 * count, DESCRIPTOR.into())?,
                available: area(memory, layout.available, HEADS + count + 1, 2)?,
                used: area(memory, layout.used, HEADS, 4)?,
                elements: area(memory, elements, 2 * count, 4)?,
                avail_event: area(memory, avail_event, 1, 2)?,
                _memory: Arc::clone(memory),
            })
        }
    }

    /// Switches between notification indices and flags.
    pub fn set_event_idx(&mut self, on: bool) {
        self.event_idx = on;
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The position of index `index` in a ring.
    fn position(&self, index: u16) -> usize {
        usize::from(index) & (usize::from(self.size) - 1)
    }

    /// The index up to which the driver has made requests available.
    pub fn available_index(&self) -> u16 {
        u16::from_le(self.available[INDEX].load(Ordering::Acquire))
    }

    /// The head at `index` of the available ring.
    pub fn head(&self, index: u16) -> u16 {
        u16::from_le(self.available[HEADS + self.position(index)].load(Ordering::Relaxed))
    }

    /// The descriptor `index`; `None` beyond the end of the table.
    pub fn descriptor(&self, index: u16) -> Option<Descriptor> {
        let at = 2 * usize::from(index);
        let words = self.descriptors.get(at..at + 2)?;
        Some(Descriptor::from_words([
            words[0].load(Ordering::Relaxed),
            words[1].load(Ordering::Relaxed),
        ]))
    }

    /// The index up to which requests are completed.
    pub fn used_index(&self) -> u16 {
        u16::from_le(self.used[INDEX].load(Ordering::Acquire))
    }

    /// Writes a completed request at `index` of the used ring. The driver does not look at it
    /// before [`SplitRing::publish_used`].
    pub fn add_used(&self, index: u16, head: u16, written: u32) {
        let at = 2 * self.position(index);
        self.elements[at].store(u32::from(head).to_le(), Ordering::Relaxed);
        self.elements[at + 1].store(written.to_le(), Ordering::Relaxed);
    }

    /// Stores the used index, which completes the requests before `index`.
    pub fn publish_used(&self, index: u16) {
        self.used[INDEX].store(index.to_le(), Ordering::Release);
    }

    /// Asks the driver not to notify. With EVENT_IDX there is nothing to do: the index of the
    /// last request for a notification is in the past.
    pub fn disable_notification(&self) {
        if !self.event_idx {
            self.used[FLAGS].store((VRING_USED_F_NO_NOTIFY as u16).to_le(), Ordering::Relaxed);
        }
    }

    /// Asks the driver to notify when it makes requests available from `next` on. Returns
    /// whether there are some already, for which the driver may not notify (virtio 1.2
    /// section 2.7.10).
    pub fn enable_notification(&self, next: u16) -> bool {
        if self.event_idx {
            self.avail_event[0].store(next.to_le(), Ordering::Relaxed);
        } else {
            self.used[FLAGS].store(0, Ordering::Relaxed);
        }
        // The store must be visible to the driver before the index is loaded.
        fence(Ordering::SeqCst);
        self.available_index() != next
    }

    /// Whether the driver wants an interrupt for the requests completed from `old` to `new`
    /// (virtio 1.2 section 2.7.7).
    pub fn wants_interrupt(&self, old: u16, new: u16) -> bool {
        // The used index must be visible to the driver before `used_event` is loaded.
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

/// The `count` numbers from `address` on. `None` if `address` is not a multiple of
/// `alignment`, or the numbers are not all in one region.
///
/// # Safety
/// The numbers are not used after `memory` is unmapped.
unsafe fn area<T: AtomicInteger>(
    memory: &GuestMemory,
    address: GuestAddress,
    count: usize,
    alignment: u64,
) -> Option<&'static [T]> {
    let slice = memory.get_slice(address, count * size_of::<T>()).ok()?;
    let start = slice.ptr_guard_mut().as_ptr().cast::<T>();
    // A region may begin at any address, so the alignment in this process may differ.
    if !address.0.is_multiple_of(alignment) || !start.is_aligned() {
        return None;
    }
    // SAFETY: the slice has `count` aligned numbers of guest memory, which stays mapped as
    // long as the caller uses them. Atomic numbers may be shared with the guest.
    Some(unsafe { std::slice::from_raw_parts(start, count) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_must_be_aligned_and_in_one_region() {
        let place = |descriptors, available, used| RingLayout {
            descriptors: GuestAddress(descriptors),
            available: GuestAddress(available),
            used: GuestAddress(used),
        };
        // The third region begins at an odd address.
        let regions = [(0, 0x1000), (0x1000, 0x1000), (0x3001, 0x1000)];
        let regions = regions.map(|(at, len)| (GuestAddress(at), len));
        let memory = Arc::new(GuestMemory::from_ranges(&regions).unwrap());
        let fits = |place| SplitRing::new(&memory, place, 8, true).is_some();
        assert!(fits(place(0xf80, 0x1000, 0x1100)));
        // The rings end with the last byte of a region.
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

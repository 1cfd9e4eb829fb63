//! The trap channel: how the platform process answers a port or memory access of a vCPU
//! that no device of the runner handles. It resembles the ioreq page of Xen
//! (`public/hvm/ioreq.h`) and of ACRN, with the difference that it survives the death of
//! the process that answers.
//!
//! The runner and the platform process share one region. It is a sealed memfd that belongs
//! to the runner, so it outlives any platform process:
//!
//! | offset | size | contents |
//! |---|---|---|
//! | 0 | 4 KiB | [`TrapHeader`] |
//! | 4 KiB | 4 KiB | one 64-byte [`TrapSlot`] for each vCPU |
//! | 8 KiB | 24 KiB | the platform's device registers, opaque to the runner |
//!
//! A vCPU has at most one access outstanding, so one slot for each vCPU is enough. A read
//! waits for its answer. A write is posted: the vCPU continues, and waits only if it traps
//! again before the write is carried out. A ticket from the header keeps the accesses of
//! all vCPUs in order.
//!
//! A request is complete when `done == seq`. Both words are in the region, so when a
//! platform process is killed between the two, its successor finds the request still open.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use serde::{Deserialize, Serialize};

/// "ORTP" in little-endian order.
pub const MAGIC: u32 = 0x5054_524f;
/// Version of the region's layout and of the messages.
pub const VERSION: u32 = 1;
/// The largest number of vCPUs that one region has slots for.
pub const MAX_VCPUS: usize = 64;
/// Size of the whole region in bytes.
pub const REGION_SIZE: usize = 32 * 1024;
/// Offset of the slots in bytes from the start of the region.
pub const SLOTS_OFFSET: usize = 4096;
/// Offset of the platform's device registers in bytes from the start of the region.
pub const STATE_OFFSET: usize = 8192;
/// Size of the platform's device registers in bytes.
pub const STATE_SIZE: usize = REGION_SIZE - STATE_OFFSET;

/// The first page of the region.
#[repr(C)]
pub struct TrapHeader {
    /// [`MAGIC`].
    pub magic: AtomicU32,
    /// [`VERSION`].
    pub version: AtomicU32,
    /// Number of slots in use.
    pub vcpus: AtomicU32,
    /// Not zero while the platform sleeps. The vCPU that publishes a request then signals
    /// the platform's doorbell (an eventfd).
    pub asleep: AtomicU32,
    /// The ticket of the next request.
    pub ticket: AtomicU64,
}

/// The address space of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Space {
    /// An I/O port.
    Port = 0,
    /// A guest-physical address.
    Memory = 1,
}

/// One access of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Port I/O or memory-mapped I/O.
    pub space: Space,
    /// Port number or guest-physical address.
    pub address: u64,
    /// 1, 2, 4 or 8 bytes.
    pub size: u8,
    /// The value to write, zero-extended; `None` reads.
    pub write: Option<u64>,
}

/// The request of one vCPU and its answer, in a cache line of its own.
#[repr(C, align(64))]
pub struct TrapSlot {
    /// Sequence number of the newest request. The vCPU writes it to publish the request.
    seq: AtomicU32,
    /// Sequence number of the newest completed request. The platform writes it.
    done: AtomicU32,
    /// Futex word of the waiting vCPU. Every answer and every kick of the vCPU changes it.
    wake: AtomicU32,
    /// Not zero while the vCPU sleeps on `wake`.
    waiting: AtomicU32,
    ticket: AtomicU64,
    address: AtomicU64,
    data: AtomicU64,
    size: AtomicU8,
    space: AtomicU8,
    write: AtomicU8,
}

const _: () = assert!(size_of::<TrapSlot>() == 64);
const _: () = assert!(size_of::<TrapHeader>() <= SLOTS_OFFSET);
const _: () = assert!(SLOTS_OFFSET + MAX_VCPUS * size_of::<TrapSlot>() <= STATE_OFFSET);

impl TrapSlot {
    /// Whether the newest request is complete.
    pub fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire) == self.seq.load(Ordering::Relaxed)
    }

    /// vCPU side: publishes `access`. The previous request must be complete.
    ///
    /// Afterwards the caller signals the doorbell if [`TrapHeader::asleep`] is set.
    pub fn publish(&self, header: &TrapHeader, access: &Access) {
        self.address.store(access.address, Ordering::Relaxed);
        self.size.store(access.size, Ordering::Relaxed);
        self.space.store(access.space as u8, Ordering::Relaxed);
        self.write
            .store(u8::from(access.write.is_some()), Ordering::Relaxed);
        self.data
            .store(access.write.unwrap_or(0), Ordering::Relaxed);
        let ticket = header.ticket.fetch_add(1, Ordering::Relaxed);
        self.ticket.store(ticket, Ordering::Relaxed);
        let seq = self.seq.load(Ordering::Relaxed).wrapping_add(1);
        self.seq.store(seq, Ordering::Release);
        // Pairs with the fence in `TrapHeader::prepare_sleep`: either this vCPU sees that
        // the platform sleeps, or the platform sees the request.
        fence(Ordering::SeqCst);
    }

    /// vCPU side: the value that was read. Valid once the request is complete.
    pub fn answer(&self) -> u64 {
        self.data.load(Ordering::Relaxed)
    }

    /// vCPU side: returns the futex word and the value to sleep on. The caller checks
    /// [`TrapSlot::is_done`] and its stop requests *after* this call and before sleeping.
    pub fn prepare_wait(&self) -> (&AtomicU32, u32) {
        self.waiting.store(1, Ordering::Relaxed);
        let seen = self.wake.load(Ordering::Acquire);
        fence(Ordering::SeqCst);
        (&self.wake, seen)
    }

    /// vCPU side: records that the vCPU no longer sleeps.
    pub fn finish_wait(&self) {
        self.waiting.store(0, Ordering::Relaxed);
    }

    /// Changes the futex word for an answer or a kick. Returns the word if the vCPU sleeps
    /// on it, so that the caller wakes it (`FUTEX_WAKE`, futex(2)).
    pub fn bump(&self) -> Option<&AtomicU32> {
        self.wake.fetch_add(1, Ordering::Release);
        fence(Ordering::SeqCst);
        (self.waiting.load(Ordering::Relaxed) != 0).then_some(&self.wake)
    }

    /// Platform side: returns the open request, if there is one.
    pub fn open_request(&self) -> Option<TrapRequest> {
        let seq = self.seq.load(Ordering::Acquire);
        if seq == self.done.load(Ordering::Relaxed) {
            return None;
        }
        let space = match self.space.load(Ordering::Relaxed) {
            0 => Space::Port,
            _ => Space::Memory,
        };
        let data = self.data.load(Ordering::Relaxed);
        Some(TrapRequest {
            seq,
            ticket: self.ticket.load(Ordering::Relaxed),
            access: Access {
                space,
                address: self.address.load(Ordering::Relaxed),
                size: self.size.load(Ordering::Relaxed),
                write: (self.write.load(Ordering::Relaxed) != 0).then_some(data),
            },
        })
    }

    /// Platform side: completes request `seq` with `value`, which matters only for a read.
    /// Returns the futex word to wake if the vCPU sleeps.
    pub fn complete(&self, seq: u32, value: u64) -> Option<&AtomicU32> {
        self.data.store(value, Ordering::Relaxed);
        self.done.store(seq, Ordering::Release);
        self.bump()
    }
}

/// An open request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrapRequest {
    /// Sequence number in its slot.
    pub seq: u32,
    /// Position in the order of the accesses of all vCPUs.
    pub ticket: u64,
    /// The guest's access.
    pub access: Access,
}

impl TrapHeader {
    /// Platform side: announces that it will sleep. The caller checks all slots once more
    /// after this call and before sleeping.
    pub fn prepare_sleep(&self) {
        self.asleep.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Platform side: records that it no longer sleeps.
    pub fn finish_sleep(&self) {
        self.asleep.store(0, Ordering::Relaxed);
    }
}

/// Finds the open request with the lowest ticket.
///
/// When the first scan finds a request, a second scan follows: a request with a lower
/// ticket may have been published in a slot that the first scan had already passed.
pub fn first_open(slots: &[TrapSlot]) -> Option<(usize, TrapRequest)> {
    let scan = || {
        slots
            .iter()
            .enumerate()
            .filter_map(|(i, slot)| slot.open_request().map(|request| (i, request)))
            .min_by_key(|(_, request)| request.ticket)
    };
    scan().and_then(|_| scan())
}

/// The runner's messages to the platform process.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum ToPlatform {
    /// The first message. Its descriptors are the region and the doorbell eventfd.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// Number of slots in use.
        vcpus: u32,
    },
    /// The answer to [`FromPlatform::Lines`]. Its descriptors are one eventfd for each line,
    /// in the same order.
    Lines,
    /// The machine was reset. The platform completes the open requests, sets its registers
    /// to their initial values and answers with [`FromPlatform::ResetDone`].
    Reset,
}

/// The platform process's messages to the runner.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum FromPlatform {
    /// The ISA interrupt lines (GSI numbers) that this platform drives.
    Lines {
        /// GSI numbers below 24.
        gsis: Vec<u32>,
    },
    /// The answer to [`ToPlatform::Reset`].
    ResetDone,
    /// The guest powered the machine off.
    PowerOff,
    /// The guest asked for a reset.
    ResetRequest,
    /// The guest wrote `code` to the exit port.
    Exit {
        /// 0 means success.
        code: u8,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zeroed<T>() -> Box<T> {
        // SAFETY: the tests use this only for structures of atomic integers, for which all
        // bit patterns are valid.
        unsafe { Box::new(std::mem::zeroed()) }
    }

    fn read(address: u64) -> Access {
        Access {
            space: Space::Port,
            address,
            size: 1,
            write: None,
        }
    }

    #[test]
    fn a_request_stays_open_until_it_is_completed() {
        let (header, slot) = (zeroed::<TrapHeader>(), zeroed::<TrapSlot>());
        assert!(slot.is_done() && slot.open_request().is_none());
        slot.publish(&header, &read(0x3f8));
        assert!(!slot.is_done());
        let request = slot.open_request().unwrap();
        assert_eq!(request.access, read(0x3f8));
        // A successor of the process that died sees the same request.
        assert_eq!(slot.open_request().unwrap(), request);
        slot.complete(request.seq, 0x60);
        assert!(slot.is_done());
        assert_eq!(slot.answer(), 0x60);
    }

    #[test]
    fn requests_are_found_in_ticket_order() {
        let header = zeroed::<TrapHeader>();
        let slots: Box<[TrapSlot; 3]> = zeroed();
        slots[2].publish(&header, &read(1));
        slots[0].publish(&header, &read(2));
        let (i, request) = first_open(&slots[..]).unwrap();
        assert_eq!((i, request.access.address), (2, 1));
        slots[i].complete(request.seq, 0);
        assert_eq!(first_open(&slots[..]).unwrap().0, 0);
    }

    #[test]
    fn bump_returns_the_futex_word_only_while_the_vcpu_sleeps() {
        let slot = zeroed::<TrapSlot>();
        assert!(slot.bump().is_none());
        let (word, seen) = slot.prepare_wait();
        assert_eq!(word.load(Ordering::Relaxed), seen);
        assert!(slot.bump().is_some());
        assert_ne!(word.load(Ordering::Relaxed), seen);
        slot.finish_wait();
        assert!(slot.bump().is_none());
    }
}

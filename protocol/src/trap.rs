//! The trap channel: how a vCPU's port or memory access that nobody claims is
//! answered by another process.
//!
//! The runner and the platform process share one region (a sealed memfd that
//! belongs to the runner, so it outlives any platform process):
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0 | 4 KiB | [`TrapHeader`] |
//! | 4 KiB | 4 KiB | one 64-byte [`TrapSlot`] per vCPU |
//! | 8 KiB | 24 KiB | the platform's own registers, opaque to the runner |
//!
//! A vCPU waits in its trap, so one slot per vCPU is exactly enough. Reads wait
//! for their answer; writes are posted: the vCPU goes on and waits only if it
//! traps again before the write was carried out. A ticket drawn from the header
//! keeps the order of accesses between vCPUs.
//!
//! A request is answered when `done == seq`. Both words live here, so a
//! platform process that was killed in the middle is replaced and its successor
//! finds the request still open.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use serde::{Deserialize, Serialize};

/// "ORTP" in little-endian order.
pub const MAGIC: u32 = 0x5054_524f;
/// Version of this layout.
pub const VERSION: u32 = 1;
/// Most vCPUs that one region serves.
pub const MAX_VCPUS: usize = 64;
/// Size of the whole region in bytes.
pub const REGION_SIZE: usize = 32 * 1024;
/// Where the slots begin, in bytes from the start of the region.
pub const SLOTS_OFFSET: usize = 4096;
/// Where the platform's registers begin, in bytes from the start.
pub const STATE_OFFSET: usize = 8192;
/// Size of the platform's registers in bytes.
pub const STATE_SIZE: usize = REGION_SIZE - STATE_OFFSET;

/// The first page of the region.
#[repr(C)]
pub struct TrapHeader {
    /// [`MAGIC`].
    pub magic: AtomicU32,
    /// [`VERSION`].
    pub version: AtomicU32,
    /// How many slots are in use.
    pub vcpus: AtomicU32,
    /// Not zero while the platform sleeps: ring its doorbell (an eventfd) after
    /// publishing a request.
    pub asleep: AtomicU32,
    /// The next ticket.
    pub ticket: AtomicU64,
}

/// What kind of access a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Space {
    /// An I/O port.
    Port = 0,
    /// A guest-physical address.
    Memory = 1,
}

/// One access, as the guest made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Port or memory.
    pub space: Space,
    /// Port number or guest-physical address.
    pub address: u64,
    /// 1, 2, 4 or 8 bytes.
    pub size: u8,
    /// The value to write, zero-extended; `None` reads.
    pub write: Option<u64>,
}

/// One vCPU's request and its answer; a cache line of its own.
#[repr(C, align(64))]
pub struct TrapSlot {
    /// Number of the newest request; written by the vCPU when it publishes.
    seq: AtomicU32,
    /// Number of the newest request carried out; written by the platform.
    done: AtomicU32,
    /// Futex word of the waiting vCPU: changes with every answer and kick.
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
    /// Whether the newest request has been carried out.
    pub fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire) == self.seq.load(Ordering::Relaxed)
    }

    /// vCPU side: publishes `access`. The slot must be done.
    ///
    /// Afterwards the caller rings the doorbell if [`TrapHeader::asleep`] is set.
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
        // Pairs with the fence in `TrapHeader::prepare_sleep`: either we see that
        // the platform sleeps, or it sees our request.
        fence(Ordering::SeqCst);
    }

    /// vCPU side: the value read, once the request is done.
    pub fn answer(&self) -> u64 {
        self.data.load(Ordering::Relaxed)
    }

    /// vCPU side: the futex word and its value to sleep on. Check
    /// [`TrapSlot::is_done`] and any stop request *after* this and before sleeping.
    pub fn prepare_wait(&self) -> (&AtomicU32, u32) {
        self.waiting.store(1, Ordering::Relaxed);
        let seen = self.wake.load(Ordering::Acquire);
        fence(Ordering::SeqCst);
        (&self.wake, seen)
    }

    /// vCPU side: no longer asleep.
    pub fn finish_wait(&self) {
        self.waiting.store(0, Ordering::Relaxed);
    }

    /// Changes the futex word; returns it when somebody sleeps on it and must
    /// be woken (`FUTEX_WAKE`, futex(2)). Used for answers and for kicks.
    pub fn bump(&self) -> Option<&AtomicU32> {
        self.wake.fetch_add(1, Ordering::Release);
        fence(Ordering::SeqCst);
        (self.waiting.load(Ordering::Relaxed) != 0).then_some(&self.wake)
    }

    /// Platform side: the open request with its ticket and number, if any.
    /// `None` also for a request that makes no sense (it is the runner's bug).
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

    /// Platform side: answers request `seq` (a write's value is ignored);
    /// returns the futex word to wake, if the vCPU sleeps.
    pub fn complete(&self, seq: u32, value: u64) -> Option<&AtomicU32> {
        self.data.store(value, Ordering::Relaxed);
        self.done.store(seq, Ordering::Release);
        self.bump()
    }
}

/// An open request as the platform sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrapRequest {
    /// Its number in its slot.
    pub seq: u32,
    /// Its place in the order of all vCPUs' accesses.
    pub ticket: u64,
    /// What the guest did.
    pub access: Access,
}

impl TrapHeader {
    /// Platform side: announces sleep. Look at all slots again afterwards.
    pub fn prepare_sleep(&self) {
        self.asleep.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Platform side: awake again.
    pub fn finish_sleep(&self) {
        self.asleep.store(0, Ordering::Relaxed);
    }
}

/// Finds the open request that comes first.
///
/// A second look is needed when the first one finds anything: the request that
/// preceded it may have been published in a slot already passed.
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
    /// First message. Descriptors: the region, the doorbell eventfd.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// Slots in use.
        vcpus: u32,
    },
    /// Answer to [`FromPlatform::Lines`]: one eventfd for each line, in order.
    Lines,
    /// The machine was reset: registers go back to their start values once the
    /// open requests are carried out. Answered by [`FromPlatform::ResetDone`].
    Reset,
}

/// The platform process's messages to the runner.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum FromPlatform {
    /// Which ISA interrupt lines (GSI numbers) this platform drives.
    Lines {
        /// GSI numbers below 24.
        gsis: Vec<u32>,
    },
    /// Answer to [`ToPlatform::Reset`].
    ResetDone,
    /// The guest switched its power off.
    PowerOff,
    /// The guest asked for a reset.
    ResetRequest,
    /// The guest wrote `code` to the exit port.
    Exit {
        /// 0 is a pass.
        code: u8,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zeroed<T>() -> Box<T> {
        // SAFETY: only used for types made of atomic integers, for which all
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
    fn requests_are_taken_in_ticket_order() {
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
    fn a_sleeper_is_reported_to_whoever_wakes() {
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

//! A split virtqueue from the driver's side (virtio 1.2 section 2.7). It can also build what
//! the specification forbids.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::process::readable_within;
use crate::ram::Ram;
use crate::{DEADLINE, wait_until};

/// Descriptor flags.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// The device writes to the buffer.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// A buffer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// The device writes to it.
    pub writable: bool,
}

impl Buffer {
    /// A device-readable buffer.
    pub fn readable(address: u64, len: u32) -> Self {
        Buffer {
            address,
            len,
            writable: false,
        }
    }

    /// A device-writable buffer.
    pub fn writable(address: u64, len: u32) -> Self {
        Buffer {
            address,
            len,
            writable: true,
        }
    }

    fn flags(&self) -> u16 {
        if self.writable { WRITE } else { 0 }
    }
}

/// A completed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head that [`DriverQueue::add`] returned.
    pub head: u16,
    /// Bytes that the device wrote.
    pub len: u32,
}

/// One queue.
pub struct DriverQueue {
    /// Number of descriptors.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used_ring: u64,
    /// The doorbell.
    pub kick: EventFd,
    /// The interrupt.
    pub call: EventFd,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// The next available index.
    pub avail_index: u16,
    /// The next used index.
    pub used_index: u16,
    ram: Arc<Ram>,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
}

impl DriverQueue {
    /// An empty queue in `ram`.
    pub fn new(ram: &Arc<Ram>, size: u16) -> Self {
        let slots = u64::from(size);
        DriverQueue {
            size,
            descriptors: ram.alloc_in(0, 16 * slots, 16),
            available: ram.alloc(6 + 2 * slots),
            used_ring: ram.alloc(6 + 8 * slots),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            event_idx: false,
            avail_index: 0,
            used_index: 0,
            ram: Arc::clone(ram),
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
        }
    }

    fn store(&self, address: u64, value: u16, order: Ordering) {
        let value = value.to_le();
        self.ram.store(value, GuestAddress(address), order).unwrap();
    }

    fn load(&self, address: u64, order: Ordering) -> u16 {
        u16::from_le(self.ram.load(GuestAddress(address), order).unwrap())
    }

    /// Writes a descriptor without checks, to the queue's table or to the indirect table at
    /// `table`.
    pub fn descriptor(&self, table: u64, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&buffer.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&buffer.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&(buffer.flags() | flags).to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.ram.set(table + 16 * u64::from(index), &bytes);
    }

    /// Puts `head` into the available ring without checks.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_index % self.size);
        self.store(self.available + 4 + 2 * slot, head, Ordering::Relaxed);
        self.avail_index = self.avail_index.wrapping_add(1);
        self.store(self.available + 2, self.avail_index, Ordering::Release);
    }

    /// Sets the available index without checks.
    pub fn set_avail_index(&mut self, index: u16) {
        self.store(self.available + 2, index, Ordering::Release);
    }

    /// The buffer of descriptor `index`.
    pub fn buffer(&self, index: u16) -> Buffer {
        let bytes = self.ram.get(self.descriptors + 16 * u64::from(index), 16);
        let flags = u16::from_le_bytes([bytes[12], bytes[13]]);
        Buffer {
            address: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            len: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
            writable: flags & WRITE != 0,
        }
    }

    /// Free descriptors.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Offers a request; returns its head. Does not kick.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let chain: Vec<u16> = buffers.iter().map(|_| self.free.pop().unwrap()).collect();
        for (position, buffer) in buffers.iter().enumerate() {
            let (flags, next) = match chain.get(position + 1) {
                Some(&next) => (NEXT, next),
                None => (0, 0),
            };
            self.descriptor(self.descriptors, chain[position], *buffer, flags, next);
        }
        let head = chain[0];
        self.chains.insert(head, chain);
        self.offer(head);
        head
    }

    /// As [`DriverQueue::add`], with one descriptor in the queue's table and the
    /// others in an indirect table.
    pub fn add_indirect(&mut self, buffers: &[Buffer]) -> u16 {
        let len = 16 * buffers.len() as u64;
        let table = self.ram.alloc(len);
        for (index, buffer) in (0u16..).zip(buffers) {
            let more = usize::from(index) + 1 < buffers.len();
            let flags = if more { NEXT } else { 0 };
            self.descriptor(table, index, *buffer, flags, index + 1);
        }
        let head = self.free.pop().unwrap();
        let whole = Buffer::readable(table, len as u32);
        self.descriptor(self.descriptors, head, whole, INDIRECT, 0);
        self.chains.insert(head, vec![head]);
        self.offer(head);
        head
    }

    /// Whether the device wants a notification of the requests since the available index
    /// was `before`.
    pub fn wants_kick(&self, before: u16) -> bool {
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = self.used_ring + 4 + 8 * u64::from(self.size);
            let event = self.load(at, Ordering::Relaxed);
            let offered = self.avail_index.wrapping_sub(before);
            self.avail_index.wrapping_sub(event).wrapping_sub(1) < offered
        } else {
            u32::from(self.load(self.used_ring, Ordering::Relaxed)) & VRING_USED_F_NO_NOTIFY == 0
        }
    }

    /// Rings the doorbell.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Returns the next completed request.
    pub fn take(&mut self) -> Option<Used> {
        if self.load(self.used_ring + 2, Ordering::Acquire) == self.used_index {
            return None;
        }
        let slot = u64::from(self.used_index % self.size);
        let entry = self.ram.get(self.used_ring + 4 + 8 * slot, 8);
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
        self.used_index = self.used_index.wrapping_add(1);
        let head = u16::try_from(word(0)).unwrap();
        if let Some(chain) = self.chains.remove(&head) {
            self.free.extend(chain);
        }
        Some(Used { head, len: word(4) })
    }

    /// The used index in the ring.
    pub fn device_used_index(&self) -> u16 {
        self.load(self.used_ring + 2, Ordering::Acquire)
    }

    /// Requests an interrupt once the used index has passed `index` (used_event).
    pub fn set_used_event(&self, index: u16) {
        let at = self.available + 4 + 2 * u64::from(self.size);
        self.store(at, index, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Waits for the next completed request, sleeping until the interrupt.
    pub fn wait(&mut self) -> Used {
        let start = Instant::now();
        loop {
            self.set_used_event(self.used_index);
            if let Some(used) = self.take() {
                return used;
            }
            let left = DEADLINE.saturating_sub(start.elapsed());
            assert!(
                readable_within(&self.call, left),
                "no interrupt; used index {}, ours {}",
                self.device_used_index(),
                self.used_index
            );
            self.interrupts();
        }
    }

    /// Offers a request, rings the doorbell and waits for its completion.
    pub fn run(&mut self, buffers: &[Buffer]) -> Used {
        let head = self.add(buffers);
        self.kick();
        let used = self.wait();
        assert_eq!(used.head, head);
        used
    }

    /// Polls until the device has completed all requests.
    pub fn wait_all(&mut self) -> Vec<Used> {
        let mut all = Vec::new();
        wait_until("all requests are completed", || {
            while let Some(used) = self.take() {
                all.push(used);
            }
            self.used_index == self.avail_index
        });
        all
    }

    /// Interrupts since the last call.
    pub fn interrupts(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }

    /// Sets both indices as if the queue had carried `index` requests; it must be stopped and
    /// empty.
    pub fn set_indices(&mut self, index: u16) {
        (self.avail_index, self.used_index) = (index, index);
        self.store(self.available + 2, index, Ordering::Relaxed);
        self.store(self.used_ring + 2, index, Ordering::Relaxed);
    }

    /// Resets the driver's state after invalid requests.
    pub fn clear(&mut self) {
        self.free = (0..self.size).rev().collect();
        self.chains.clear();
        self.set_indices(0);
        self.interrupts();
    }
}

//! A split virtqueue by hand (virtio 1.3, 2.7), for a driver that checks every step of the
//! device. [`Lent`] checks the used ring. The device must request each doorbell and send each
//! interrupt that is due.

use super::hal::Identity;
use super::transport::{Transport, feature};
use crate::irq::{self, Vector};
use crate::seconds;
use alloc::format;
use alloc::string::String;
use core::ptr::NonNull;
use core::sync::atomic::{Ordering, fence};
use logic::used::Lent;
use virtio_drivers::transport::Transport as _;
use virtio_drivers::{BufferDirection, Hal};

/// Entries of a ring; all its parts fit into two pages.
pub const SIZE: u16 = 64;
const PAGES: usize = 2;

/// Offsets in the ring's memory.
const AVAILABLE: usize = 16 * SIZE as usize;
const AVAILABLE_INDEX: usize = AVAILABLE + 2;
const AVAILABLE_RING: usize = AVAILABLE + 4;
const USED_EVENT: usize = AVAILABLE_RING + 2 * SIZE as usize;
const USED: usize = 4096;
const USED_INDEX: usize = USED + 2;
const USED_RING: usize = USED + 4;
const AVAILABLE_EVENT: usize = USED_RING + 8 * SIZE as usize;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// In the used ring's flags: the device wants no doorbell.
const NO_NOTIFY: u16 = 1;

/// A buffer: where it is, its length, and whether the device writes it.
#[derive(Clone, Copy)]
pub struct Buffer {
    /// Physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// From the device to the driver.
    pub writable: bool,
}

/// An entry of a descriptor table.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// For `buffer`, with `next` behind it if that is something.
    fn new(buffer: Buffer, next: Option<u16>) -> Self {
        let write = if buffer.writable { WRITE } else { 0 };
        Self {
            address: buffer.address,
            length: buffer.length,
            flags: write | next.map_or(0, |_| NEXT),
            next: next.unwrap_or(0),
        }
    }

    /// Makes `table` a chain of `buffers` whose first entry is number `first`.
    pub fn chain(table: &mut [Self], buffers: &[Buffer], first: u16) {
        for (index, (entry, buffer)) in table.iter_mut().zip(buffers).enumerate() {
            let next = first + index as u16 + 1;
            *entry = Self::new(*buffer, (index + 1 < buffers.len()).then_some(next));
        }
    }
}

/// A queue in use. The device must be reset before it is dropped.
pub struct Split {
    memory: NonNull<u8>,
    queue: u16,
    name: String,
    vector: Vector,
    event_index: bool,
    /// The available index, and up to where the device was told of it.
    available: u16,
    told: u16,
    lent: Lent,
    /// The interrupt count when the used ring was last known to be empty: what is
    /// found in it next must have come with another interrupt.
    empty_at: Option<u64>,
}

impl Split {
    /// Sets queue `queue` up; before [`Transport::finish`].
    ///
    /// # Errors
    /// The device does not have it, or it is too small.
    pub fn new(transport: &mut Transport, queue: u16) -> Result<Self, String> {
        let name = format!("{}: queue {queue}", transport.device().name);
        transport.prepare_queue(queue)?;
        let most = transport.max_queue_size(queue);
        if most < u32::from(SIZE) {
            return Err(format!("{name}: {most} entries, {SIZE} are needed"));
        }
        let (address, memory) = Identity::dma_alloc(PAGES, BufferDirection::Both);
        let [table, available, used] = [0, AVAILABLE, USED].map(|at| address + at as u64);
        transport.queue_set(queue, u32::from(SIZE), table, available, used);
        let vector = transport.device().queue_vector(queue);
        Ok(Self {
            memory,
            queue,
            name,
            vector,
            event_index: transport.has(feature::RING_EVENT_IDX),
            available: 0,
            told: 0,
            lent: Lent::new(SIZE),
            empty_at: Some(vector.count()),
        })
    }

    /// For messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number.
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// How many chains the device has.
    pub fn lent(&self) -> u16 {
        self.lent.count()
    }

    /// Lends a chain of `buffers` that begins with descriptor `head`, and takes up those
    /// behind it; the device has to say that it wrote `written` bytes. It learns of it by
    /// [`Split::tell`].
    pub fn lend(&mut self, head: u16, buffers: &[Buffer], written: Option<u32>) {
        let mut chain = [Descriptor::default(); SIZE as usize];
        let chain = &mut chain[..buffers.len()];
        Descriptor::chain(chain, buffers, head);
        for (index, descriptor) in chain.iter().enumerate() {
            self.write(16 * (usize::from(head) + index), *descriptor);
        }
        self.make_available(head, written);
    }

    /// As [`Split::lend`], with the chain in a table of its own.
    pub fn lend_indirect(&mut self, head: u16, table: Buffer, written: Option<u32>) {
        let mut descriptor = Descriptor::new(table, None);
        descriptor.flags |= INDIRECT;
        self.write(16 * usize::from(head), descriptor);
        self.make_available(head, written);
    }

    fn make_available(&mut self, head: u16, written: Option<u32>) {
        let place = AVAILABLE_RING + 2 * usize::from(self.available % SIZE);
        self.write(place, head);
        self.available = self.available.wrapping_add(1);
        self.lent.lend(head, written);
    }

    /// Tells the device what was lent since the last time, by its doorbell if it wants
    /// that.
    pub fn tell(&mut self, transport: &mut Transport) {
        if self.told == self.available {
            return;
        }
        // Entries before the index; the index before the device's wish is read.
        fence(Ordering::SeqCst);
        self.write(AVAILABLE_INDEX, self.available);
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            // Virtio 1.3, 2.7.10: if the index passed the one that it waits for.
            let event: u16 = self.read(AVAILABLE_EVENT);
            let behind = self.available.wrapping_sub(event).wrapping_sub(1);
            behind < self.available.wrapping_sub(self.told)
        } else {
            self.read::<u16>(USED) & NO_NOTIFY == 0
        };
        self.told = self.available;
        if wanted {
            transport.notify(self.queue);
        }
    }

    /// Whether [`Split::take`] would find something; notes when not.
    pub fn has_used(&mut self) -> bool {
        let count = self.vector.count();
        if self.event_index {
            self.write(USED_EVENT, self.lent.next());
        }
        // The wish for an interrupt must be out before the used index is read.
        fence(Ordering::SeqCst);
        let some = self.read::<u16>(USED_INDEX) != self.lent.next();
        if !some {
            self.empty_at = Some(count);
        }
        some
    }

    /// Takes the next chain that the device is done with, if there is one.
    ///
    /// # Errors
    /// What the device did to its used ring, or that it sent no interrupt.
    pub fn take(&mut self) -> Result<Option<u16>, String> {
        if !self.has_used() {
            return Ok(None);
        }
        self.check_interrupt()?;
        // The entry after the index.
        fence(Ordering::SeqCst);
        let next = self.lent.next();
        let place = USED_RING + 8 * usize::from(next % SIZE);
        let (head, written) = (self.read(place), self.read(place + 4));
        self.lent
            .new_entries(self.read(USED_INDEX))
            .and_then(|_| self.lent.take(head, written))
            .map(Some)
            .map_err(|fault| format!("{}: used entry {next}: {fault}", self.name))
    }

    /// What came into the empty used ring came with an interrupt; it may be a little
    /// later than the entry.
    fn check_interrupt(&mut self) -> Result<(), String> {
        let Some(before) = self.empty_at.take() else {
            return Ok(());
        };
        let vector = self.vector;
        irq::wait_until(seconds(), || (vector.count() != before).then_some(())).map_err(|error| {
            format!(
                "{}: completion without an interrupt on vector {}: {error}",
                self.name,
                vector.number()
            )
        })
    }

    fn read<T: Copy>(&self, place: usize) -> T {
        // SAFETY: constants above keep places within the two pages, aligned; the device
        // writes there too, so each access is one of its own.
        unsafe { self.memory.add(place).cast().read_volatile() }
    }

    fn write<T: Copy>(&mut self, place: usize, value: T) {
        // SAFETY: as in `read`.
        unsafe { self.memory.add(place).cast().write_volatile(value) }
    }
}

impl Drop for Split {
    fn drop(&mut self) {
        // SAFETY: from `dma_alloc` with as many pages, and no device uses it any more.
        unsafe { Identity::dma_dealloc(0, self.memory, PAGES) };
    }
}

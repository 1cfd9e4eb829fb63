//! A queue of `disk-chaos` with its requests: each has a slot, which is a header, a
//! block of data, a status byte, and descriptors of its own in the ring.

use crate::virtio::split::{Buffer, Descriptor, Split};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use logic::block::{Label, Layout, SIZE};

/// Descriptors of a slot.
pub const CHAIN: u16 = 3;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const STATUS_OK: u8 = 0;
/// A status that no device writes: it shows that the status byte was not written.
const NO_STATUS: u8 = 0xee;
/// The data of a slot at rest begins and ends with it.
const AT_REST: u64 = 0x6166_6665_6374_6564;
const SECTORS: u64 = SIZE as u64 / 512;

/// A request.
#[derive(Clone)]
pub enum Work {
    /// Write a block of data.
    Write(Label),
    /// Read one and compare.
    Read(u64),
    /// Read one and believe it.
    Adopt(u64),
    /// Read what the host says.
    Control,
    /// Make it last.
    Flush,
    /// Write a block of the report.
    Report(u64, Box<[u8; SIZE]>),
}

/// What a device reads and writes for a request.
#[repr(C, align(4096))]
struct Slot {
    data: [u8; SIZE],
    table: [Descriptor; CHAIN as usize],
    kind: u32,
    reserved: u32,
    sector: u64,
    status: u8,
}

/// A queue and its request slots. A slot is either lent to the device or idle.
pub struct Lane {
    /// The ring.
    pub ring: Split,
    slots: Vec<Box<Slot>>,
    /// What each lent slot is about.
    works: Vec<Option<Work>>,
    free: Vec<u16>,
    indirect: bool,
    lengths: bool,
}

impl Lane {
    /// With `depth` slots; every other uses an indirect table if those are there.
    pub fn new(ring: Split, depth: u16, indirect: bool, lengths: bool) -> Self {
        let slot = || {
            let mut slot = Box::new(Slot {
                data: [0; SIZE],
                table: Default::default(),
                kind: 0,
                reserved: 0,
                sector: 0,
                status: 0,
            });
            slot.rest();
            slot
        };
        Self {
            ring,
            slots: (0..depth).map(|_| slot()).collect(),
            works: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            indirect,
            lengths,
        }
    }

    /// After a reset: nothing is lent any more, and the ring is this one.
    pub fn start_again(&mut self, ring: Split) {
        self.ring = ring;
        for slot in 0..self.slots.len() as u16 {
            if self.works[usize::from(slot)].take().is_some() {
                self.release(slot);
            }
        }
    }

    /// Whether another request fits.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Submits `work`; the device learns of it by [`Split::tell`].
    ///
    /// # Errors
    /// The device wrote to the buffer of a request that is not in flight.
    pub fn submit(&mut self, mut work: Work, layout: &Layout) -> Result<(), String> {
        let Some(index) = self.free.pop() else {
            return Err(format!("{}: full", self.ring.name()));
        };
        let name = self.ring.name();
        let slot = &mut self.slots[usize::from(index)];
        slot.check_at_rest().map_err(|what| {
            format!("{name}: the device wrote {what} of request {index} after it was done")
        })?;
        let (kind, block, writable) = match &mut work {
            Work::Write(label) => {
                label.queue = self.ring.queue().into();
                label.fill(&mut slot.data);
                (OUT, label.address, false)
            }
            Work::Report(block, data) => {
                slot.data = **data;
                (OUT, *block, false)
            }
            Work::Read(block) | Work::Adopt(block) => (IN, *block, true),
            Work::Control => (IN, layout.control, true),
            Work::Flush => (FLUSH, 0, false),
        };
        slot.kind = kind;
        slot.sector = block * SECTORS;
        let buffers = slot.buffers(writable);
        // A flush has no data.
        let buffers = match kind {
            FLUSH => &[buffers[0], buffers[2]][..],
            _ => &buffers[..],
        };
        let written = buffers.iter().filter(|buffer| buffer.writable);
        let written = written.map(|buffer| buffer.length).sum();
        let written = self.lengths.then_some(written);
        let head = index * CHAIN;
        if self.indirect && index % 2 == 1 {
            Descriptor::chain(&mut slot.table, buffers, 0);
            let table = Buffer {
                address: slot.table.as_ptr() as u64,
                length: (buffers.len() * size_of::<Descriptor>()) as u32,
                writable: false,
            };
            self.ring.lend_indirect(head, table, written);
        } else {
            self.ring.lend(head, buffers, written);
        }
        self.works[usize::from(index)] = Some(work);
        Ok(())
    }

    /// The next request that is answered, and the slot of its data, which
    /// [`Lane::release`] takes back.
    ///
    /// # Errors
    /// See [`Split::take`]; or it failed.
    pub fn take(&mut self) -> Result<Option<(u16, Work)>, String> {
        let Some(head) = self.ring.take()? else {
            return Ok(None);
        };
        let index = usize::from(head / CHAIN);
        let work = self.works.get_mut(index).and_then(Option::take);
        let Some(work) = work else {
            return Err(format!("{}: request {index} is none", self.ring.name()));
        };
        let slot = &self.slots[index];
        // SAFETY: within the slot; the device wrote it.
        let status = unsafe { (&raw const slot.status).read_volatile() };
        if status != STATUS_OK {
            let what = match status {
                NO_STATUS => String::from("no status"),
                _ => format!("status {status}"),
            };
            let (kind, sector) = (slot.kind, slot.sector);
            return Err(format!(
                "{}: I/O error: request of type {kind} at sector {sector}: {what}",
                self.ring.name()
            ));
        }
        Ok(Some((head / CHAIN, work)))
    }

    /// The data of a slot that was taken.
    pub fn data(&self, slot: u16) -> &[u8; SIZE] {
        &self.slots[usize::from(slot)].data
    }

    /// Puts a slot at rest.
    pub fn release(&mut self, slot: u16) {
        self.slots[usize::from(slot)].rest();
        self.free.push(slot);
    }

    /// Nothing is lent, and the device leaves everything alone.
    ///
    /// # Errors
    /// It does not.
    pub fn check_at_rest(&mut self) -> Result<(), String> {
        if self.ring.has_used() {
            // Says what is wrong with it.
            self.ring.take()?;
        }
        for (index, slot) in self.slots.iter().enumerate() {
            slot.check_at_rest().map_err(|what| {
                format!(
                    "{}: {what} of request {index} was written at rest",
                    self.ring.name()
                )
            })?;
        }
        Ok(())
    }
}

impl Slot {
    fn buffers(&self, writable: bool) -> [Buffer; CHAIN as usize] {
        let buffer = |address: u64, length, writable| Buffer {
            address,
            length,
            writable,
        };
        [
            buffer(&raw const self.kind as u64, 16, false),
            buffer(self.data.as_ptr() as u64, SIZE as u32, writable),
            buffer(&raw const self.status as u64, 1, true),
        ]
    }

    /// Marks what a device may write.
    fn rest(&mut self) {
        self.data[..8].copy_from_slice(&AT_REST.to_le_bytes());
        self.data[SIZE - 8..].copy_from_slice(&AT_REST.to_le_bytes());
        self.status = NO_STATUS;
    }

    /// Whether the marks are there; otherwise, what was written.
    fn check_at_rest(&self) -> Result<(), &'static str> {
        let word = |at: usize| {
            // SAFETY: within the data, aligned; a device that is wrong writes it meanwhile.
            unsafe { self.data.as_ptr().add(at).cast::<u64>().read_volatile() }
        };
        if word(0) != AT_REST || word(SIZE - 8) != AT_REST {
            return Err("the data");
        }
        // SAFETY: within the slot.
        match unsafe { (&raw const self.status).read_volatile() } {
            NO_STATUS => Ok(()),
            _ => Err("the status"),
        }
    }
}

//! The inflight table: which requests a process had taken from its rings and not yet
//! completed, in memory that the front end keeps and hands to the next process
//! (vhost-user, "Inflight I/O tracking", split virtqueues). So each request is completed
//! exactly once, however often the process is killed.
//!
//! What is written here is read only after the writer's death, and a process's stores
//! are then all there, in the order of its program. So nothing here needs a system call
//! or a barrier that the processor would notice; release stores keep the compiler from
//! changing the order.
//!
//! The table comes from the front end, so nothing in it is believed.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use vm_memory::{AtomicInteger, FileOffset, MmapRegion, VolatileMemory};

use crate::Error;
use crate::chain::ChainOrigin;
use crate::fault::{self, FaultPoint};

mod in_flight_list;
use in_flight_list::InFlightList;

/// Each queue's region begins at a multiple of this many bytes.
const ALIGNMENT: u64 = 64;
/// Version of the layout. 0 stands for a region that nobody has used yet.
const VERSION: u16 = 1;

// Offsets in a queue's region (`QueueRegionSplit`). The first 8 bytes are feature bits,
// of which there is none yet.
const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_INDEX_AT: usize = 14;
const HEADER: usize = 16;
// Offsets in an entry (`DescStateSplit`).
const INFLIGHT_AT: usize = 0;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;
const ENTRY: usize = 16;

/// What GET_INFLIGHT_FD and SET_INFLIGHT_FD say of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightLayout {
    /// Number of queues.
    pub queues: u16,
    /// Entries of each, as many as the ring has.
    pub size: u16,
}

impl InflightLayout {
    fn check(self, queues: usize, max_size: u16) -> Result<(), Error> {
        let InflightLayout {
            queues: count,
            size,
        } = self;
        if count == 0 || usize::from(count) > queues {
            return Err(bad(format!("{count} queues; this device has {queues}")));
        }
        if !size.is_power_of_two() || size > max_size {
            return Err(bad(format!(
                "{size} entries a queue, which is no power of two up to {max_size}"
            )));
        }
        Ok(())
    }

    /// The same for the largest rings.
    fn with_room(self, max_size: u16) -> Self {
        InflightLayout {
            size: max_size,
            ..self
        }
    }

    /// Length of a queue's region in bytes.
    fn stride(self) -> u64 {
        ((HEADER + ENTRY * usize::from(self.size)) as u64).next_multiple_of(ALIGNMENT)
    }

    /// Length of all regions in bytes.
    fn len(self) -> u64 {
        self.stride() * u64::from(self.queues)
    }
}

fn bad(why: String) -> Error {
    Error::InflightTable(why)
}

/// Makes a table in which nothing is in flight, for a device of `queues` queues of
/// `max_size` entries at most. Returns its file and its length in bytes.
///
/// It has room for the largest rings whatever size is asked for: QEMU's virtio-mmio asks
/// for 128 entries and lets the driver have rings of 1024.
///
/// # Errors
/// When there is no such device, or no memory.
pub fn create(shape: InflightLayout, queues: usize, max_size: u16) -> Result<(File, u64), Error> {
    shape.check(queues, max_size)?;
    let shape = shape.with_room(max_size);
    let make = || {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("inflight", flags)?;
        ftruncate(&file, shape.len())?;
        // A file that shrinks under a mapping kills whoever looks there.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals)?;
        Ok(File::from(file))
    };
    let made = make().map_err(|errno: rustix::io::Errno| Error::io("inflight table")(errno.into()));
    Ok((made?, shape.len()))
}

/// A table that the front end has handed over.
pub struct InflightTable {
    shape: InflightLayout,
    mapping: MmapRegion<()>,
}

impl InflightTable {
    /// Maps `len` bytes of `file` from `offset` on, for a device of `queues` queues of
    /// `max_size` entries at most.
    ///
    /// # Errors
    /// When the table has another shape than it must have for its queues, or the file
    /// is too short.
    pub fn map(
        shape: InflightLayout,
        file: File,
        offset: u64,
        len: u64,
        queues: usize,
        max_size: u16,
    ) -> Result<Self, Error> {
        shape.check(queues, max_size)?;
        // The length tells one that `create` made from one of the size that is said.
        let largest = shape.with_room(max_size);
        let shape = if len == largest.len() { largest } else { shape };
        if len < shape.len() {
            return Err(bad(format!(
                "{len} bytes are too few for {} queues of {} entries",
                shape.queues, shape.size
            )));
        }
        // fstat(2), not statx(2): the sandbox knows only the former.
        let file_len = fstat(&file)
            .map_err(|e| bad(format!("fstat: {e}")))?
            .st_size as u64;
        // Mapping past the end of the file would be a SIGBUS on first use.
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(bad(format!(
                "{len} bytes from {offset} on, where its file has only {file_len}"
            )));
        }
        // Only what the queues have: a longer mapping would be of no use.
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), shape.len() as usize)
            .map_err(|e| bad(format!("mmap: {e}")))?;
        Ok(InflightTable { shape, mapping })
    }

    /// A number in the region of queue `queue`. `None` outside it.
    fn at<T: AtomicInteger>(&self, queue: usize, offset: usize) -> Option<&T> {
        if queue >= usize::from(self.shape.queues) || offset >= entry(self.shape.size, 0) {
            return None;
        }
        let start = queue * self.shape.stride() as usize;
        self.mapping.get_atomic_ref(start + offset).ok()
    }

    /// # Errors
    /// When a ring of `size` entries has no place in the region of queue `queue`.
    pub fn must_hold(&self, queue: usize, size: u16) -> Result<(), Error> {
        let InflightLayout { queues, size: room } = self.shape;
        if queue >= usize::from(queues) {
            return Err(bad(format!("queue {queue} is not one of its {queues}")));
        }
        if size > room {
            return Err(bad(format!(
                "queue {queue}: {room} entries are too few for a ring of {size}"
            )));
        }
        Ok(())
    }
}

/// What a ring tracks in its region of the table.
pub struct InflightTracker {
    table: Arc<InflightTable>,
    queue: usize,
    /// Number of the next request that is taken.
    counter: u64,
    /// InFlightList and not completed, in this order.
    in_flight: InFlightList,
    /// In flight when the process before this one died, in the order in which it had
    /// taken them.
    again: VecDeque<u16>,
}

impl InflightTracker {
    /// Finds out what is in flight in queue `queue`, whose ring has `size` entries, the
    /// used index `used` and the available index `available`, and puts right what the
    /// death of a process in mid-step has left.
    ///
    /// # Errors
    /// When the table has no room for the ring, or what is in it cannot be.
    pub fn recover(
        table: Arc<InflightTable>,
        queue: usize,
        size: u16,
        used: u16,
        available: u16,
    ) -> Result<Self, Error> {
        table.must_hold(queue, size)?;
        let mut tracker = InflightTracker {
            table,
            queue,
            counter: 0,
            in_flight: InFlightList::new(size),
            again: VecDeque::new(),
        };
        tracker
            .look(size, used, available)
            .map_err(|why| Error::Corrupt {
                queue,
                why: format!("inflight table: {why}"),
            })?;
        Ok(tracker)
    }

    fn look(&mut self, size: u16, used: u16, available: u16) -> Result<(), String> {
        let version = self.load::<AtomicU16>(VERSION_AT)?;
        if version == 0 {
            self.store::<AtomicU16>(ENTRIES_AT, self.table.shape.size)?;
            self.store::<AtomicU16>(USED_INDEX_AT, used)?;
            return self.store::<AtomicU16>(VERSION_AT, VERSION);
        }
        if version != VERSION {
            return Err(format!("version {version} is not known"));
        }
        self.finish_last_batch(size, used)?;
        let mut inflight = Vec::new();
        for head in 0..self.table.shape.size {
            if self.load::<AtomicU8>(entry(head, INFLIGHT_AT))? == 0 {
                continue;
            }
            if head >= size {
                return Err(format!(
                    "request {head} is in flight in a ring of {size} entries"
                ));
            }
            inflight.push((self.load::<AtomicU64>(entry(head, COUNTER_AT))?, head));
        }
        let waiting = available.wrapping_sub(used);
        if inflight.len() > usize::from(waiting) {
            return Err(format!(
                "{} requests are in flight, of {waiting} that the driver waits for",
                inflight.len()
            ));
        }
        inflight.sort_unstable();
        self.counter = inflight.last().map_or(0, |(last, _)| last.wrapping_add(1));
        self.again = inflight.into_iter().map(|(_, head)| head).collect();
        Ok(())
    }

    /// A process that published a batch may not have lived to take it out of the table:
    /// the used index knows better. The batch hangs together from its last request on.
    fn finish_last_batch(&self, size: u16, used: u16) -> Result<(), String> {
        let count = used.wrapping_sub(self.load::<AtomicU16>(USED_INDEX_AT)?);
        if count == 0 {
            return Ok(());
        }
        let mut head = self.load::<AtomicU16>(LAST_BATCH_HEAD_AT)?;
        // A ring that went on without this table is further ahead than any batch: then
        // nothing may be in flight, which is seen later.
        let count = if count > size { 0 } else { count };
        for _ in 0..count {
            let next = self.load::<AtomicU16>(entry(head, NEXT_AT))?;
            self.store::<AtomicU8>(entry(head, INFLIGHT_AT), 0)?;
            head = next;
        }
        self.store::<AtomicU16>(USED_INDEX_AT, used)
    }

    /// How many requests are in flight.
    pub fn inflight(&self) -> u16 {
        // No more than the ring has entries.
        (self.in_flight.len() + self.again.len()) as u16
    }

    /// How many requests of the process before this one wait to be taken again.
    pub fn to_resubmit(&self) -> usize {
        self.again.len()
    }

    /// The next request that the process before this one had taken.
    ///
    /// # Errors
    /// Cannot fail as long as those come before any other.
    pub fn take_again(&mut self) -> Result<Option<u16>, String> {
        let Some(head) = self.again.pop_front() else {
            return Ok(None);
        };
        self.in_flight.push(head, ChainOrigin::Inflight)?;
        Ok(Some(head))
    }

    /// A request was found in the available ring at `position`.
    ///
    /// # Errors
    /// When its head is none, or that of a request that is in flight.
    pub fn take(&mut self, head: u16, position: u16) -> Result<(), String> {
        self.in_flight
            .push(head, ChainOrigin::Available(position))?;
        self.store::<AtomicU64>(entry(head, COUNTER_AT), self.counter)?;
        self.store::<AtomicU8>(entry(head, INFLIGHT_AT), 1)?;
        self.counter = self.counter.wrapping_add(1);
        Ok(())
    }

    /// Takes the request that was taken last back; returns it.
    ///
    /// # Errors
    /// Cannot fail for a request that was taken.
    pub(crate) fn take_back(&mut self) -> Result<Option<(u16, ChainOrigin)>, String> {
        let Some((head, origin)) = self.in_flight.pop() else {
            return Ok(None);
        };
        match origin {
            ChainOrigin::Available(_) => self.store::<AtomicU8>(entry(head, INFLIGHT_AT), 0)?,
            ChainOrigin::Inflight => self.again.push_front(head),
        }
        Ok(Some((head, origin)))
    }

    /// A request becomes the last of the batch that is about to be completed.
    ///
    /// # Errors
    /// When there is no such request.
    pub fn link(&self, head: u16) -> Result<(), String> {
        let last = self.load::<AtomicU16>(LAST_BATCH_HEAD_AT)?;
        self.store::<AtomicU16>(entry(head, NEXT_AT), last)?;
        self.store::<AtomicU16>(LAST_BATCH_HEAD_AT, head)
    }

    /// The batch `completed` is in the used ring, whose index is `used` now.
    ///
    /// # Errors
    /// Cannot fail for requests that were linked.
    pub fn complete(&mut self, completed: &[(u16, u32)], used: u16) -> Result<(), String> {
        for &(head, _) in completed {
            self.store::<AtomicU8>(entry(head, INFLIGHT_AT), 0)?;
            self.in_flight.remove(head);
        }
        fault::hit(FaultPoint::Cleared);
        self.store::<AtomicU16>(USED_INDEX_AT, used)
    }

    fn load<T: AtomicInteger>(&self, offset: usize) -> Result<T::V, String> {
        self.table
            .at::<T>(self.queue, offset)
            .map(|place| place.load(Ordering::Acquire))
            .ok_or_else(outside)
    }

    fn store<T: AtomicInteger>(&self, offset: usize, value: T::V) -> Result<(), String> {
        fault::step();
        self.table
            .at::<T>(self.queue, offset)
            .map(|place| place.store(value, Ordering::Release))
            .ok_or_else(outside)
    }
}

fn outside() -> String {
    "a request's number is too high".to_owned()
}

fn entry(head: u16, offset: usize) -> usize {
    HEADER + ENTRY * usize::from(head) + offset
}

#[cfg(test)]
mod tests;

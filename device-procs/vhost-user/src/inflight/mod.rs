//! The in-flight table: which requests a process has popped from its rings and not yet
//! completed, in memory that the front end keeps and hands to the next process
//! (vhost-user, "Inflight I/O tracking", split virtqueues). With it, each request is
//! completed exactly once, however often the process is killed.
//!
//! [`InflightTable`] is the shared memory, [`InflightTracker`] what one running ring does
//! with its region of it. The table is read only after the death of the process that wrote
//! it. All stores of that process are visible then, in program order, so neither system
//! calls nor CPU barriers are needed; release stores keep the compiler from reordering.
//!
//! The table comes from the front end, so everything in it is checked.

mod in_flight_list;
mod tracker;

use std::fs::File;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use vm_memory::{AtomicInteger, FileOffset, MmapRegion, VolatileMemory};

use crate::Error;
pub use tracker::InflightTracker;

/// Each queue's region begins at a multiple of this many bytes.
const ALIGNMENT: u64 = 64;
/// Version of the layout; 0 in a region that has not been used yet.
const VERSION: u16 = 1;

// Offsets in a queue's region (`QueueRegionSplit`). The first 8 bytes are feature bits, of
// which the specification defines none.
const VERSION_OFFSET: usize = 8;
const DESC_NUM_OFFSET: usize = 10;
const LAST_BATCH_HEAD_OFFSET: usize = 12;
const USED_IDX_OFFSET: usize = 14;
const HEADER_SIZE: usize = 16;
// Offsets in an entry (`DescStateSplit`).
const INFLIGHT_OFFSET: usize = 0;
const NEXT_OFFSET: usize = 6;
const COUNTER_OFFSET: usize = 8;
const ENTRY_SIZE: usize = 16;

/// The dimensions of a table in GET_INFLIGHT_FD and SET_INFLIGHT_FD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightLayout {
    /// Number of queues.
    pub queues: u16,
    /// Entries of each queue's region.
    pub size: u16,
}

impl InflightLayout {
    fn check(self, queues: usize, max_size: u16) -> Result<(), Error> {
        if self.queues == 0 || usize::from(self.queues) > queues {
            return Err(table_error(format!(
                "{} queues; this device has {queues}",
                self.queues
            )));
        }
        if !self.size.is_power_of_two() || self.size > max_size {
            return Err(table_error(format!(
                "{} entries a queue is not a power of two up to {max_size}",
                self.size
            )));
        }
        Ok(())
    }

    /// The same for the largest rings.
    fn with_size(self, size: u16) -> Self {
        InflightLayout { size, ..self }
    }

    /// Length of a queue's region in bytes.
    fn stride(self) -> u64 {
        (entry_offset(self.size, 0) as u64).next_multiple_of(ALIGNMENT)
    }

    /// Length of all regions in bytes.
    fn len(self) -> u64 {
        self.stride() * u64::from(self.queues)
    }
}

fn table_error(why: String) -> Error {
    Error::InflightTable(why)
}

fn no_such_request() -> String {
    "it names a request that the ring does not have".to_owned()
}

/// The offset of a field of the entry for `head` in a queue's region.
fn entry_offset(head: u16, field: usize) -> usize {
    HEADER_SIZE + ENTRY_SIZE * usize::from(head) + field
}

/// Makes a table without requests in flight, for a device of `queues` queues of `max_size`
/// entries at most. Returns its file and its length in bytes.
///
/// The table has room for the largest rings, whatever size the front end asks for: QEMU's
/// virtio-mmio asks for 128 entries and lets the driver use rings of 1024.
///
/// # Errors
/// The device has fewer queues or smaller rings, or no memory is left.
pub fn create(layout: InflightLayout, queues: usize, max_size: u16) -> Result<(File, u64), Error> {
    layout.check(queues, max_size)?;
    let layout = layout.with_size(max_size);
    let make = || {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("inflight", flags)?;
        ftruncate(&file, layout.len())?;
        // If the file shrank, each access to the mapping would raise SIGBUS.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals)?;
        Ok(File::from(file))
    };
    let file = make().map_err(|errno: rustix::io::Errno| Error::io("inflight table")(errno.into()));
    Ok((file?, layout.len()))
}

/// A table that the front end has handed over (SET_INFLIGHT_FD).
pub struct InflightTable {
    layout: InflightLayout,
    mapping: MmapRegion<()>,
}

impl InflightTable {
    /// Maps `len` bytes of `file` from `offset` on, for a device of `queues` queues of
    /// `max_size` entries at most.
    ///
    /// # Errors
    /// The table does not fit the device's queues, or the file is too short.
    pub fn map(
        layout: InflightLayout,
        file: File,
        offset: u64,
        len: u64,
        queues: usize,
        max_size: u16,
    ) -> Result<Self, Error> {
        layout.check(queues, max_size)?;
        // A table that `create` made is longer than its layout says: see there.
        let largest = layout.with_size(max_size);
        let layout = if len == largest.len() {
            largest
        } else {
            layout
        };
        if len < layout.len() {
            return Err(table_error(format!(
                "{len} bytes are too few for {} queues of {} entries",
                layout.queues, layout.size
            )));
        }
        // fstat(2), not statx(2), which the sandbox does not allow.
        let file_len = fstat(&file)
            .map_err(|e| table_error(format!("fstat: {e}")))?
            .st_size as u64;
        // An access to a mapping beyond the end of the file would raise SIGBUS.
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(table_error(format!(
                "{len} bytes at offset {offset} reach beyond the {file_len} bytes of its file"
            )));
        }
        // Only the regions are mapped; the file may be longer.
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), layout.len() as usize)
            .map_err(|e| table_error(format!("mmap: {e}")))?;
        Ok(InflightTable { layout, mapping })
    }

    /// A field in the region of queue `queue`; `None` outside it.
    fn field<T: AtomicInteger>(&self, queue: usize, offset: usize) -> Option<&T> {
        if queue >= usize::from(self.layout.queues) || offset >= entry_offset(self.layout.size, 0) {
            return None;
        }
        let start = queue * self.layout.stride() as usize;
        self.mapping.get_atomic_ref(start + offset).ok()
    }

    /// Checks that the table has room for a ring of `size` entries of queue `queue`.
    ///
    /// # Errors
    /// It has not.
    pub fn check_room(&self, queue: usize, size: u16) -> Result<(), Error> {
        let InflightLayout { queues, size: room } = self.layout;
        if queue >= usize::from(queues) {
            let why = format!("queue {queue} is not one of its {queues}");
            return Err(table_error(why));
        }
        if size > room {
            return Err(table_error(format!(
                "queue {queue}: {room} entries are too few for a ring of {size}"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

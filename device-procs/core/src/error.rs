//! Why a device process refuses something: one line that names the operation
//! and, where there is one, the queue.

use std::io;

use vm_memory::{GuestAddress, GuestRegionCollectionError};

/// Errors of the protocol side of a device process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The front end named a queue that this device does not have.
    #[error("queue {index} does not exist: this device has {queues}")]
    NoSuchQueue {
        /// What was asked for.
        index: usize,
        /// How many there are.
        queues: usize,
    },
    /// SET_VRING_NUM with a size that no split ring can have.
    #[error("queue {queue}: ring size {size} is not a power of two up to {max}")]
    RingSize {
        /// Queue index.
        queue: usize,
        /// What was asked for.
        size: u32,
        /// The device's maximum.
        max: u16,
    },
    /// A ring address that lies in no region of the memory table.
    #[error("queue {queue}: user address {address:#x} is in no memory region")]
    RingAddress {
        /// Queue index.
        queue: usize,
        /// Front-end user address.
        address: u64,
    },
    /// A ring that is misaligned or does not fit into guest memory.
    #[error("queue {queue}: the rings are misaligned or reach beyond guest memory")]
    RingPlacement {
        /// Queue index.
        queue: usize,
    },
    /// Feature bits that were not offered.
    #[error("feature bits {0:#x} were not offered")]
    Features(u64),
    /// A memory region that cannot be.
    #[error("memory region at {address:#x}, {size:#x} bytes: {why}")]
    Region {
        /// Guest-physical address.
        address: u64,
        /// Size in bytes.
        size: u64,
        /// What is wrong.
        why: String,
    },
    /// Regions that overlap or are unsorted.
    #[error("memory table: {0}")]
    Regions(#[from] GuestRegionCollectionError),
    /// The ring of a queue is corrupt; it stays stopped until it is set up again.
    #[error("queue {queue}: {why}")]
    Corrupt {
        /// Queue index.
        queue: usize,
        /// What the guest did.
        why: String,
    },
    /// A descriptor chain that no driver may build (virtio 1.2 section 2.7).
    #[error("queue {queue}: descriptor chain at {head}: {why}")]
    Chain {
        /// Queue index.
        queue: usize,
        /// Head descriptor.
        head: u16,
        /// What is wrong with it.
        why: String,
    },
    /// A configuration access outside the device's configuration space.
    #[error("configuration access of {size} bytes at {offset}: out of range")]
    ConfigRange {
        /// Offset in bytes.
        offset: u32,
        /// Size in bytes.
        size: usize,
    },
    /// An inflight table that cannot be, or not for this ring.
    #[error("inflight table: {0}")]
    InflightTable(String),
    /// A message that this device cannot serve.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// The operation.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl Error {
    /// Wraps a failed system call.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let what = what.into();
        move |source| Error::Io { what, source }
    }

    /// A buffer that lies outside guest memory.
    pub(crate) fn buffer(queue: usize, head: u16, address: GuestAddress, len: u32) -> Error {
        Error::Chain {
            queue,
            head,
            why: format!(
                "buffer at {:#x}, {len} bytes, is not in guest memory",
                address.0
            ),
        }
    }
}

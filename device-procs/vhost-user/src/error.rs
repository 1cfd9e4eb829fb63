//! Why a device process refuses what the front end or the driver asks.

use std::io;

use vm_memory::{GuestAddress, GuestRegionCollectionError};

/// Errors of the vhost-user side of a device process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The front end named a queue that this device does not have.
    #[error("queue {index} does not exist: this device has {queues}")]
    NoSuchQueue {
        /// The index that was given.
        index: usize,
        /// Number of queues.
        queues: usize,
    },
    /// SET_VRING_NUM with a size that no split ring can have.
    #[error("queue {queue}: ring size {size} is not a power of two up to {max}")]
    RingSize {
        /// Queue index.
        queue: usize,
        /// The size that was given.
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
    /// An invalid memory region.
    #[error("memory region at {address:#x}, {size:#x} bytes: {why}")]
    Region {
        /// Guest-physical address.
        address: u64,
        /// Size in bytes.
        size: u64,
        /// What is wrong.
        why: String,
    },
    /// Memory regions that overlap.
    #[error("memory table: {0}")]
    Regions(#[from] GuestRegionCollectionError),
    /// A malformed descriptor chain (virtio 1.2 section 2.7).
    #[error("{0}")]
    Chain(String),
    /// A configuration access outside the device's configuration space, or to a field that
    /// the driver cannot write.
    #[error("configuration access of {size} bytes at offset {offset}: there is no such field")]
    ConfigRange {
        /// Offset in bytes.
        offset: u32,
        /// Size in bytes.
        size: usize,
    },
    /// An in-flight table that is invalid or does not fit a ring.
    #[error("inflight table: {0}")]
    InflightTable(String),
    /// A message that this device does not support.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    /// A system call failed.
    #[error("{operation}: {source}")]
    Io {
        /// What failed.
        operation: String,
        /// The error of the kernel.
        source: io::Error,
    },
}

impl Error {
    /// Wraps the error of a system call; for `map_err`.
    pub fn io(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let operation = operation.into();
        move |source| Error::Io { operation, source }
    }

    /// A buffer that lies outside guest memory.
    pub(crate) fn buffer(address: GuestAddress, len: u32) -> Error {
        Error::Chain(format!(
            "its buffer of {len} bytes at {:#x} is not in guest memory",
            address.0
        ))
    }
}

//! What the front end sets of a ring, whether it runs or not.

use std::os::fd::OwnedFd;

use crate::Error;
use crate::memory::MemoryTable;
use crate::split_ring::{RingLayout, SplitRing};

/// Ring addresses of SET_VRING_ADDR: front-end user addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// The settings of one ring.
#[derive(Default)]
pub(super) struct RingSettings {
    /// SET_VRING_NUM.
    pub size: u16,
    /// SET_VRING_ADDR.
    pub addresses: Option<RingAddresses>,
    /// SET_VRING_BASE: the available index at which the ring starts. When the ring stops,
    /// the index up to which it was processed.
    pub base: u16,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// SET_VRING_ENABLE.
    pub enabled: bool,
    /// SET_VRING_KICK: the doorbell, as long as the ring is started.
    pub kick: Option<OwnedFd>,
    /// SET_VRING_CALL: the interrupt.
    pub call: Option<OwnedFd>,
    /// SET_VRING_ERR.
    pub err: Option<OwnedFd>,
}

impl RingSettings {
    /// The ring in guest memory.
    ///
    /// # Errors
    /// An area is not in guest memory, or misaligned.
    pub fn map(&self, queue: usize, table: &MemoryTable) -> Result<SplitRing, Error> {
        let to_guest = |address| {
            table
                .to_guest(address)
                .ok_or(Error::RingAddress { queue, address })
        };
        let addresses = self.addresses.unwrap_or_default();
        let layout = RingLayout {
            descriptors: to_guest(addresses.descriptors)?,
            available: to_guest(addresses.available)?,
            used: to_guest(addresses.used)?,
        };
        SplitRing::new(table.memory(), layout, self.size, self.event_idx)
            .ok_or(Error::RingPlacement { queue })
    }
}

/// Writes to an eventfd of the front end.
pub(super) fn signal(fd: Option<&OwnedFd>, queue: usize) {
    if let Some(fd) = fd
        && let Err(error) = rustix::io::write(fd, &1u64.to_ne_bytes())
    {
        // EAGAIN: the counter is full, so the event is pending anyway.
        tracing::debug!(queue, %error, "writing to an eventfd of the front end failed");
    }
}

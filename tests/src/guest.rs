//! A guest with its front end: the vhost-user side of a test.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost::VhostBackend;
use vhost::VringConfigData;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::queue::DriverQueue;
use crate::ram::Ram;

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// VIRTIO_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// VIRTIO_F_INDIRECT_DESC.
pub const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Number of queues that the front end assumes, so that tests can name queues that do not
/// exist.
const MAX_QUEUES: u64 = 256;

/// A guest.
pub struct Guest {
    /// The front end; [`Guest`]'s methods are the usual way.
    pub frontend: Frontend,
    /// A duplicate of its socket.
    pub stream: UnixStream,
    /// Its memory.
    pub ram: Arc<Ram>,
    /// Its queues, in the order in which they were started.
    pub queues: Vec<DriverQueue>,
    /// The features that were negotiated.
    pub features: u64,
}

impl Guest {
    /// A guest that has negotiated nothing.
    pub fn new(stream: UnixStream, ram: Ram) -> Self {
        Guest {
            stream: stream.try_clone().unwrap(),
            frontend: Frontend::from_stream(stream, MAX_QUEUES),
            ram: Arc::new(ram),
            queues: Vec::new(),
            features: 0,
        }
    }

    /// A guest that has negotiated all features and shared its memory, with `queues` queues of
    /// 64 entries.
    pub fn boot(stream: UnixStream, features: u64, queues: usize) -> Self {
        let mut guest = Guest::new(stream, Ram::small());
        guest.negotiate(features);
        guest.share_memory();
        for _ in 0..queues {
            guest.add_queue(64);
        }
        guest
    }

    /// Negotiates the offered part of `features`, VERSION_1 and the protocol features. From now
    /// on every message is acknowledged.
    pub fn negotiate(&mut self, features: u64) {
        self.frontend.set_owner().unwrap();
        let offered = self.frontend.get_features().unwrap();
        self.features = offered & (features | VERSION_1 | PROTOCOL_FEATURES);
        if offered & PROTOCOL_FEATURES != 0 {
            let offered = self.frontend.get_protocol_features().unwrap();
            self.frontend.set_features(self.features).unwrap();
            self.frontend
                .set_protocol_features(offered & known())
                .unwrap();
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        } else {
            self.frontend.set_features(self.features).unwrap();
        }
    }

    /// Returns another front end on `stream` that goes on with this guest's memory and queues,
    /// from the used index: the old device process may be gone and cannot be asked.
    pub fn move_to(self, stream: UnixStream) -> Self {
        let (ram, queues, features) = (self.ram, self.queues, self.features);
        drop((self.frontend, self.stream));
        let mut next = Guest {
            stream: stream.try_clone().unwrap(),
            frontend: Frontend::from_stream(stream, MAX_QUEUES),
            ram,
            queues,
            features: 0,
        };
        next.negotiate(features);
        next.share_memory();
        for index in 0..next.queues.len() {
            next.start(index, next.queues[index].device_used_index());
        }
        next
    }

    /// Shares all memory at once (SET_MEM_TABLE).
    pub fn share_memory(&mut self) {
        self.frontend.set_mem_table(&self.ram.regions()).unwrap();
    }

    /// Makes a queue of `size` entries, starts and enables it; returns its index.
    pub fn add_queue(&mut self, size: u16) -> usize {
        let index = self.new_queue(size);
        self.start(index, 0);
        index
    }

    /// Makes a queue without telling the device.
    pub fn new_queue(&mut self, size: u16) -> usize {
        let mut queue = DriverQueue::new(&self.ram, size);
        queue.event_idx = self.features & EVENT_IDX != 0;
        self.queues.push(queue);
        self.queues.len() - 1
    }

    /// Sets queue `index` up at `base`, starts and enables it.
    pub fn start(&mut self, index: usize, base: u16) {
        self.set_up(index, base);
        let queue = &self.queues[index];
        self.frontend.set_vring_kick(index, &queue.kick).unwrap();
        if self.features & PROTOCOL_FEATURES != 0 {
            self.frontend.set_vring_enable(index, true).unwrap();
        }
    }

    /// Tells the device everything about queue `index` but its doorbell.
    pub fn set_up(&mut self, index: usize, base: u16) {
        let queue = &self.queues[index];
        self.frontend.set_vring_num(index, queue.size).unwrap();
        self.frontend.set_vring_base(index, base).unwrap();
        self.frontend
            .set_vring_addr(index, &self.addresses(index))
            .unwrap();
        self.frontend.set_vring_call(index, &queue.call).unwrap();
    }

    /// Addresses of queue `index` as user addresses.
    pub fn addresses(&self, index: usize) -> VringConfigData {
        let queue = &self.queues[index];
        VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: self.ram.user(queue.descriptors),
            used_ring_addr: self.ram.user(queue.used_ring),
            avail_ring_addr: self.ram.user(queue.available),
            log_addr: None,
        }
    }

    /// Stops queue `index`; returns the next available index.
    pub fn stop(&mut self, index: usize) -> u16 {
        let base = self.frontend.get_vring_base(index).unwrap();
        u16::try_from(base).unwrap()
    }

    /// Interrupts of all queues since the last call.
    pub fn interrupts(&self) -> u64 {
        self.queues.iter().map(DriverQueue::interrupts).sum()
    }

    /// `len` bytes of the configuration space.
    pub fn config(&mut self, offset: u32, len: usize) -> Vec<u8> {
        let flags = VhostUserConfigFlags::empty();
        let room = vec![0; len];
        let config = self.frontend.get_config(offset, len as u32, flags, &room);
        config.unwrap().1
    }

    /// Writes to the configuration space.
    ///
    /// # Errors
    /// The device refuses it.
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> vhost::Result<()> {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.frontend.set_config(offset, flags, bytes)
    }
}

/// The protocol features that this front end uses.
pub fn known() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::REPLY_ACK
}

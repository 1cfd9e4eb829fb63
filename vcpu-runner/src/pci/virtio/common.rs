//! The common configuration structure (virtio 1.2 section 4.1.4.3): registers
//! and what writing them sets off. Pure state; who acts on an [`Effect`] is
//! [`super::VirtioPci`].

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};

use super::backend::QueueSetup;

/// No vector is assigned.
pub const NO_VECTOR: u16 = 0xffff;
/// Length of the structure in bytes.
pub const LENGTH: usize = 60;

/// Bits of the device status field (section 2.1).
pub mod status {
    #![allow(missing_docs, reason = "the specification's names")]
    use super::*;
    pub const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
    pub const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
    pub const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
    pub const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
    pub const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
    pub const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
}

/// What a write makes necessary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// DRIVER_OK: start the enabled queues.
    Start,
    /// Stop all queues, then call [`Common::reset`].
    StopAll,
    /// The device was reset, with nothing to stop.
    Reset,
    /// Start this queue of a running device.
    StartQueue(usize),
    /// Stop this queue, then call [`Common::queue_reset_done`].
    StopQueue(usize),
    /// Vectors of queues or of the configuration changed.
    Vectors,
}

#[derive(Clone, Copy)]
struct Queue {
    size: u16,
    vector: u16,
    enabled: bool,
    resetting: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// The registers.
pub struct Common {
    offered: u64,
    /// What is offered after the next reset.
    next_offer: u64,
    max_queue_size: u16,
    vectors: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    status: u8,
    /// Status 0 was written and the queues are being stopped.
    resetting: bool,
    generation: u8,
    queue_select: u16,
    queues: Vec<Queue>,
}

impl Common {
    /// Registers of a device after reset. `vectors` is the MSI-X table's size.
    pub fn new(offered: u64, queues: usize, max_queue_size: u16, vectors: u16) -> Self {
        let queue = Queue {
            size: max_queue_size,
            vector: NO_VECTOR,
            enabled: false,
            resetting: false,
            descriptors: 0,
            driver: 0,
            device: 0,
        };
        Common {
            offered,
            next_offer: offered,
            max_queue_size,
            vectors,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            status: 0,
            resetting: false,
            generation: 0,
            queue_select: 0,
            queues: vec![queue; queues],
        }
    }

    /// The state after a device reset. The generation goes on counting, so that
    /// nobody mistakes an old configuration for the current one.
    pub fn reset(&mut self) {
        *self = Common {
            generation: self.generation,
            ..Common::new(
                self.next_offer,
                self.queues.len(),
                self.max_queue_size,
                self.vectors,
            )
        };
    }

    /// Offers these feature bits to the next driver. The present one keeps what it
    /// has accepted.
    pub fn offer(&mut self, features: u64) {
        self.next_offer = features;
        if self.status == 0 {
            self.offered = features;
        }
    }

    /// The feature bits that the driver accepted, if it has come so far.
    pub fn accepted(&self) -> Option<u64> {
        (self.status & status::FEATURES_OK != 0).then_some(self.driver_features)
    }

    /// Device status.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// Whether the driver has taken the device into use.
    pub fn is_live(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    /// Feature bits that the driver accepted.
    pub fn features(&self) -> u64 {
        self.driver_features
    }

    /// Vector of the configuration change notification.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// Vector of queue `index`.
    pub fn queue_vector(&self, index: usize) -> u16 {
        self.queues.get(index).map_or(NO_VECTOR, |q| q.vector)
    }

    /// The device's configuration changed.
    pub fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Sets DEVICE_NEEDS_RESET (section 2.1.2).
    pub fn need_reset(&mut self) {
        self.status |= status::NEEDS_RESET;
    }

    /// The enabled queues as the driver set them up.
    pub fn enabled_queues(&self) -> Vec<QueueSetup> {
        (0..self.queues.len())
            .filter(|&index| self.queues[index].enabled && !self.queues[index].resetting)
            .map(|index| self.setup(index))
            .collect()
    }

    /// How the driver set up queue `index`, which must exist.
    pub fn setup(&self, index: usize) -> QueueSetup {
        let queue = &self.queues[index];
        QueueSetup {
            index,
            size: queue.size,
            descriptors: queue.descriptors,
            driver: queue.driver,
            device: queue.device,
        }
    }

    /// Queue `index` has been stopped for its reset.
    pub fn queue_reset_done(&mut self, index: usize) {
        let fresh = Common::new(0, 1, self.max_queue_size, 0).queues[0];
        if let Some(queue) = self.queues.get_mut(index) {
            *queue = fresh;
        }
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// Reads any part of the structure.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let half = |word: u64, select: u32| match select {
            0 => word as u32,
            1 => (word >> 32) as u32,
            _ => 0,
        };
        let mut image = [0u8; LENGTH];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.device_feature_select.to_le_bytes());
        put(
            4,
            &half(self.offered, self.device_feature_select).to_le_bytes(),
        );
        put(8, &self.driver_feature_select.to_le_bytes());
        put(
            12,
            &half(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(16, &self.config_vector.to_le_bytes());
        put(18, &(self.queues.len() as u16).to_le_bytes());
        put(20, &[self.status, self.generation]);
        put(22, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.selected() {
            put(24, &queue.size.to_le_bytes());
            put(26, &queue.vector.to_le_bytes());
            put(28, &u16::from(queue.enabled).to_le_bytes());
            put(30, &self.queue_select.to_le_bytes());
            put(32, &queue.descriptors.to_le_bytes());
            put(40, &queue.driver.to_le_bytes());
            put(48, &queue.device.to_le_bytes());
            put(56, &self.queue_select.to_le_bytes());
            put(58, &u16::from(queue.resetting).to_le_bytes());
        } else {
            // A queue that does not exist has size 0 and no vector.
            put(26, &NO_VECTOR.to_le_bytes());
        }
        for (at, byte) in (offset..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes one field, in the widths that the specification asks of drivers:
    /// a field's own, and halves of the 64-bit ones. Other writes are ignored.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Effect {
        // Nothing counts before the reset in progress is done.
        if self.resetting {
            return Effect::None;
        }
        let mut wide = [0; 8];
        let Some(low) = wide.get_mut(..data.len()) else {
            return Effect::None;
        };
        low.copy_from_slice(data);
        let value = u64::from_le_bytes(wide);
        match (offset, data.len()) {
            (0, 4) => self.device_feature_select = value as u32,
            (8, 4) => self.driver_feature_select = value as u32,
            (12, 4) => self.write_features(value as u32),
            (16, 2) => {
                self.config_vector = self.vector(value as u16);
                return Effect::Vectors;
            }
            (20, 1) => return self.write_status(value as u8),
            (22, 2) => self.queue_select = value as u16,
            (24..LENGTH, _) => return self.write_queue(offset, data.len(), value),
            _ => {}
        }
        Effect::None
    }

    /// A vector that the table does not have cannot be mapped (4.1.5.1.2.1).
    fn vector(&self, value: u16) -> u16 {
        if value < self.vectors {
            value
        } else {
            NO_VECTOR
        }
    }

    fn write_features(&mut self, value: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let shift = match self.driver_feature_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let mask = u64::from(u32::MAX) << shift;
        self.driver_features = (self.driver_features & !mask) | u64::from(value) << shift;
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            // Queues may run only if the driver got this far.
            if self.is_live() {
                self.resetting = true;
                return Effect::StopAll;
            }
            self.reset();
            return Effect::Reset;
        }
        let was_live = self.is_live();
        let mut wanted = value
            & (status::ACKNOWLEDGE
                | status::DRIVER
                | status::FEATURES_OK
                | status::DRIVER_OK
                | status::FAILED);
        if wanted & !self.status & status::FEATURES_OK != 0 && !self.features_acceptable() {
            wanted &= !status::FEATURES_OK;
        }
        if (self.status | wanted) & status::FEATURES_OK == 0 {
            wanted &= !status::DRIVER_OK;
        }
        // Drivers clear bits by a reset only, so bits can but be added.
        self.status |= wanted;
        if !was_live && self.is_live() {
            Effect::Start
        } else {
            Effect::None
        }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered == 0
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn write_queue(&mut self, offset: usize, len: usize, value: u64) -> Effect {
        let index = usize::from(self.queue_select);
        let live = self.is_live();
        let vector = self.vector(value as u16);
        let max = self.max_queue_size;
        let may_reset = self.driver_features & (1 << VIRTIO_F_RING_RESET) != 0;
        let Some(queue) = self.queues.get_mut(index) else {
            return Effect::None;
        };
        match (offset, len) {
            (26, 2) => {
                queue.vector = vector;
                return Effect::Vectors;
            }
            (58, 2) if value == 1 && may_reset && queue.enabled && !queue.resetting => {
                queue.resetting = true;
                if live {
                    return Effect::StopQueue(index);
                }
                self.queue_reset_done(index);
                return Effect::Vectors;
            }
            // Everything else is fixed once the queue is enabled.
            _ if queue.enabled => {}
            (24, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= max {
                    queue.size = size;
                }
            }
            (28, 2) if value == 1 => {
                queue.enabled = true;
                if live {
                    return Effect::StartQueue(index);
                }
            }
            (32 | 36, _) => put_half(&mut queue.descriptors, offset - 32, len, value),
            (40 | 44, _) => put_half(&mut queue.driver, offset - 40, len, value),
            (48 | 52, _) => put_half(&mut queue.device, offset - 48, len, value),
            _ => {}
        }
        Effect::None
    }
}

/// Writes a 64-bit register whole (at 0, 8 bytes) or by half (at 0 or 4).
fn put_half(register: &mut u64, at: usize, len: usize, value: u64) {
    match (at, len) {
        (0, 8) => *register = value,
        (0, 4) => *register = (*register & !0xffff_ffff) | value,
        (4, 4) => *register = (*register & 0xffff_ffff) | value << 32,
        _ => {}
    }
}

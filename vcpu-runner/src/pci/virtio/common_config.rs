//! The common configuration structure (virtio 1.2 section 4.1.4.3): its registers, and
//! what writing to them causes. Pure state: [`super::VirtioPci`] acts on each
//! [`ConfigEffect`].

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};

use super::request::QueueSetup;

/// No vector is assigned (VIRTIO_MSI_NO_VECTOR).
pub const NO_VECTOR: u16 = 0xffff;
/// Length of the structure in bytes.
pub const LENGTH: usize = 60;

// Offsets of the fields.
const DEVICE_FEATURE_SELECT: usize = 0;
const DEVICE_FEATURE: usize = 4;
const DRIVER_FEATURE_SELECT: usize = 8;
const DRIVER_FEATURE: usize = 12;
const CONFIG_VECTOR: usize = 16;
const NUM_QUEUES: usize = 18;
const STATUS: usize = 20;
const GENERATION: usize = 21;
const QUEUE_SELECT: usize = 22;
const QUEUE_SIZE: usize = 24;
const QUEUE_VECTOR: usize = 26;
const QUEUE_ENABLE: usize = 28;
const QUEUE_NOTIFY_OFF: usize = 30;
const QUEUE_DESC: usize = 32;
const QUEUE_DRIVER: usize = 40;
const QUEUE_DEVICE: usize = 48;
const QUEUE_NOTIFY_DATA: usize = 56;
const QUEUE_RESET: usize = 58;

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

/// What has to be done after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigEffect {
    /// Nothing.
    None,
    /// DRIVER_OK was set: start the enabled queues.
    Activate,
    /// Stop all queues, then call [`CommonConfig::reset`].
    Reset,
    /// The device was reset; no queue was running.
    WasReset,
    /// Start this queue of an activated device.
    StartQueue(QueueSetup),
    /// Stop this queue, then call [`CommonConfig::complete_queue_reset`].
    StopQueue(usize),
    /// The vector of a queue or of the configuration changed.
    VectorsChanged,
}

#[derive(Clone, Copy)]
struct QueueRegisters {
    size: u16,
    vector: u16,
    enabled: bool,
    resetting: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl QueueRegisters {
    fn after_reset(max_size: u16) -> Self {
        QueueRegisters {
            size: max_size,
            vector: NO_VECTOR,
            enabled: false,
            resetting: false,
            descriptors: 0,
            driver: 0,
            device: 0,
        }
    }

    fn setup(&self, index: usize) -> QueueSetup {
        QueueSetup {
            index,
            size: self.size,
            descriptors: self.descriptors,
            driver: self.driver,
            device: self.device,
        }
    }
}

/// The registers.
pub struct CommonConfig {
    /// The feature bits that the present driver is offered, and those after the next reset.
    offered: u64,
    next_offer: u64,
    max_queue_size: u16,
    vectors: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    status: u8,
    /// The driver wrote status 0, and the queues are being stopped.
    resetting: bool,
    generation: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

impl CommonConfig {
    /// The registers after reset; `vectors` is the size of the MSI-X table.
    pub fn new(offered: u64, queues: usize, max_queue_size: u16, vectors: u16) -> Self {
        CommonConfig {
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
            queues: vec![QueueRegisters::after_reset(max_queue_size); queues],
        }
    }

    /// Resets the device. The generation continues to count, so that no driver takes an
    /// old configuration for the current one.
    pub fn reset(&mut self) {
        *self = CommonConfig {
            generation: self.generation,
            ..CommonConfig::new(
                self.next_offer,
                self.queues.len(),
                self.max_queue_size,
                self.vectors,
            )
        };
    }

    /// Offers these feature bits to the next driver. The present one keeps what it has
    /// accepted.
    pub fn offer(&mut self, features: u64) {
        self.next_offer = features;
        if self.status == 0 {
            self.offered = features;
        }
    }

    /// The feature bits that are offered after the next reset.
    pub fn next_offer(&self) -> u64 {
        self.next_offer
    }

    /// The feature bits that the driver accepted, once it has set FEATURES_OK.
    pub fn accepted_features(&self) -> Option<u64> {
        (self.status & status::FEATURES_OK != 0).then_some(self.driver_features)
    }

    /// Whether the driver has set DRIVER_OK.
    pub fn is_activated(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    /// The feature bits that the driver wrote.
    pub fn driver_features(&self) -> u64 {
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

    /// The device-specific configuration changed.
    pub fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Sets DEVICE_NEEDS_RESET (section 2.1.2).
    pub fn set_needs_reset(&mut self) {
        self.status |= status::NEEDS_RESET;
    }

    /// The enabled queues as the driver set them up.
    pub fn enabled_queues(&self) -> Vec<QueueSetup> {
        self.queues
            .iter()
            .enumerate()
            .filter(|(_, queue)| queue.enabled && !queue.resetting)
            .map(|(index, queue)| queue.setup(index))
            .collect()
    }

    /// Queue `index` is stopped for its reset.
    pub fn complete_queue_reset(&mut self, index: usize) {
        if let Some(queue) = self.queues.get_mut(index) {
            *queue = QueueRegisters::after_reset(self.max_queue_size);
        }
    }

    fn selected_queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// Reads any part of the structure.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let half = |word: u64, select: u32| match select {
            0 => word as u32,
            1 => (word >> 32) as u32,
            _ => 0,
        };
        let device_feature = half(self.offered, self.device_feature_select);
        let driver_feature = half(self.driver_features, self.driver_feature_select);
        let num_queues = self.queues.len() as u16;
        let mut image = [0u8; LENGTH];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(
            DEVICE_FEATURE_SELECT,
            &self.device_feature_select.to_le_bytes(),
        );
        put(DEVICE_FEATURE, &device_feature.to_le_bytes());
        put(
            DRIVER_FEATURE_SELECT,
            &self.driver_feature_select.to_le_bytes(),
        );
        put(DRIVER_FEATURE, &driver_feature.to_le_bytes());
        put(CONFIG_VECTOR, &self.config_vector.to_le_bytes());
        put(NUM_QUEUES, &num_queues.to_le_bytes());
        put(STATUS, &[self.status]);
        put(GENERATION, &[self.generation]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.selected_queue() {
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_VECTOR, &queue.vector.to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(QUEUE_DESC, &queue.descriptors.to_le_bytes());
            put(QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(QUEUE_DEVICE, &queue.device.to_le_bytes());
            put(QUEUE_NOTIFY_DATA, &self.queue_select.to_le_bytes());
            put(QUEUE_RESET, &u16::from(queue.resetting).to_le_bytes());
        } else {
            // A queue that does not exist has size 0 and no vector.
            put(QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
        }
        for (at, byte) in (offset..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes one field, in a width that the specification allows drivers: the field's
    /// own, or half of a 64-bit field. Other writes are ignored.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> ConfigEffect {
        // A reset is in progress, and nothing counts before it is complete.
        if self.resetting {
            return ConfigEffect::None;
        }
        let mut wide = [0; 8];
        let Some(low) = wide.get_mut(..data.len()) else {
            return ConfigEffect::None;
        };
        low.copy_from_slice(data);
        let value = u64::from_le_bytes(wide);
        match (offset, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value as u32,
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value as u32,
            (DRIVER_FEATURE, 4) => self.write_driver_features(value as u32),
            (CONFIG_VECTOR, 2) => {
                self.config_vector = self.valid_vector(value as u16);
                return ConfigEffect::VectorsChanged;
            }
            (STATUS, 1) => return self.write_status(value as u8),
            (QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (QUEUE_SIZE..LENGTH, length) => return self.write_queue(offset, length, value),
            _ => {}
        }
        ConfigEffect::None
    }

    /// A vector that the table does not have reads back as no vector (section
    /// 4.1.5.1.2.1).
    fn valid_vector(&self, value: u16) -> u16 {
        if value < self.vectors {
            value
        } else {
            NO_VECTOR
        }
    }

    fn write_driver_features(&mut self, value: u32) {
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

    fn write_status(&mut self, value: u8) -> ConfigEffect {
        if value == 0 {
            // Queues can run only after DRIVER_OK.
            if self.is_activated() {
                self.resetting = true;
                return ConfigEffect::Reset;
            }
            self.reset();
            return ConfigEffect::WasReset;
        }
        let was_activated = self.is_activated();
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
        // Only a reset clears bits (section 2.1.1).
        self.status |= wanted;
        if !was_activated && self.is_activated() {
            ConfigEffect::Activate
        } else {
            ConfigEffect::None
        }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered == 0
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn write_queue(&mut self, offset: usize, length: usize, value: u64) -> ConfigEffect {
        let index = usize::from(self.queue_select);
        let activated = self.is_activated();
        let vector = self.valid_vector(value as u16);
        let max_size = self.max_queue_size;
        let may_reset = self.driver_features & (1 << VIRTIO_F_RING_RESET) != 0;
        let Some(queue) = self.queues.get_mut(index) else {
            return ConfigEffect::None;
        };
        match (offset, length) {
            (QUEUE_VECTOR, 2) => {
                queue.vector = vector;
                return ConfigEffect::VectorsChanged;
            }
            (QUEUE_RESET, 2) if value == 1 && may_reset && queue.enabled && !queue.resetting => {
                queue.resetting = true;
                if activated {
                    return ConfigEffect::StopQueue(index);
                }
                self.complete_queue_reset(index);
                return ConfigEffect::VectorsChanged;
            }
            // All other fields are fixed once the queue is enabled.
            _ if queue.enabled => {}
            (QUEUE_SIZE, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= max_size {
                    queue.size = size;
                }
            }
            (QUEUE_ENABLE, 2) if value == 1 => {
                queue.enabled = true;
                if activated {
                    return ConfigEffect::StartQueue(queue.setup(index));
                }
            }
            (QUEUE_DESC..QUEUE_DRIVER, _) => {
                write_wide(&mut queue.descriptors, offset - QUEUE_DESC, length, value);
            }
            (QUEUE_DRIVER..QUEUE_DEVICE, _) => {
                write_wide(&mut queue.driver, offset - QUEUE_DRIVER, length, value);
            }
            (QUEUE_DEVICE..QUEUE_NOTIFY_DATA, _) => {
                write_wide(&mut queue.device, offset - QUEUE_DEVICE, length, value);
            }
            _ => {}
        }
        ConfigEffect::None
    }
}

/// Writes a 64-bit register as a whole (8 bytes at offset 0) or by half (4 bytes at
/// offset 0 or 4).
fn write_wide(register: &mut u64, at: usize, length: usize, value: u64) {
    match (at, length) {
        (0, 8) => *register = value,
        (0, 4) => *register = (*register & !0xffff_ffff) | value,
        (4, 4) => *register = (*register & 0xffff_ffff) | value << 32,
        _ => {}
    }
}

//! From reset to DRIVER_OK, and the register side of queues for virtio-drivers.

use super::device::{Device, MOST_QUEUES, common};
use crate::{fail, seconds};
use alloc::format;
use alloc::string::String;
use core::mem::{align_of, size_of};
use virtio_drivers::transport::{
    DeviceStatus, DeviceType, InterruptStatus, Transport as Registers,
};
use virtio_drivers::{Error, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// Feature bits that every driver may accept (virtio 1.3, chapter 6).
pub mod feature {
    /// Descriptors in tables of their own.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications by index.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
}

/// In place of an MSI-X table entry: no interrupt.
const NO_VECTOR: u16 = 0xffff;

/// How the driver learns that the device is done with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// By MSI-X.
    Interrupt,
    /// By looking at the used ring; the device is told to send no interrupts.
    Polling,
}

/// A device between reset and reset: dropping it resets the device, after which the
/// device no longer touches memory.
pub struct Transport {
    device: Device,
    completion: Completion,
    features: u64,
    /// Addresses of the queues' doorbells.
    doorbells: [u64; MOST_QUEUES],
}

impl Transport {
    /// Resets `device` and negotiates features: those in `wanted` that it offers. The
    /// queues are next, then [`Transport::finish`].
    ///
    /// # Errors
    /// The device does not reset, is a legacy device, or refuses the features.
    pub fn start(device: Device, wanted: u64, completion: Completion) -> Result<Self, String> {
        device.reset(seconds())?;
        let mut transport = Self {
            device,
            completion,
            features: 0,
            doorbells: [0; MOST_QUEUES],
        };
        transport.add_status(ACKNOWLEDGE);
        transport.add_status(DRIVER);
        let mut wanted = wanted | feature::VERSION_1 | feature::RING_INDIRECT_DESC;
        if completion == Completion::Interrupt {
            wanted |= feature::RING_EVENT_IDX;
        }
        transport.features = transport.read_device_features() & wanted;
        let features = transport.features;
        let name = transport.device.name.clone();
        if features & feature::VERSION_1 == 0 {
            return Err(format!(
                "{name}: negotiate features: it does not offer VERSION_1"
            ));
        }
        transport.write_driver_features(features);
        transport.add_status(FEATURES_OK);
        if transport.device.status() & FEATURES_OK == 0 {
            return Err(format!(
                "{name}: negotiate features: it refuses {features:#x}"
            ));
        }
        transport.set_vector(common::CONFIG_MSIX_VECTOR, 0)?;
        Ok(transport)
    }

    /// Lets the device work, the queues being set up.
    pub fn finish(&mut self) {
        self.add_status(DRIVER_OK);
    }

    /// Whether all of `features` were negotiated.
    pub fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    /// How the driver waits.
    pub fn completion(&self) -> Completion {
        self.completion
    }

    /// The device below.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Reads a field of the configuration of the device's type.
    ///
    /// # Errors
    /// The device does not have it.
    pub fn config<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, String> {
        self.read_consistent(|| self.read_config_space(offset))
            .map_err(|error| {
                format!(
                    "{}: read configuration at {offset}: {error}",
                    self.device.name
                )
            })
    }

    fn add_status(&mut self, bit: u8) {
        let status = self.device.status() | bit;
        self.device.common.write(common::DEVICE_STATUS, status);
    }

    /// Writes an MSI-X table entry number to a register and checks that it was taken.
    fn set_vector(&self, register: u64, entry: u16) -> Result<(), String> {
        let entry = match self.completion {
            Completion::Interrupt => entry,
            Completion::Polling => NO_VECTOR,
        };
        self.device.common.write(register, entry);
        let taken: u16 = self.device.common.read(register);
        if taken != entry {
            return Err(format!(
                "{}: MSI-X entry {entry} was not taken: {taken:#x}",
                self.device.name
            ));
        }
        Ok(())
    }

    /// Assigns the queue's interrupt and finds its doorbell; before the queue is
    /// enabled.
    ///
    /// # Errors
    /// The device does not take the MSI-X entry, or has no such doorbell.
    pub fn prepare_queue(&mut self, queue: u16) -> Result<(), String> {
        let registers = self.device.common;
        registers.write(common::QUEUE_SELECT, queue);
        self.set_vector(common::QUEUE_MSIX_VECTOR, 1 + queue)?;
        let doorbell: u16 = registers.read(common::QUEUE_NOTIFY_OFF);
        let offset = u64::from(doorbell) * u64::from(self.device.notify_multiplier);
        match self.doorbells.get_mut(usize::from(queue)) {
            Some(address) if offset + 2 <= self.device.notify.length => {
                *address = self.device.notify.start + offset;
                Ok(())
            }
            _ => Err(format!(
                "{}: queue {queue}: no doorbell at {offset:#x}",
                self.device.name
            )),
        }
    }

    /// Whether `offset` is the place of a `T` within the configuration.
    fn check_config<T>(&self, offset: usize) -> Result<(), Error> {
        if self.device.config.length == 0 {
            return Err(Error::ConfigSpaceMissing);
        }
        if align_of::<T>() > 4 || !offset.is_multiple_of(align_of::<T>()) {
            return Err(Error::InvalidParam);
        }
        if (offset + size_of::<T>()) as u64 > self.device.config.length {
            return Err(Error::ConfigSpaceTooSmall);
        }
        Ok(())
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        // The queues' memory is free after this: with a device still at work on it,
        // nothing that follows could be trusted.
        if let Err(error) = self.device.reset(seconds()) {
            fail(&error);
        }
    }
}

impl Registers for Transport {
    fn device_type(&self) -> DeviceType {
        // Only devices that `device::role` names are opened.
        match self.device.kind {
            super::NET => DeviceType::Network,
            super::CONSOLE => DeviceType::Console,
            _ => DeviceType::Block,
        }
    }

    fn read_device_features(&mut self) -> u64 {
        let half = |select: u32| -> u64 {
            self.device
                .common
                .write(common::DEVICE_FEATURE_SELECT, select);
            self.device
                .common
                .read::<u32>(common::DEVICE_FEATURE)
                .into()
        };
        half(0) | half(1) << 32
    }

    fn write_driver_features(&mut self, features: u64) {
        for select in 0..2u32 {
            self.device
                .common
                .write(common::DRIVER_FEATURE_SELECT, select);
            self.device
                .common
                .write(common::DRIVER_FEATURE, (features >> (32 * select)) as u32);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.device.common.write(common::QUEUE_SELECT, queue);
        self.device.common.read::<u16>(common::QUEUE_SIZE).into()
    }

    fn notify(&mut self, queue: u16) {
        if let Some(doorbell) = self.doorbells.get(usize::from(queue)) {
            // SAFETY: found within the mapped doorbell area by `prepare_queue`.
            unsafe { (*doorbell as *mut u16).write_volatile(queue) }
        }
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.device.status().into())
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.device
            .common
            .write(common::DEVICE_STATUS, status.bits() as u8);
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        table: PhysAddr,
        driver: PhysAddr,
        device: PhysAddr,
    ) {
        let registers = self.device.common;
        registers.write(common::QUEUE_SELECT, queue);
        registers.write(common::QUEUE_SIZE, size as u16);
        let areas = [
            (common::QUEUE_DESC, table),
            (common::QUEUE_DRIVER, driver),
            (common::QUEUE_DEVICE, device),
        ];
        for (register, address) in areas {
            // 64-bit registers are written in halves (virtio 1.3, 4.1.3.1).
            registers.write(register, address as u32);
            registers.write(register + 4, (address >> 32) as u32);
        }
        registers.write(common::QUEUE_ENABLE, 1u16);
    }

    /// Nothing: only a reset takes a queue away, see `drop`.
    fn queue_unset(&mut self, _: u16) {}

    fn queue_used(&mut self, queue: u16) -> bool {
        self.device.common.write(common::QUEUE_SELECT, queue);
        self.device.common.read::<u16>(common::QUEUE_ENABLE) == 1
    }

    /// With MSI-X on there is nothing to acknowledge.
    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }

    fn read_config_generation(&self) -> u32 {
        self.device
            .common
            .read::<u8>(common::CONFIG_GENERATION)
            .into()
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        self.check_config::<T>(offset)?;
        let mut value = T::new_zeroed();
        let width = align_of::<T>();
        for (index, part) in value.as_mut_bytes().chunks_exact_mut(width).enumerate() {
            let at = (offset + index * width) as u64;
            match width {
                1 => part[0] = self.device.config.read(at),
                2 => part.copy_from_slice(&self.device.config.read::<u16>(at).to_ne_bytes()),
                _ => part.copy_from_slice(&self.device.config.read::<u32>(at).to_ne_bytes()),
            }
        }
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<(), Error> {
        self.check_config::<T>(offset)?;
        let width = align_of::<T>();
        for (index, part) in value.as_bytes().chunks_exact(width).enumerate() {
            let at = (offset + index * width) as u64;
            match *part {
                [a] => self.device.config.write(at, a),
                [a, b] => self.device.config.write(at, u16::from_ne_bytes([a, b])),
                [a, b, c, d] => self
                    .device
                    .config
                    .write(at, u32::from_ne_bytes([a, b, c, d])),
                _ => return Err(Error::InvalidParam),
            }
        }
        Ok(())
    }
}

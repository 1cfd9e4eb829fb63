//! A virtio function on the PCI bus: its register areas and its MSI-X table.

use super::{BLOCK, CONSOLE, NET};
use crate::irq::{self, Vector};
use crate::memory::pages::{self, Kind};
use crate::pci::{Access, Function};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const VENDOR: u16 = 0x1af4;
/// Modern devices have this plus their type as device identifier.
const MODERN: u16 = 0x1040;
/// Transitional devices have identifiers from 0x1000 up to here.
const TRANSITIONAL: core::ops::Range<u16> = 0x1000..0x1040;
const SUBSYSTEM: u16 = 0x2e;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
/// Types of vendor capabilities (virtio 1.3, 4.1.4).
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const CONFIG: u8 = 4;

const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;
const ENTRY_MASKED: u32 = 1;

/// Offsets in the common configuration (virtio 1.3, 4.1.4.3).
pub mod common {
    /// Which 32 feature bits `DEVICE_FEATURE` shows.
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    /// Offered features.
    pub const DEVICE_FEATURE: u64 = 0x04;
    /// Which 32 feature bits `DRIVER_FEATURE` sets.
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    /// Accepted features.
    pub const DRIVER_FEATURE: u64 = 0x0c;
    /// MSI-X table entry for configuration changes.
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    /// How many queues the device has.
    pub const NUM_QUEUES: u64 = 0x12;
    /// Device status, one byte.
    pub const DEVICE_STATUS: u64 = 0x14;
    /// Changes with the configuration, one byte.
    pub const CONFIG_GENERATION: u64 = 0x15;
    /// Which queue the registers below are about.
    pub const QUEUE_SELECT: u64 = 0x16;
    /// Entries; at most what it says after a reset.
    pub const QUEUE_SIZE: u64 = 0x18;
    /// MSI-X table entry for the queue.
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    /// 1: in use.
    pub const QUEUE_ENABLE: u64 = 0x1c;
    /// Where its doorbell is, in units of the multiplier.
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    /// Address of the descriptor table, 64 bits.
    pub const QUEUE_DESC: u64 = 0x20;
    /// Address of the available ring, 64 bits.
    pub const QUEUE_DRIVER: u64 = 0x28;
    /// Address of the used ring, 64 bits.
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// No driver uses more queues of a device.
pub const MOST_QUEUES: usize = 4;

/// A range of a BAR.
#[derive(Clone, Copy, Debug, Default)]
pub struct Area {
    /// Physical address.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

impl Area {
    /// Reads a register; `T` is an integer, `offset` a multiple of its size.
    pub fn read<T: Copy>(&self, offset: u64) -> T {
        // SAFETY: part of a BAR that `Device::open` mapped; registers are volatile.
        unsafe { ((self.start + offset) as *const T).read_volatile() }
    }

    /// Writes a register; as in [`Area::read`].
    pub fn write<T: Copy>(&self, offset: u64, value: T) {
        // SAFETY: as in `read`.
        unsafe { ((self.start + offset) as *mut T).write_volatile(value) }
    }
}

/// A virtio device, with memory decoding and MSI-X on.
#[derive(Clone, Debug)]
pub struct Device {
    /// For messages: what it is and its PCI device number.
    pub name: String,
    /// Device type, such as [`BLOCK`].
    pub kind: u16,
    /// Where it is on the bus.
    pub function: Function,
    /// Common configuration.
    pub common: Area,
    /// Configuration of its type; empty if it has none.
    pub config: Area,
    /// Doorbells.
    pub notify: Area,
    /// Bytes from one doorbell to the next.
    pub notify_multiplier: u32,
    /// Vectors for configuration changes, then for each queue; by MSI-X table entry.
    pub vectors: Vec<Vector>,
}

/// All modern virtio devices on bus 0 and their types.
pub fn find(access: Access) -> Vec<(u16, Function)> {
    let functions = access.functions();
    functions
        .into_iter()
        .filter_map(|function| Some((kind(function)?, function)))
        .collect()
}

/// The type of a virtio device; `None` for another device.
fn kind(function: Function) -> Option<u16> {
    match function.identity() {
        (VENDOR, id) if TRANSITIONAL.contains(&id) => Some(function.read16(SUBSYSTEM)),
        (VENDOR, id) if id > MODERN => Some(id - MODERN),
        _ => None,
    }
}

/// What a device type is called in messages, and how many queues the guest uses at least.
pub fn role(kind: u16) -> Option<(&'static str, usize)> {
    match kind {
        BLOCK => Some(("disk", 1)),
        NET => Some(("net", 2)),
        CONSOLE => Some(("console", 2)),
        _ => None,
    }
}

impl Device {
    /// Finds the registers of `function`, enables it, and gives each of its interrupts
    /// a vector.
    ///
    /// # Errors
    /// A capability, a BAR address or an MSI-X table entry is missing.
    pub fn open(kind: u16, function: Function) -> Result<Self, String> {
        let (role, queues) =
            role(kind).ok_or_else(|| format!("no driver for virtio type {kind}"))?;
        let name = format!("{role} 00:{:02x}", function.device());
        let mut device = Self {
            name,
            kind,
            function,
            common: Area::default(),
            config: Area::default(),
            notify: Area::default(),
            notify_multiplier: 0,
            vectors: Vec::new(),
        };
        let mut msix = None;
        for capability in function.capabilities() {
            let at = capability.offset;
            match (capability.id, function.read8(at + 3)) {
                (CAPABILITY_VENDOR, COMMON) => device.common = device.area(at)?,
                (CAPABILITY_VENDOR, CONFIG) => device.config = device.area(at)?,
                (CAPABILITY_VENDOR, NOTIFY) => {
                    device.notify = device.area(at)?;
                    device.notify_multiplier = function.read32(at + 16);
                }
                (CAPABILITY_MSIX, _) => msix = Some(at),
                _ => {}
            }
        }
        if device.common.length < 0x38 || device.notify.length == 0 {
            return Err(format!(
                "{}: common configuration or doorbells are missing",
                device.name
            ));
        }
        function.enable(true);
        let msix = msix.ok_or_else(|| format!("{}: has no MSI-X", device.name))?;
        let offered: u16 = device.common.read(common::NUM_QUEUES);
        let most = usize::from(offered).clamp(queues, MOST_QUEUES);
        device.set_up_msix(msix, 1 + queues, 1 + most)?;
        Ok(device)
    }

    /// How many queues have a vector.
    pub fn queues(&self) -> usize {
        self.vectors.len() - 1
    }

    /// The area that the virtio capability at `offset` describes, mapped.
    fn area(&self, offset: u16) -> Result<Area, String> {
        let bar = self.function.read8(offset + 4);
        let start = self.bar(bar)? + u64::from(self.function.read32(offset + 8));
        let length = u64::from(self.function.read32(offset + 12));
        pages::map(start..start + length, Kind::Device);
        Ok(Area { start, length })
    }

    fn bar(&self, index: u8) -> Result<u64, String> {
        self.function
            .bar(index)
            .map_err(|error| format!("{}: BAR {index}: {error}", self.name))
    }

    fn set_up_msix(&mut self, capability: u16, needed: usize, wanted: usize) -> Result<(), String> {
        let function = self.function;
        let control = function.read16(capability + 2);
        let entries = usize::from(control & 0x7ff) + 1;
        if entries < needed {
            return Err(format!(
                "{}: {needed} interrupts, but {entries} MSI-X entries",
                self.name
            ));
        }
        let place = function.read32(capability + 4);
        let table = Area {
            start: self.bar((place & 7) as u8)? + u64::from(place & !7),
            length: 16 * entries as u64,
        };
        pages::map(table.start..table.start + table.length, Kind::Device);
        function.write16(capability + 2, control | MSIX_ENABLE | MSIX_FUNCTION_MASK);
        for index in 0..wanted.min(entries) {
            let what = match index {
                0 => String::from("configuration"),
                _ => format!("queue {}", index - 1),
            };
            let vector = Vector::new(format!("{} {what}", self.name))?;
            let (address, data) = irq::message(vector);
            let entry = 16 * index as u64;
            table.write(entry + 12, ENTRY_MASKED);
            table.write(entry, address as u32);
            table.write(entry + 4, (address >> 32) as u32);
            table.write(entry + 8, data);
            table.write(entry + 12, 0u32);
            self.vectors.push(vector);
        }
        function.write16(
            capability + 2,
            (control | MSIX_ENABLE) & !MSIX_FUNCTION_MASK,
        );
        Ok(())
    }

    /// The vector for configuration changes.
    pub fn config_vector(&self) -> Vector {
        self.vectors[0]
    }

    /// The vector of a queue.
    pub fn queue_vector(&self, queue: u16) -> Vector {
        self.vectors[1 + usize::from(queue)]
    }

    /// Device status (virtio 1.3, 2.1).
    pub fn status(&self) -> u8 {
        self.common.read(common::DEVICE_STATUS)
    }

    /// Resets the device and waits until it says that it is done.
    ///
    /// # Errors
    /// The status is not 0 after `seconds`.
    pub fn reset(&self, seconds: u64) -> Result<(), String> {
        self.common.write(common::DEVICE_STATUS, 0u8);
        irq::wait_until(seconds, || (self.status() == 0).then_some(()))
            .map_err(|_| format!("{}: reset: status is still {:#x}", self.name, self.status()))
    }
}

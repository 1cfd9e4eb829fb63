//! The PCI configuration space of a virtio device: identity, BAR and capabilities
//! (virtio 1.2 sections 4.1.2 and 4.1.4).

use super::bar::{
    BAR_SIZE, COMMON, CONFIG_LENGTH, DEVICE, ISR, MSIX_PENDING, MSIX_TABLE, NOTIFY,
    NOTIFY_MULTIPLIER,
};
use super::common_config;
use crate::layout;
use crate::pci::bus;
use crate::pci::config::{PciConfigSpace, PciIdentity, command, register};
use crate::pci::intx::Intx;
use crate::pci::msix;

/// Vendor ID of virtio devices (section 4.1.2).
const VENDOR: u16 = 0x1af4;
/// Device ID of a modern device, without its virtio device number.
const DEVICE_BASE: u16 = 0x1040;
/// Unassigned class: the runner does not know what the device is.
const CLASS: u32 = 0xff_00_00;
/// The least revision of a modern device.
const REVISION: u8 = 1;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;

/// Values of `cfg_type` in `struct virtio_pci_cap` (section 4.1.4).
const CFG_TYPE_COMMON: u8 = 1;
const CFG_TYPE_NOTIFY: u8 = 2;
const CFG_TYPE_ISR: u8 = 3;
const CFG_TYPE_DEVICE: u8 = 4;
const CFG_TYPE_PCI: u8 = 5;

/// Length of `struct virtio_pci_cap`, and offsets in it.
const CAP_LENGTH: u8 = 16;
const CAP_BAR: usize = 4;
const CAP_OFFSET: usize = 8;
const CAP_BAR_LENGTH: usize = 12;
/// Offset of `pci_cfg_data` in `struct virtio_pci_cfg_cap` (section 4.1.4.9).
const CAP_CFG_DATA: usize = 16;

/// Message control in the MSI-X capability.
const MSIX_CONTROL: usize = 2;

/// The configuration space, and where the MSI-X capability and the PCI configuration
/// access capability are in it.
pub(super) struct VirtioConfigSpace {
    pub space: PciConfigSpace,
    msix_capability: usize,
    access_capability: usize,
}

impl VirtioConfigSpace {
    /// The space after reset of device number `index` of type `virtio_id`.
    pub fn new(virtio_id: u16, queues: usize, index: usize) -> Self {
        let device = DEVICE_BASE + virtio_id;
        let identity = PciIdentity {
            vendor: VENDOR,
            device,
            revision: REVISION,
            class: CLASS,
            subsystem_vendor: VENDOR,
            subsystem: device,
        };
        let mut space = PciConfigSpace::new(&identity, false);
        let address = layout::PCI_WINDOW as u32 + index as u32 * BAR_SIZE;
        space.set_bar0(address, BAR_SIZE);
        let writable = command::MEMORY | command::BUS_MASTER | command::INTX_DISABLE;
        space.set_writable(register::COMMAND, &writable.to_le_bytes());
        space.set_writable(register::INTERRUPT_LINE, &[0xff]);
        let line = Intx::line(bus::slot(index)) as u8;
        space.set(register::INTERRUPT_LINE, &[line]);
        space.set(register::INTERRUPT_PIN, &[1]);

        // Message control (table size less one), table and PBA, both in BAR 0.
        let vectors = queues + 1;
        let mut body = (vectors as u16 - 1).to_le_bytes().to_vec();
        body.extend((MSIX_TABLE as u32).to_le_bytes());
        body.extend((MSIX_PENDING as u32).to_le_bytes());
        let msix_capability = space.add_capability(CAPABILITY_MSIX, &body);
        space.set_writable(
            msix_capability + MSIX_CONTROL,
            &msix::WRITABLE_CONTROL.to_le_bytes(),
        );

        // `extra` follows struct virtio_pci_cap in some types.
        let mut add = |cfg_type: u8, offset: u64, length: usize, extra: &[u8]| {
            let mut body = vec![CAP_LENGTH + extra.len() as u8, cfg_type, 0, 0, 0, 0];
            body.extend((offset as u32).to_le_bytes());
            body.extend((length as u32).to_le_bytes());
            body.extend(extra);
            space.add_capability(CAPABILITY_VENDOR, &body)
        };
        let doorbells_length = queues * NOTIFY_MULTIPLIER as usize;
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        add(CFG_TYPE_COMMON, COMMON, common_config::LENGTH, &[]);
        add(CFG_TYPE_NOTIFY, NOTIFY, doorbells_length, &multiplier);
        add(CFG_TYPE_ISR, ISR, 1, &[]);
        add(CFG_TYPE_DEVICE, DEVICE, CONFIG_LENGTH, &[]);
        let access_capability = add(CFG_TYPE_PCI, 0, 0, &[0; 4]);
        // BAR, then offset, length and data.
        space.set_writable(access_capability + CAP_BAR, &[0xff]);
        space.set_writable(access_capability + CAP_OFFSET, &[0xff; 12]);
        VirtioConfigSpace {
            space,
            msix_capability,
            access_capability,
        }
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.space.word(register::COMMAND)
    }

    /// Where the BAR is, while memory decoding is on.
    pub fn bar_address(&self) -> Option<u64> {
        let enabled = self.command() & command::MEMORY != 0;
        enabled.then_some(self.space.long(register::BAR0).into())
    }

    /// Message control of MSI-X.
    pub fn msix_control(&self) -> u16 {
        self.space.word(self.msix_capability + MSIX_CONTROL)
    }

    /// Offset of the data field of the PCI configuration access capability.
    pub fn access_data(&self) -> usize {
        self.access_capability + CAP_CFG_DATA
    }

    /// Whether an access to the configuration space touches that field.
    pub fn touches_access_data(&self, offset: usize, length: usize) -> bool {
        let data = self.access_data();
        offset < data + 4 && data < offset + length
    }

    /// Offset and length of the BAR access that the PCI configuration access capability
    /// describes; `None` if it is not a valid one.
    pub fn described_access(&self) -> Option<(u64, usize)> {
        let mut bar = [0];
        self.space.read(self.access_capability + CAP_BAR, &mut bar);
        let offset = self.space.long(self.access_capability + CAP_OFFSET);
        let length = self.space.long(self.access_capability + CAP_BAR_LENGTH);
        (bar == [0]
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length)
            && offset < BAR_SIZE)
            .then_some((offset.into(), length as usize))
    }
}

//! PCI bus 0: finds the function for an access, through ECAM or through the pair of
//! ports of configuration mechanism 1 (PCI Local Bus 3.0 section 3.2.2.3).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::layout;
use crate::pci::PciFunction;
use crate::pci::config::{PciConfigSpace, PciIdentity};

/// Largest number of devices, without the host bridge.
pub const MAX_DEVICES: usize = 32;
/// The enable bit of the address port.
const ENABLE: u32 = 1 << 31;
const FUNCTIONS: usize = 256;

/// The bus.
pub struct PciBus {
    functions: [Option<Arc<dyn PciFunction>>; FUNCTIONS],
    address: AtomicU32,
}

/// Device and function number (PCI slot * 8 + function) of device `index`. The devices
/// get slots 1 to 31; the last one is function 1 of the host bridge's slot.
pub fn devfn(index: usize) -> u8 {
    if index < 31 {
        (index as u8 + 1) << 3
    } else {
        1
    }
}

/// PCI slot of device `index`.
pub fn slot(index: usize) -> u8 {
    devfn(index) >> 3
}

impl PciBus {
    /// A bus with a host bridge and with `devices`, of which there are no more than
    /// [`MAX_DEVICES`], at [`devfn`] of their index.
    pub fn new(devices: impl IntoIterator<Item = Arc<dyn PciFunction>>) -> Self {
        let mut functions = [const { None }; FUNCTIONS];
        let mut count = 0;
        for (index, device) in devices.into_iter().take(MAX_DEVICES).enumerate() {
            functions[usize::from(devfn(index))] = Some(device);
            count = index + 1;
        }
        functions[0] = Some(Arc::new(HostBridge::new(count == MAX_DEVICES)));
        PciBus {
            functions,
            address: AtomicU32::new(0),
        }
    }

    /// Resets the bus and all functions.
    pub fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
        for function in self.functions.iter().flatten() {
            function.reset();
        }
    }

    fn read_config(&self, devfn: usize, offset: usize, data: &mut [u8]) {
        match self.functions.get(devfn) {
            Some(Some(function)) => function.read_config(offset, data),
            // No device drives the bus, so all bits read as 1.
            _ => data.fill(0xff),
        }
    }

    fn write_config(&self, devfn: usize, offset: usize, data: &[u8]) {
        if let Some(Some(function)) = self.functions.get(devfn) {
            function.write_config(offset, data);
        }
    }

    /// Reads a port; false when it is not one of the bus.
    pub fn read_port(&self, port: u16, data: &mut [u8]) -> bool {
        match config_port(port, data.len()) {
            Some(ConfigPort::Address) => {
                data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
            }
            Some(ConfigPort::Data(byte)) => match self.selected(byte) {
                Some((devfn, offset)) => self.read_config(devfn, offset, data),
                None => data.fill(0xff),
            },
            None => return false,
        }
        true
    }

    /// Writes a port; false when it is not one of the bus.
    pub fn write_port(&self, port: u16, data: &[u8]) -> bool {
        match config_port(port, data.len()) {
            Some(ConfigPort::Address) => {
                let address = u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
                self.address.store(address, Ordering::Relaxed);
            }
            Some(ConfigPort::Data(byte)) => {
                if let Some((devfn, offset)) = self.selected(byte) {
                    self.write_config(devfn, offset, data);
                }
            }
            None => return false,
        }
        true
    }

    /// The function and offset that the address port selects.
    fn selected(&self, byte: usize) -> Option<(usize, usize)> {
        let address = self.address.load(Ordering::Relaxed);
        let bus = address >> 16 & 0xff;
        (address & ENABLE != 0 && bus == 0).then_some((
            (address >> 8 & 0xff) as usize,
            (address & 0xfc) as usize + byte,
        ))
    }

    /// Reads memory; false when the address belongs to no function and not to the ECAM.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) -> bool {
        if let Some((devfn, offset)) = ecam(address) {
            self.read_config(devfn, offset, data);
            return true;
        }
        match self.decode(address, data.len()) {
            Some((function, offset)) => {
                function.read_bar(offset, data);
                true
            }
            None => false,
        }
    }

    /// Writes memory; false when the address belongs to no function and not to the ECAM.
    pub fn write_memory(&self, address: u64, data: &[u8]) -> bool {
        if let Some((devfn, offset)) = ecam(address) {
            self.write_config(devfn, offset, data);
            return true;
        }
        match self.decode(address, data.len()) {
            Some((function, offset)) => {
                function.write_bar(offset, data);
                true
            }
            None => false,
        }
    }

    fn decode(&self, address: u64, len: usize) -> Option<(&dyn PciFunction, u64)> {
        self.functions.iter().flatten().find_map(|function| {
            let bar = function.bar()?;
            let fits = bar.contains(&address) && len as u64 <= bar.end - address;
            fits.then(|| (&**function, address - bar.start))
        })
    }
}

enum ConfigPort {
    Address,
    /// A data port and which of its four bytes comes first.
    Data(usize),
}

/// The address port takes 32-bit accesses only. Narrower ones at its port numbers are for
/// other devices (0xcf9 is the reset control register).
fn config_port(port: u16, len: usize) -> Option<ConfigPort> {
    if port == layout::PCI_CONFIG_ADDRESS && len == 4 {
        return Some(ConfigPort::Address);
    }
    let byte = usize::from(port.checked_sub(layout::PCI_CONFIG_DATA)?);
    (byte + len <= 4).then_some(ConfigPort::Data(byte))
}

fn ecam(address: u64) -> Option<(usize, usize)> {
    let offset = address
        .checked_sub(layout::ECAM)
        .filter(|&offset| offset < layout::ECAM_SIZE)?;
    Some(((offset >> 12) as usize, (offset & 0xfff) as usize))
}

/// The host bridge. Guests read its identity only.
struct HostBridge(PciConfigSpace);

impl HostBridge {
    fn new(multi_function: bool) -> Self {
        // Red Hat's "QEMU PCIe Host bridge".
        HostBridge(PciConfigSpace::new(
            &PciIdentity {
                vendor: 0x1b36,
                device: 0x0008,
                revision: 0,
                class: 0x06_00_00,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            },
            multi_function,
        ))
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write_config(&self, _offset: usize, _data: &[u8]) {}
    fn bar(&self) -> Option<std::ops::Range<u64>> {
        None
    }
    fn read_bar(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_bar(&self, _offset: u64, _data: &[u8]) {}
    fn reset(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bridge_is_found_by_ecam_and_ports_and_empty_slots_read_as_ones() {
        let bus = PciBus::new([]);
        let mut id = [0; 4];
        assert!(bus.read_memory(layout::ECAM, &mut id));
        assert_eq!(id, [0x36, 0x1b, 0x08, 0x00]);
        assert!(bus.write_port(0xcf8, &0x8000_0000_u32.to_le_bytes()));
        let mut word = [0; 2];
        assert!(bus.read_port(0xcfe, &mut word));
        assert_eq!(word, [0x08, 0x00]);
        assert!(bus.read_memory(layout::ECAM + (1 << 15), &mut id));
        assert_eq!(id, [0xff; 4]);
        // Another bus, and mechanism 1 switched off.
        for address in [0x8001_0000_u32, 0] {
            bus.write_port(0xcf8, &address.to_le_bytes());
            assert!(bus.read_port(0xcfc, &mut id));
            assert_eq!(id, [0xff; 4]);
        }
    }

    #[test]
    fn other_ports_do_not_belong_to_the_bus() {
        let bus = PciBus::new([]);
        assert!(!bus.write_port(0xcf9, &[6]));
        assert!(!bus.read_port(0xcf8, &mut [0]));
        assert!(!bus.read_port(0x3f8, &mut [0]));
        assert!(!bus.read_port(0xcfe, &mut [0; 4]));
    }

    #[test]
    fn device_numbers_are_distinct() {
        let mut all: Vec<u8> = (0..MAX_DEVICES).map(devfn).collect();
        all.push(0);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), MAX_DEVICES + 1);
    }
}

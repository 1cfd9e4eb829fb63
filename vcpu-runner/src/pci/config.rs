//! PCI configuration space: 256 bytes of registers, of which the guest can write some
//! bits (PCI Local Bus 3.0 section 6.1).

/// Size in bytes. The rest of the 4 KiB that a function has in the ECAM reads as zeros.
pub const SIZE: usize = 256;

/// Offsets of the registers in the header of type 0.
pub mod register {
    #![allow(missing_docs, reason = "the names of the specification")]
    pub const VENDOR: usize = 0x00;
    pub const DEVICE: usize = 0x02;
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const REVISION: usize = 0x08;
    /// Class, three bytes: interface, subclass, base class.
    pub const CLASS: usize = 0x09;
    pub const HEADER_TYPE: usize = 0x0e;
    pub const BAR0: usize = 0x10;
    pub const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub const SUBSYSTEM: usize = 0x2e;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3c;
    pub const INTERRUPT_PIN: usize = 0x3d;
}

/// Bits of the command register.
pub mod command {
    /// Memory space: the BAR is decoded.
    pub const MEMORY: u16 = 1 << 1;
    /// Bus master.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Interrupt disable: INTx is not asserted.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// Interrupt status, in the status register.
pub const STATUS_INTERRUPT: u16 = 1 << 3;
/// Capabilities list, in the status register.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Offset of the first capability.
const FIRST_CAPABILITY: usize = 0x40;

/// The registers that identify a function.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the names of the registers")]
pub struct PciIdentity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class, subclass and interface, as 0xBBSSII.
    pub class: u32,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// The registers, and which of their bits the guest can write.
#[derive(Clone)]
pub struct PciConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    next_capability: usize,
    last_pointer: usize,
}

impl PciConfigSpace {
    /// A space with a header of type 0.
    pub fn new(identity: &PciIdentity, multi_function: bool) -> Self {
        let mut space = PciConfigSpace {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            next_capability: FIRST_CAPABILITY,
            last_pointer: register::CAPABILITIES,
        };
        space.set(register::VENDOR, &identity.vendor.to_le_bytes());
        space.set(register::DEVICE, &identity.device.to_le_bytes());
        space.set(register::REVISION, &[identity.revision]);
        space.set(register::CLASS, &identity.class.to_le_bytes()[..3]);
        space.set(register::HEADER_TYPE, &[u8::from(multi_function) << 7]);
        space.set(
            register::SUBSYSTEM_VENDOR,
            &identity.subsystem_vendor.to_le_bytes(),
        );
        space.set(register::SUBSYSTEM, &identity.subsystem.to_le_bytes());
        space
    }

    /// Sets bytes, whether the guest can write them or not.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Makes the bits of `mask` writable, from `offset` on.
    pub fn set_writable(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Makes BAR 0 a 32-bit memory BAR of `size` bytes, a power of two, at `address`. The
    /// guest finds the size by the bits that it cannot write.
    pub fn set_bar0(&mut self, address: u32, size: u32) {
        self.set(register::BAR0, &address.to_le_bytes());
        self.set_writable(register::BAR0, &(!(size - 1)).to_le_bytes());
    }

    /// Appends a capability and returns its offset. `body` follows the two bytes ID and
    /// next pointer.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next_capability;
        self.set(self.last_pointer, &[at as u8]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        let status = self.word(register::STATUS) | STATUS_CAPABILITIES;
        self.set(register::STATUS, &status.to_le_bytes());
        self.last_pointer = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// A 16-bit register.
    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// A 32-bit register.
    pub fn long(&self, offset: usize) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    /// Reads as the guest does; bytes beyond the end are 0.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes as the guest does: only writable bits change.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, &byte) in (offset..).zip(data) {
            if at < SIZE {
                let mask = self.writable[at];
                self.bytes[at] = (self.bytes[at] & !mask) | (byte & mask);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> PciConfigSpace {
        let identity = PciIdentity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0xff_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        PciConfigSpace::new(&identity, false)
    }

    #[test]
    fn a_bar_shows_its_size_and_keeps_its_address() {
        let mut space = space();
        space.set_bar0(0xc001_0000, 0x1_0000);
        assert_eq!(space.long(register::BAR0), 0xc001_0000);
        space.write(register::BAR0, &[0xff; 4]);
        assert_eq!(space.long(register::BAR0), 0xffff_0000);
        space.write(register::BAR0, &0xd234_5678_u32.to_le_bytes());
        assert_eq!(space.long(register::BAR0), 0xd234_0000);
    }

    #[test]
    fn the_identity_is_read_only_and_capabilities_are_linked() {
        let mut space = space();
        space.write(0, &[0; 4]);
        assert_eq!(space.word(register::VENDOR), 0x1af4);
        let first = space.add_capability(0x09, &[1, 2, 3]);
        let second = space.add_capability(0x11, &[0; 10]);
        let mut list = [0; 2];
        space.read(register::CAPABILITIES, &mut list[..1]);
        assert_eq!(usize::from(list[0]), first);
        space.read(first, &mut list);
        assert_eq!(list, [0x09, second as u8]);
        space.read(second, &mut list);
        assert_eq!(list, [0x11, 0]);
        assert_eq!(second % 4, 0);
    }
}

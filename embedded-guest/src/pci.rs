//! Bus 0: configuration space by memory (ECAM) or by ports, functions, capabilities.

use crate::port;
use alloc::vec::Vec;
use logic::acpi::Ecam;

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;

/// Offsets in configuration space (PCI 3.0, 6.1).
const COMMAND: u16 = 0x04;
const HEADER_TYPE: u16 = 0x0e;
const BAR0: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;

/// Bits of the command register.
const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
/// In the status register.
const HAS_CAPABILITIES: u16 = 1 << 4;
const MULTI_FUNCTION: u8 = 0x80;
/// At most so many capabilities fit into the space.
const MOST_CAPABILITIES: usize = 48;

/// How configuration space is reached.
#[derive(Clone, Copy, Debug)]
pub enum Access {
    /// 4 KiB a function from this address on.
    Memory(u64),
    /// Address and data port.
    Ports,
}

impl Access {
    /// By memory if there is an ECAM.
    pub fn new(ecam: Option<Ecam>) -> Self {
        ecam.map_or(Self::Ports, |ecam| Self::Memory(ecam.base))
    }

    /// All functions on bus 0.
    pub fn functions(self) -> Vec<Function> {
        let mut found = Vec::new();
        for device in 0..32 {
            let first = Function {
                access: self,
                number: device << 3,
            };
            if !first.exists() {
                continue;
            }
            found.push(first);
            if first.read8(HEADER_TYPE) & MULTI_FUNCTION != 0 {
                let others = (1..8).map(|number| Function {
                    number: device << 3 | number,
                    ..first
                });
                found.extend(others.filter(|function| function.exists()));
            }
        }
        found
    }
}

/// A function on bus 0.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    access: Access,
    /// Device number × 8 + function number.
    number: u8,
}

/// A capability: its identifier and its offset in configuration space.
pub struct Capability {
    /// PCI's number for its kind.
    pub id: u8,
    /// Where it is.
    pub offset: u16,
}

impl Function {
    fn exists(self) -> bool {
        self.read16(0) != 0xffff
    }

    /// Device number on the bus.
    pub fn device(self) -> u8 {
        self.number >> 3
    }

    /// Vendor and device identifier.
    pub fn identity(self) -> (u16, u16) {
        let both = self.read32(0);
        (both as u16, (both >> 16) as u16)
    }

    /// Reads the 32 bits at a multiple of 4.
    pub fn read32(self, offset: u16) -> u32 {
        match self.access {
            Access::Memory(base) => {
                let address = base + (u64::from(self.number) << 12) + u64::from(offset & 0xffc);
                // SAFETY: the ECAM of bus 0, which holds every number and offset.
                unsafe { (address as *const u32).read_volatile() }
            }
            Access::Ports => {
                self.select(offset);
                port::read32(CONFIG_DATA)
            }
        }
    }

    /// Reads the 16 bits at a multiple of 2.
    pub fn read16(self, offset: u16) -> u16 {
        (self.read32(offset) >> (8 * (offset & 2))) as u16
    }

    /// Reads the byte at an offset.
    pub fn read8(self, offset: u16) -> u8 {
        (self.read32(offset) >> (8 * (offset & 3))) as u8
    }

    /// Writes the 16 bits at a multiple of 2.
    pub fn write16(self, offset: u16, value: u16) {
        match self.access {
            Access::Memory(base) => {
                let address = base + (u64::from(self.number) << 12) + u64::from(offset & 0xffe);
                // SAFETY: as in `read32`.
                unsafe { (address as *mut u16).write_volatile(value) }
            }
            Access::Ports => {
                self.select(offset);
                port::write16(CONFIG_DATA + (offset & 2), value);
            }
        }
    }

    fn select(self, offset: u16) {
        port::write32(
            CONFIG_ADDRESS,
            1 << 31 | u32::from(self.number) << 8 | u32::from(offset & 0xfc),
        );
    }

    /// Lets it answer to memory accesses and write to memory itself, or not.
    pub fn enable(self, on: bool) {
        let command = self.read16(COMMAND) & !(MEMORY_SPACE | BUS_MASTER);
        self.write16(
            COMMAND,
            if on {
                command | MEMORY_SPACE | BUS_MASTER
            } else {
                command
            },
        );
    }

    /// The address that the loader or firmware gave to a memory BAR.
    ///
    /// # Errors
    /// It is an I/O BAR, or has no address.
    pub fn bar(self, index: u8) -> Result<u64, &'static str> {
        let low = match index {
            0..6 => self.read32(BAR0 + 4 * u16::from(index)),
            _ => return Err("there is no BAR of that number"),
        };
        let high = match low & 7 {
            0 => 0,
            4 if index < 5 => self.read32(BAR0 + 4 * u16::from(index) + 4),
            _ => return Err("the BAR is not a memory BAR"),
        };
        match u64::from(low & !15) | u64::from(high) << 32 {
            0 => Err("the BAR has no address"),
            address => Ok(address),
        }
    }

    /// All capabilities.
    pub fn capabilities(self) -> Vec<Capability> {
        let mut found = Vec::new();
        if self.read16(COMMAND + 2) & HAS_CAPABILITIES == 0 {
            return found;
        }
        let mut offset = u16::from(self.read8(CAPABILITIES) & 0xfc);
        while offset != 0 && found.len() < MOST_CAPABILITIES {
            let head = self.read32(offset);
            found.push(Capability {
                id: head as u8,
                offset,
            });
            offset = (head >> 8) as u16 & 0xfc;
        }
        found
    }
}

//! Power: the ACPI PM1a register blocks at 0x600 and 0x604 (ACPI 6.5 section
//! 4.8.3) and the reset control register at 0xcf9.
//!
//! There is no power button, so no status bit is ever set and the SCI is not raised.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::PlatformEvent;

/// The first port of the PM1a block: status, enable and control, two bytes each.
pub const PM1_PORT: u16 = 0x600;
/// Number of ports of the block.
pub const PM1_SIZE: u16 = 6;
/// Reset control register, as in Intel's south bridges.
pub const RESET_PORT: u16 = 0xcf9;

const STATUS: usize = 0;
const ENABLE: usize = 2;
const CONTROL_LOW: usize = 4;
const CONTROL_HIGH: usize = 5;

/// SCI_EN: ACPI is always on.
const SCI_ENABLED: u8 = 1 << 0;
/// SLP_TYP, in the high byte of the control register.
const SLEEP_TYPE: u8 = 0b111 << 2;
/// SLP_EN, in the same byte.
const SLEEP: u8 = 1 << 5;
/// SLP_TYP of S5, as in the DSDT.
const SOFT_OFF: u8 = 0;

const RESET: u8 = 1 << 2;
/// Bits that read back: the kind of reset.
const RESET_KIND: u8 = 1 << 1 | 1 << 3;

/// Registers of the power block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Power {
    pm1: [u8; PM1_SIZE as usize],
    reset_control: u8,
    reserved: u8,
}

impl Power {
    /// State at power-on.
    pub fn power_on() -> Self {
        Power {
            pm1: [0, 0, 0, 0, SCI_ENABLED, 0],
            reset_control: 0,
            reserved: 0,
        }
    }

    /// Reads the byte at `offset` of the PM1a block.
    pub fn read_pm1(&self, offset: u16) -> u8 {
        self.pm1.get(usize::from(offset)).copied().unwrap_or(0)
    }

    /// Writes the byte at `offset` of the PM1a block.
    pub fn write_pm1(&mut self, offset: u16, value: u8) -> Option<PlatformEvent> {
        let offset = usize::from(offset);
        match offset {
            // Writing 1 clears.
            STATUS..ENABLE => self.pm1[offset] &= !value,
            ENABLE..CONTROL_LOW => self.pm1[offset] = value,
            // The other bits have no effect without bus masters and firmware.
            CONTROL_LOW => {}
            CONTROL_HIGH => {
                self.pm1[offset] = value & SLEEP_TYPE;
                if value & SLEEP != 0 {
                    if value & SLEEP_TYPE == SOFT_OFF {
                        return Some(PlatformEvent::PowerOff);
                    }
                    tracing::debug!("the guest asked for a sleep state that does not exist");
                }
            }
            _ => {}
        }
        None
    }

    /// Reads the reset control register.
    pub fn read_reset(&self) -> u8 {
        self.reset_control
    }

    /// Writes the reset control register.
    pub fn write_reset(&mut self, value: u8) -> Option<PlatformEvent> {
        self.reset_control = value & RESET_KIND;
        (value & RESET != 0).then_some(PlatformEvent::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sleep_enable_with_the_type_of_s5_powers_off() {
        let mut power = Power::power_on();
        assert_eq!(power.write_pm1(4, 0x00), None);
        assert_eq!(power.read_pm1(4), SCI_ENABLED);
        assert_eq!(power.write_pm1(5, 0x1c), None);
        assert_eq!(power.read_pm1(5), 0x1c);
        assert_eq!(power.write_pm1(5, 0x24), None);
        assert_eq!(power.write_pm1(5, 0x20), Some(PlatformEvent::PowerOff));
        assert_eq!(power.read_pm1(5), 0);
    }

    #[test]
    fn status_is_cleared_by_ones_and_enable_is_kept() {
        let mut power = Power::power_on();
        power.pm1[1] = 0x01;
        power.write_pm1(1, 0x80);
        assert_eq!(power.read_pm1(1), 0x01);
        power.write_pm1(1, 0x01);
        assert_eq!(power.read_pm1(1), 0x00);
        power.write_pm1(3, 0x01);
        assert_eq!(power.read_pm1(3), 0x01);
        assert_eq!(power.read_pm1(6), 0);
        assert_eq!(power.write_pm1(6, 0xff), None);
    }

    #[test]
    fn reset_needs_its_bit() {
        let mut power = Power::power_on();
        assert_eq!(power.write_reset(0x02), None);
        assert_eq!(power.read_reset(), 0x02);
        assert_eq!(power.write_reset(0x06), Some(PlatformEvent::Reset));
    }
}

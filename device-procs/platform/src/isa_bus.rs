//! The ISA bus: maps ports to devices.
//!
//! An access of several bytes is carried out as on a real ISA bus, byte by byte from the
//! lowest port, so registers can be accessed in any size. A port without a device reads as
//! ones, and a write to it has no effect.

use std::time::SystemTime;

use outrigger_protocol::trap::{Access, Space};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::devices::i8042::{self, I8042};
use crate::devices::power::{self, Power};
use crate::devices::rtc::{self, Rtc};
use crate::devices::uart::{self, Uart};
use crate::devices::{PlatformEvent, uart::UartEffect};

/// Debug consoles: of Bochs and QEMU, of OVMF, and of flat test images.
const DEBUG_PORTS: [u16; 3] = [0xe9, 0x402, 0xf1];
/// Value by which a program recognises a debug console.
const DEBUG_PRESENT: u8 = 0xe9;
/// Ends the machine with the exit code that is written to it.
const EXIT_PORT: u16 = 0xf4;

/// The registers of all devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IsaBus {
    pub uart: Uart,
    rtc: Rtc,
    i8042: I8042,
    power: Power,
}

/// Effects of an access outside the registers. The ports are far enough apart that one
/// access causes each effect once at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AccessOutcome {
    /// The value of a read.
    pub value: u64,
    /// A byte that the serial port sends.
    pub serial: Option<u8>,
    /// A byte for the debug console.
    pub debug: Option<u8>,
    /// The serial port raises its interrupt line.
    pub interrupt: bool,
    /// A request to the runner.
    pub event: Option<PlatformEvent>,
}

impl IsaBus {
    /// State at power-on.
    pub fn power_on() -> Self {
        IsaBus {
            uart: Uart::power_on(),
            rtc: Rtc::power_on(),
            i8042: I8042::power_on(),
            power: Power::power_on(),
        }
    }

    /// Resets all devices except what the battery keeps.
    pub fn reset(&mut self) {
        let mut rtc = self.rtc;
        rtc.reset();
        *self = IsaBus {
            rtc,
            ..IsaBus::power_on()
        };
    }

    /// Carries out `access`.
    pub fn access(&mut self, access: &Access) -> AccessOutcome {
        let mut outcome = AccessOutcome::default();
        let mut value = [0; 8];
        // The runner sends no more than 8 bytes.
        for (at, byte) in value.iter_mut().enumerate().take(access.size.into()) {
            let port = match access.space {
                Space::Port => access.address.checked_add(at as u64),
                Space::Memory => None,
            };
            let port = port.and_then(|port| u16::try_from(port).ok());
            match (port, access.write) {
                (Some(port), Some(data)) => self.write(port, data.to_le_bytes()[at], &mut outcome),
                (Some(port), None) => *byte = self.read(port, &mut outcome),
                (None, Some(_)) => {}
                (None, None) => *byte = !0,
            }
        }
        outcome.value = u64::from_le_bytes(value);
        outcome
    }

    fn read(&mut self, port: u16, outcome: &mut AccessOutcome) -> u8 {
        if let Some(offset) = offset(port, uart::PORT, 8) {
            let effect = self.uart.read(offset as u8);
            outcome.add_uart(effect);
            effect.value
        } else if let Some(offset) = offset(port, power::PM1_PORT, power::PM1_SIZE) {
            self.power.read_pm1(offset)
        } else {
            match port {
                rtc::DATA_PORT => self.rtc.read(SystemTime::now()),
                i8042::DATA_PORT => self.i8042.read_data(),
                i8042::COMMAND_PORT => self.i8042.status(),
                power::RESET_PORT => self.power.read_reset(),
                _ if DEBUG_PORTS.contains(&port) => DEBUG_PRESENT,
                _ => !0,
            }
        }
    }

    fn write(&mut self, port: u16, value: u8, outcome: &mut AccessOutcome) {
        let event = if let Some(offset) = offset(port, uart::PORT, 8) {
            outcome.add_uart(self.uart.write(offset as u8, value));
            None
        } else if let Some(offset) = offset(port, power::PM1_PORT, power::PM1_SIZE) {
            self.power.write_pm1(offset, value)
        } else {
            let reset = |requested: bool| requested.then_some(PlatformEvent::Reset);
            match port {
                rtc::INDEX_PORT => {
                    self.rtc.select(value);
                    None
                }
                rtc::DATA_PORT => {
                    self.rtc.write(value);
                    None
                }
                i8042::DATA_PORT => reset(self.i8042.write_data(value)),
                i8042::COMMAND_PORT => reset(self.i8042.command(value)),
                power::RESET_PORT => self.power.write_reset(value),
                EXIT_PORT => Some(PlatformEvent::Exit(value)),
                _ => {
                    if DEBUG_PORTS.contains(&port) {
                        outcome.debug = Some(value);
                    }
                    None
                }
            }
        };
        outcome.event = outcome.event.or(event);
    }
}

impl AccessOutcome {
    fn add_uart(&mut self, effect: UartEffect) {
        self.serial = self.serial.or(effect.sent);
        self.interrupt |= effect.interrupt;
    }
}

/// Offset of `port` in the block of `size` ports at `first`, if it is in there.
fn offset(port: u16, first: u16, size: u16) -> Option<u16> {
    port.checked_sub(first).filter(|&offset| offset < size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(
        bus: &mut IsaBus,
        space: Space,
        address: u64,
        size: u8,
        write: Option<u64>,
    ) -> AccessOutcome {
        let access = Access {
            space,
            address,
            size,
            write,
        };
        bus.access(&access)
    }

    fn read(bus: &mut IsaBus, port: u64, size: u8) -> u64 {
        access(bus, Space::Port, port, size, None).value
    }

    fn write(bus: &mut IsaBus, port: u64, size: u8, value: u64) -> AccessOutcome {
        access(bus, Space::Port, port, size, Some(value))
    }

    #[test]
    fn unclaimed_addresses_read_as_ones_in_every_size() {
        let mut bus = IsaBus::power_on();
        let before = bus;
        for (space, address) in [
            (Space::Port, 0x3e8),
            (Space::Port, 0xfffd),
            (Space::Port, 0x1_0000),
            (Space::Port, u64::MAX - 1),
            (Space::Memory, 0x3f8),
            (Space::Memory, 0xfed0_0000),
        ] {
            for size in [1, 2, 4, 8] {
                let value = access(&mut bus, space, address, size, None).value;
                assert_eq!(value, !0 >> (64 - 8 * u32::from(size)));
                let outcome = access(&mut bus, space, address, size, Some(!0));
                assert_eq!(outcome, AccessOutcome::default());
            }
        }
        assert_eq!(bus, before);
        // Sizes that no vCPU produces do no harm.
        for size in [0, 3, 9, 255] {
            read(&mut bus, 0x3f8, size);
            write(&mut bus, 0x3f8, size, 0);
        }
    }

    #[test]
    fn registers_may_be_accessed_in_any_size() {
        let mut bus = IsaBus::power_on();
        assert_eq!(read(&mut bus, 0x604, 2), 1);
        assert_eq!(read(&mut bus, 0x600, 8), 0xffff_0001_0000_0000);
        let off = write(&mut bus, 0x604, 2, 0x2000);
        assert_eq!(off.event, Some(PlatformEvent::PowerOff));
        let off = write(&mut bus, 0x605, 1, 0x20);
        assert_eq!(off.event, Some(PlatformEvent::PowerOff));
        write(&mut bus, 0x3fb, 1, 0x80);
        write(&mut bus, 0x3f8, 2, 0x1234);
        assert_eq!(read(&mut bus, 0x3f8, 2), 0x1234);
        write(&mut bus, 0x70, 2, 0x5a40);
        write(&mut bus, 0x70, 1, 0x40);
        assert_eq!(read(&mut bus, 0x71, 1), 0x5a);
    }

    #[test]
    fn debug_and_exit_ports_report_what_is_written() {
        let mut bus = IsaBus::power_on();
        for port in DEBUG_PORTS {
            assert_eq!(read(&mut bus, port.into(), 1), 0xe9);
            let outcome = write(&mut bus, port.into(), 1, 0x41);
            assert_eq!((outcome.debug, outcome.serial), (Some(0x41), None));
        }
        // The upper bytes go to the neighbouring ports.
        let outcome = write(&mut bus, 0xf4, 4, 0x1122_3344);
        assert_eq!(outcome.event, Some(PlatformEvent::Exit(0x44)));
    }

    #[test]
    fn a_reset_keeps_only_cmos_memory() {
        let mut bus = IsaBus::power_on();
        write(&mut bus, 0x3ff, 1, 0x55);
        write(&mut bus, 0x70, 1, 0x40);
        write(&mut bus, 0x71, 1, 0xaa);
        write(&mut bus, 0x602, 2, 0x0120);
        bus.reset();
        assert_eq!(read(&mut bus, 0x3ff, 1), 0);
        assert_eq!(read(&mut bus, 0x602, 2), 0);
        write(&mut bus, 0x70, 1, 0x40);
        assert_eq!(read(&mut bus, 0x71, 1), 0xaa);
    }
}

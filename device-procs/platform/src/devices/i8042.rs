//! The keyboard controller, an i8042 at 0x60/0x64 without keyboard and mouse. It resets the
//! machine, and answers a driver that looks for devices at once, so that the driver need not
//! wait for its time-outs. It raises no interrupt.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Data.
pub const DATA_PORT: u16 = 0x60;
/// Status when read, commands when written.
pub const COMMAND_PORT: u16 = 0x64;

/// A byte waits at the data port.
const STATUS_FULL: u8 = 1 << 0;
/// The controller has passed its self-test, and the keyboard is not locked.
const STATUS_IDLE: u8 = 1 << 2 | 1 << 4;

const READ_CONFIGURATION: u8 = 0x20;
const WRITE_CONFIGURATION: u8 = 0x60;
const TEST_MOUSE: u8 = 0xa9;
const TEST_CONTROLLER: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const READ_OUTPUTS: u8 = 0xd0;
const WRITE_OUTPUTS: u8 = 0xd1;
const ECHO_KEYBOARD: u8 = 0xd2;
const ECHO_MOUSE: u8 = 0xd3;
/// Pulses the output lines whose bits are clear; line 0 is reset.
const PULSE: u8 = 0xf0;

const TEST_PASSED: u8 = 0x55;
/// Interface test result "clock line stuck": no device is connected.
const TEST_NOTHING_THERE: u8 = 0x01;
/// Both ports disabled, scan codes translated, self-test passed.
const CONFIGURATION: u8 = 0x74;
/// Reset not asserted, A20 on.
const OUTPUTS: u8 = 0x03;
const OUTPUT_RESET: u8 = 1 << 0;

/// Registers of the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct I8042 {
    configuration: u8,
    /// The command whose parameter is the next data byte; 0 if there is none.
    command: u8,
    data: u8,
    /// Whether `data` is not read yet.
    full: u8,
    reserved: [u8; 4],
}

impl I8042 {
    /// State at power-on.
    pub fn power_on() -> Self {
        I8042 {
            configuration: CONFIGURATION,
            command: 0,
            data: 0,
            full: 0,
            reserved: [0; 4],
        }
    }

    /// Reads the status register. The controller handles each byte at once, so its input
    /// buffer is never full.
    pub fn status(&self) -> u8 {
        if self.full != 0 {
            STATUS_IDLE | STATUS_FULL
        } else {
            STATUS_IDLE
        }
    }

    /// Reads the data register; returns the last byte again if there is no new one.
    pub fn read_data(&mut self) -> u8 {
        self.full = 0;
        self.data
    }

    /// Writes the data register; returns whether to reset the machine. Bytes for a keyboard
    /// are ignored.
    pub fn write_data(&mut self, value: u8) -> bool {
        match std::mem::take(&mut self.command) {
            WRITE_CONFIGURATION => self.configuration = value,
            WRITE_OUTPUTS => return value & OUTPUT_RESET == 0,
            ECHO_KEYBOARD | ECHO_MOUSE => self.answer(value),
            _ => {}
        }
        false
    }

    /// Writes the command register; returns whether to reset the machine.
    pub fn command(&mut self, command: u8) -> bool {
        self.command = 0;
        match command {
            READ_CONFIGURATION => self.answer(self.configuration),
            TEST_CONTROLLER => self.answer(TEST_PASSED),
            TEST_KEYBOARD | TEST_MOUSE => self.answer(TEST_NOTHING_THERE),
            READ_OUTPUTS => self.answer(OUTPUTS),
            WRITE_CONFIGURATION | WRITE_OUTPUTS | ECHO_KEYBOARD | ECHO_MOUSE => {
                self.command = command;
            }
            PULSE.. => return command & OUTPUT_RESET == 0,
            _ => {}
        }
        false
    }

    fn answer(&mut self, value: u8) {
        self.data = value;
        self.full = 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_with_answers_fill_the_buffer_until_it_is_read() {
        let mut controller = I8042::power_on();
        assert_eq!(controller.status(), STATUS_IDLE);
        for (command, answer) in [
            (READ_CONFIGURATION, CONFIGURATION),
            (TEST_CONTROLLER, TEST_PASSED),
            (TEST_MOUSE, TEST_NOTHING_THERE),
        ] {
            assert!(!controller.command(command));
            assert_eq!(controller.status(), STATUS_IDLE | STATUS_FULL);
            assert_eq!(controller.read_data(), answer);
            assert_eq!(controller.status(), STATUS_IDLE);
        }
        controller.command(WRITE_CONFIGURATION);
        assert!(!controller.write_data(0x30));
        // This byte is for a keyboard: no answer.
        assert!(!controller.write_data(0xf2));
        assert_eq!(controller.status(), STATUS_IDLE);
        controller.command(READ_CONFIGURATION);
        assert_eq!(controller.read_data(), 0x30);
    }

    #[test]
    fn the_reset_line_resets() {
        let mut controller = I8042::power_on();
        assert!(controller.command(0xfe));
        assert!(!controller.command(0xff));
        controller.command(WRITE_OUTPUTS);
        assert!(controller.write_data(0x02));
        controller.command(WRITE_OUTPUTS);
        assert!(!controller.write_data(0x03));
    }
}

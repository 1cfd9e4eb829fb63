//! The serial port: a 16550A at 0x3f8, interrupt line 4.
//!
//! Crate vm-superio 0.8 emulates the registers. This module corrects two points: unread
//! data stays visible in the interrupt identification register (in the crate, reading that
//! register clears it, so a driver that takes one byte at a time would leave the rest), and
//! a disabled interrupt is not visible. As in the crate, the transmitter is always empty, modem
//! lines never change, and the FIFO control register is ignored, so early input is kept.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// The first of its eight ports.
pub const PORT: u16 = 0x3f8;
/// Its interrupt line (GSI).
pub const LINE: u32 = 4;
/// Size of the receive FIFO in bytes.
pub const FIFO: usize = 64;

const IIR: u8 = 2;

const IER_RECEIVED: u8 = 1 << 0;
const IER_EMPTY: u8 = 1 << 1;
const IIR_NONE: u8 = 1 << 0;
const IIR_EMPTY: u8 = 1 << 1;
const IIR_RECEIVED: u8 = 1 << 2;
const IIR_FIFO: u8 = 3 << 6;
const MCR_LOOP: u8 = 1 << 4;

/// Registers of the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Uart {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    received_len: u8,
    reserved: [u8; 6],
    received: [u8; FIFO],
}

/// Effects of a register access outside the registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UartEffect {
    /// The value of a read.
    pub value: u8,
    /// A byte that the port sends.
    pub sent: Option<u8>,
    /// The port raises its interrupt line.
    pub interrupt: bool,
}

struct Edge<'a>(&'a Cell<bool>);

impl Trigger for Edge<'_> {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        Ok(())
    }
}

#[derive(Default)]
struct Wire(Option<u8>);

impl io::Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = bytes.first().copied().or(self.0);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Chip<'a> = Serial<Edge<'a>, NoEvents, Wire>;

impl Uart {
    /// State at power-on.
    pub fn power_on() -> Self {
        let mut uart = Uart::new_zeroed();
        uart.store(&SerialState::default());
        uart
    }

    /// Checks registers that were found in memory.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check(&self) -> Result<(), &'static str> {
        if usize::from(self.received_len) > FIFO {
            return Err("the serial port's FIFO is fuller than full");
        }
        Ok(())
    }

    /// The driver reads the register at `offset`.
    pub fn read(&mut self, offset: u8) -> UartEffect {
        if offset == IIR && self.interrupt_identification & IIR_RECEIVED != 0 {
            // Received data has priority over an empty transmitter, until it is read.
            return UartEffect {
                value: IIR_FIFO | IIR_RECEIVED,
                ..UartEffect::default()
            };
        }
        self.with_chip(|chip| chip.read(offset))
    }

    /// The driver writes the register at `offset`.
    pub fn write(&mut self, offset: u8, value: u8) -> UartEffect {
        self.with_chip(|chip| {
            // Neither the trigger nor the writer returns an error.
            let _ = chip.write(offset, value);
            0
        })
    }

    /// Number of bytes that [`Uart::receive`] accepts now. It is 0 until the FIFO is empty,
    /// so that bytes arrive in few batches.
    pub fn room(&self) -> usize {
        if self.received_len == 0 && self.modem_control & MCR_LOOP == 0 {
            FIFO
        } else {
            0
        }
    }

    /// Receives bytes, no more than [`Uart::room`]; returns whether the port raises its
    /// interrupt line.
    pub fn receive(&mut self, bytes: &[u8]) -> bool {
        self.with_chip(|chip| {
            let _ = chip.enqueue_raw_bytes(bytes);
            0
        })
        .interrupt
    }

    /// Whether an interrupt is pending.
    pub fn is_pending(&self) -> bool {
        self.interrupt_identification & IIR_NONE == 0
    }

    fn with_chip(&mut self, work: impl FnOnce(&mut Chip) -> u8) -> UartEffect {
        let edge = Cell::new(false);
        let chip = Chip::from_state(&self.load(), Edge(&edge), NoEvents, Wire::default());
        let Ok(mut chip) = chip else {
            // Fails only for a FIFO that is too full, which `check` excludes.
            return UartEffect::default();
        };
        // An interrupt that was pending before has raised the line already.
        edge.set(false);
        let value = work(&mut chip);
        self.store(&chip.state());
        UartEffect {
            value,
            sent: chip.writer().0,
            interrupt: edge.get(),
        }
    }

    fn load(&self) -> SerialState {
        SerialState {
            baud_divisor_low: self.divisor[0],
            baud_divisor_high: self.divisor[1],
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.received[..usize::from(self.received_len).min(FIFO)].to_vec(),
        }
    }

    fn store(&mut self, state: &SerialState) {
        let mut pending = state.interrupt_identification & !(IIR_NONE | IIR_RECEIVED);
        if state.interrupt_enable & IER_EMPTY == 0 {
            pending &= !IIR_EMPTY;
        }
        if state.interrupt_enable & IER_RECEIVED != 0 && !state.in_buffer.is_empty() {
            pending |= IIR_RECEIVED;
        }
        let len = state.in_buffer.len().min(FIFO);
        self.divisor = [state.baud_divisor_low, state.baud_divisor_high];
        self.interrupt_enable = state.interrupt_enable;
        self.interrupt_identification = if pending == 0 { IIR_NONE } else { pending };
        self.line_control = state.line_control;
        self.line_status = state.line_status;
        self.modem_control = state.modem_control;
        self.modem_status = state.modem_status;
        self.scratch = state.scratch;
        self.received_len = len as u8;
        self.received[..len].copy_from_slice(&state.in_buffer[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u8 = 0;
    const IER: u8 = 1;
    const LCR: u8 = 3;
    const MCR: u8 = 4;
    const LSR: u8 = 5;

    #[test]
    fn what_is_written_is_sent_and_interrupts_when_enabled() {
        let mut uart = Uart::power_on();
        let effect = uart.write(DATA, b'a');
        assert_eq!((effect.sent, effect.interrupt), (Some(b'a'), false));
        // The transmitter is empty, so enabling its interrupt raises it.
        assert!(uart.write(IER, IER_EMPTY).interrupt);
        assert!(uart.is_pending());
        assert_eq!(uart.read(IIR).value, IIR_FIFO | IIR_EMPTY);
        assert_eq!(uart.read(IIR).value, IIR_FIFO | IIR_NONE);
        let effect = uart.write(DATA, b'b');
        assert_eq!((effect.sent, effect.interrupt), (Some(b'b'), true));
        // A disabled interrupt is not visible.
        uart.write(IER, 0);
        assert!(!uart.is_pending());
    }

    #[test]
    fn received_data_shows_until_the_last_byte_is_read() {
        let mut uart = Uart::power_on();
        uart.write(IER, IER_RECEIVED | IER_EMPTY);
        assert_eq!(uart.room(), FIFO);
        assert!(uart.receive(b"xy"));
        assert_eq!(uart.room(), 0);
        for byte in *b"xy" {
            assert_eq!(uart.read(IIR).value, IIR_FIFO | IIR_RECEIVED);
            assert_eq!(uart.read(IIR).value, IIR_FIFO | IIR_RECEIVED);
            assert_eq!(uart.read(LSR).value & 1, 1);
            assert_eq!(uart.read(DATA).value, byte);
        }
        assert_eq!(uart.read(LSR).value, 0x60);
        assert_eq!(uart.read(IIR).value, IIR_FIFO | IIR_EMPTY);
        assert_eq!(uart.read(IIR).value, IIR_FIFO | IIR_NONE);
    }

    #[test]
    fn data_that_came_while_disabled_interrupts_when_enabled() {
        let mut uart = Uart::power_on();
        assert!(!uart.receive(b"x"));
        assert!(!uart.is_pending());
        assert!(uart.write(IER, IER_RECEIVED).interrupt);
        uart.write(IER, 0);
        assert!(uart.write(IER, IER_RECEIVED).interrupt);
    }

    #[test]
    fn loopback_keeps_bytes_off_the_line() {
        let mut uart = Uart::power_on();
        uart.write(MCR, MCR_LOOP);
        assert_eq!(uart.write(DATA, 0x5a).sent, None);
        assert_eq!(uart.room(), 0);
        assert_eq!(uart.read(DATA).value, 0x5a);
        // In loopback the line is disconnected in both directions.
        assert_eq!(uart.room(), 0);
        uart.write(LCR, 0x83);
        uart.write(DATA, 0x01);
        assert_eq!(uart.read(DATA).value, 0x01);
    }

    #[test]
    fn a_full_fifo_is_survived_and_a_fuller_one_refused() {
        let mut uart = Uart::power_on();
        uart.write(MCR, MCR_LOOP);
        for byte in 0..2 * FIFO as u8 {
            uart.write(DATA, byte);
        }
        uart.check().unwrap();
        for byte in 0..FIFO as u8 {
            assert_eq!(uart.read(DATA).value, byte);
        }
        uart.received_len = FIFO as u8 + 1;
        assert!(uart.check().is_err());
    }
}

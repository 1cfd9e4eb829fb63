//! The first serial port: a 16550.

use crate::{boot, port};

/// Its I/O ports, eight from here.
pub const BASE: u16 = 0x3f8;
/// Its ISA interrupt.
pub const IRQ: u8 = 4;

const DATA: u16 = BASE;
const INTERRUPT_ENABLE: u16 = BASE + 1;
const INTERRUPT_IDENTIFICATION: u16 = BASE + 2;
const FIFO_CONTROL: u16 = BASE + 2;
const MODEM_CONTROL: u16 = BASE + 4;
const LINE_STATUS: u16 = BASE + 5;

const RECEIVED_DATA: u8 = 1;
/// FIFOs on; interrupt at the first byte.
const FIFOS_ON: u8 = 1;
/// Data terminal ready, request to send, and the gate of the interrupt line.
const DTR_RTS_OUT2: u8 = 0x0b;
const NO_INTERRUPT_PENDING: u8 = 1;
const DATA_READY: u8 = 1;

/// Writes `text`; returns how many bytes it did not take.
pub fn write(text: &[u8]) -> usize {
    boot::write_uart(BASE, text)
}

/// Makes it interrupt when a byte comes in.
pub fn enable_receive_interrupt() {
    port::write8(FIFO_CONTROL, FIFOS_ON);
    port::write8(MODEM_CONTROL, DTR_RTS_OUT2);
    port::write8(INTERRUPT_ENABLE, RECEIVED_DATA);
}

/// Makes it interrupt no more.
pub fn disable_interrupts() {
    port::write8(INTERRUPT_ENABLE, 0);
}

/// Whether it asks for an interrupt.
pub fn interrupt_pending() -> bool {
    port::read8(INTERRUPT_IDENTIFICATION) & NO_INTERRUPT_PENDING == 0
}

/// The next byte that came in, if there is one.
pub fn read() -> Option<u8> {
    (port::read8(LINE_STATUS) & DATA_READY != 0).then(|| port::read8(DATA))
}

//! `serial`, `serial-irq`: the UART as a device under test.

use super::Guest;
use crate::irq::{self, Vector};
use crate::line;
use crate::uart;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// A line that ends `serial-irq`.
const QUIT: &[u8] = b"quit";

/// Prints numbered lines on the UART and nowhere else.
///
/// # Errors
/// The UART stopped taking bytes.
pub fn lines(guest: &Guest) -> Result<(), String> {
    for number in 1..=guest.options.number("lines", 100)? {
        let left = uart::write(format!("line {number:06}\n").as_bytes());
        if left > 0 {
            return Err(format!(
                "serial: line {number}: the transmitter stays full, {left} bytes left"
            ));
        }
    }
    Ok(())
}

/// Sends back what the UART receives until a line `quit`; reads only after an interrupt.
///
/// # Errors
/// The UART stopped taking bytes.
pub fn echo(_: &Guest) -> Result<(), String> {
    let vector = Vector::new("uart".into())?;
    irq::route_isa(uart::IRQ, vector);
    uart::enable_receive_interrupt();
    line!("serial-irq: ready");
    let (mut handled, mut received) = (0, 0);
    let mut line = Vec::new();
    loop {
        irq::wait_for_ever(|| vector.count() != handled);
        handled = vector.count();
        // The line is edge-triggered: all must be taken before it can rise again.
        while uart::interrupt_pending() {
            while let Some(byte) = uart::read() {
                received += 1;
                if uart::write(&[byte]) > 0 {
                    return Err("serial-irq: the transmitter stays full".into());
                }
                match byte {
                    b'\n' | b'\r' if line == QUIT => {
                        uart::disable_interrupts();
                        let (count, number) = (vector.count(), vector.number());
                        line!(
                            "serial-irq: {received} bytes, {count} interrupts on vector {number}"
                        );
                        return Ok(());
                    }
                    b'\n' | b'\r' => line.clear(),
                    _ => line.push(byte),
                }
            }
        }
    }
}

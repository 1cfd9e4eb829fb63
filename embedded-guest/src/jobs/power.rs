//! `idle`, `spin`, `reset`: jobs for the processor and the machine.

use super::Guest;
use crate::irq::{self, Deadline, TICKS_PER_SECOND};
use crate::line;
use crate::{boot, port, uart};
use alloc::format;
use alloc::string::String;
use core::hint::black_box;

const I8042_COMMAND: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;
const RESET_CONTROL: u16 = 0xcf9;
/// Values that select and carry out a hard reset.
const HARD: u8 = 0x02;
const HARD_NOW: u8 = 0x06;
/// How long a reset may take.
const RESET_SECONDS: u64 = 5;
/// Rounds between two looks at the clock.
const ROUNDS: u64 = 1 << 20;

/// Sleeps for ever, interrupts on.
pub fn idle() -> ! {
    line!("idle");
    irq::stop_timer();
    loop {
        irq::halt();
    }
}

/// Counts for ever; a dot on the UART every second or so.
pub fn spin() -> ! {
    let mut next = irq::ticks() + TICKS_PER_SECOND;
    loop {
        for round in 0..ROUNDS {
            black_box(round);
        }
        if irq::ticks() >= next {
            next += TICKS_PER_SECOND;
            uart::write(b".");
        }
    }
}

/// Prints `boot` and resets the machine in the way chosen.
///
/// # Errors
/// No such way; or it is still running after that.
pub fn reset(guest: &Guest) -> Result<(), String> {
    line!("boot");
    let how = guest.options.get("how").unwrap_or("i8042");
    match how {
        "i8042" => port::write8(I8042_COMMAND, PULSE_RESET),
        "cf9" => {
            port::write8(RESET_CONTROL, HARD);
            port::write8(RESET_CONTROL, HARD_NOW);
        }
        "triple" => boot::triple_fault(),
        _ => return Err(format!("there is no reset by {how}")),
    }
    let deadline = Deadline::after(RESET_SECONDS);
    while !deadline.is_over() {
        core::hint::spin_loop();
    }
    Err(format!("still running after a reset by {how}"))
}

//! Output and the end of the guest. Every line goes to the UART and, once one is in use, to
//! the virtio console.

use crate::single::Single;
use crate::virtio::console::Console;
use crate::{boot, port, uart};
use alloc::format;
use core::fmt::Arguments;
use core::fmt::Write;
use core::panic::PanicInfo;

/// PM1a control: SLP_EN, with sleep type 0, is off.
const PM1A_CONTROL: u16 = 0x604;
const SLEEP_ENABLE: u16 = 0x2000;
/// A write ends the machine; any value but 0 means failure.
const EXIT_PORT: u16 = 0xf4;
const FAILED: u8 = 1;
const PANICKED: u8 = 0x7f;

static CONSOLE: Single<Option<Console>> = Single::new(None);

/// Prints a line.
#[macro_export]
macro_rules! line {
    ($($format:tt)*) => { $crate::report::print(format_args!($($format)*)) };
}

/// Sends lines to `console` as well, from now on.
pub fn attach(console: Console) {
    *CONSOLE.borrow_mut() = Some(console);
}

/// Does something with the attached console, if there is one.
pub fn with_console<T>(action: impl FnOnce(&mut Console) -> T) -> Option<T> {
    CONSOLE.borrow_mut().as_mut().map(action)
}

/// Prints a line; use [`line!`].
pub fn print(text: Arguments) {
    let text = format!("{text}\n");
    uart::write(text.as_bytes());
    let sent = with_console(|console| console.send(text.as_bytes()));
    if let Some(Err(error)) = sent {
        *CONSOLE.borrow_mut() = None;
        fail(&error);
    }
}

/// Ends the guest with success.
pub fn pass() -> ! {
    line!("guest: pass");
    power_off()
}

/// Ends the guest with failure, for the reason given.
pub fn fail(reason: &str) -> ! {
    line!("guest: FAIL {reason}");
    exit(FAILED)
}

/// Powers the machine off.
pub fn power_off() -> ! {
    port::write16(PM1A_CONTROL, SLEEP_ENABLE);
    halt()
}

/// Ends the machine through the exit port.
pub fn exit(code: u8) -> ! {
    port::write8(EXIT_PORT, code);
    halt()
}

/// Halts, where neither port ends the machine.
fn halt() -> ! {
    loop {
        crate::irq::halt();
    }
}

/// Formats without the heap, straight to the UART.
struct Raw;

impl Write for Raw {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        boot::write_uart(uart::BASE, text.as_bytes());
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    let _ = writeln!(Raw, "guest: FAIL {info}");
    exit(PANICKED)
}

/// boot/interrupts.s continues here after an exception in user mode.
#[unsafe(no_mangle)]
extern "C" fn fault(vector: u64, code: u64, address: u64, memory: u64) -> ! {
    let _ = writeln!(
        Raw,
        "guest: FAIL exception {vector}, code {code:#x}, at {address:#x}, memory {memory:#x}"
    );
    exit(PANICKED)
}

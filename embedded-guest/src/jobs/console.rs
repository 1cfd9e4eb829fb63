//! The console's part of `main`, and `echo`.

use super::Guest;
use crate::irq;
use crate::line;
use crate::report;
use crate::virtio::CONSOLE;
use crate::virtio::console::Console;
use crate::virtio::device::Device;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// A line that ends `echo`.
const QUIT: &[u8] = b"quit";

/// Sends a greeting and keeps the console for the lines to come.
///
/// # Errors
/// The device failed.
pub fn greet(device: Device) -> Result<(), String> {
    let (name, vector) = (device.name.clone(), device.queue_vector(1));
    let before = vector.count();
    let mut console = Console::start(device)?;
    console.send(b"Hello from the guest.\n")?;
    let interrupts = vector.count() - before;
    report::attach(console);
    line!(
        "{name}: greeting sent, {interrupts} interrupts on vector {}",
        vector.number()
    );
    Ok(())
}

/// Sends back everything it receives until a line `quit`; prints the console's size at the
/// start and whenever the device reports a change.
///
/// # Errors
/// The device failed.
pub fn echo(guest: &Guest) -> Result<(), String> {
    let mut console = Console::start(guest.device(CONSOLE)?)?;
    let changed = console.device().config_vector();
    let mut changes = changed.count();
    let mut line = Vec::new();
    say_size(&mut console)?;
    loop {
        while let Some(text) = console.receive()? {
            console.send(&text)?;
            for byte in text {
                match byte {
                    b'\n' | b'\r' if line == QUIT => return Ok(()),
                    b'\n' | b'\r' => line.clear(),
                    _ => line.push(byte),
                }
            }
        }
        if changed.count() != changes {
            changes = changed.count();
            say_size(&mut console)?;
        }
        irq::wait_for_ever(|| changed.count() != changes || console.has_input());
    }
}

fn say_size(console: &mut Console) -> Result<(), String> {
    let text = match console.size()? {
        Some((columns, rows)) => format!("size {columns}x{rows}\n"),
        None => String::from("size unknown\n"),
    };
    console.send(text.as_bytes())
}

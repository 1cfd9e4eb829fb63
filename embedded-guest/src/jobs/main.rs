//! `main`: every device works, and each interrupt arrives on its vector.

use super::{Guest, console, disk, net};
use crate::irq::Snapshot;
use crate::line;
use crate::virtio::device::{self, Device};
use crate::virtio::{BLOCK, CONSOLE, NET};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// The types with a driver, in order, and their names in `need=`. The console is first, so
/// that it shows the lines about the others.
const KINDS: [(u16, &str); 3] = [(CONSOLE, "console"), (BLOCK, "block"), (NET, "net")];

/// Checks all devices.
///
/// # Errors
/// The first that failed; or one listed in `need=` is missing.
pub fn run(guest: &Guest) -> Result<(), String> {
    let found = device::find(guest.pci);
    for (kind, function) in &found {
        if device::role(*kind).is_none() {
            line!(
                "virtio type {kind} at 00:{:02x}: no driver",
                function.device()
            );
        }
    }
    let mut running = Vec::new();
    for (kind, name) in KINDS {
        let before = running.len();
        for (_, function) in found.iter().filter(|(found, _)| *found == kind) {
            running.push(Device::open(kind, *function)?);
            check(guest, &running)?;
        }
        if running.len() == before {
            line!("{name}: none");
            if guest.options.lists("need", name) {
                return Err(format!("{name} is needed, but there is none"));
            }
        }
    }
    Ok(())
}

/// Checks the last of `devices`, and that only it and the consoles before it
/// interrupted meanwhile.
fn check(guest: &Guest, devices: &[Device]) -> Result<(), String> {
    let Some(device) = devices.last() else {
        return Ok(());
    };
    let before = Snapshot::take();
    match device.kind {
        CONSOLE => console::greet(device.clone())?,
        BLOCK => disk::check(guest, device.clone())?,
        _ => net::check(guest, device.clone())?,
    }
    let consoles = devices.iter().filter(|other| other.kind == CONSOLE);
    let expected: Vec<_> = consoles
        .chain([device])
        .flat_map(|device| device.vectors.iter().copied())
        .collect();
    before.only(&expected)
}

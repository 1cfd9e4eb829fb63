//! Devices that request a reset (virtio 1.2, 2.1.2) and must work after it. `bad-rings`:
//! because queues are at invalid addresses. `needs-reset`: for a reason outside the guest.

use super::{Guest, disk};
use crate::virtio::BLOCK;
use crate::virtio::device::Device;
use crate::virtio::device::common::{
    QUEUE_DESC, QUEUE_DEVICE, QUEUE_DRIVER, QUEUE_ENABLE, QUEUE_SELECT, QUEUE_SIZE,
};
use crate::virtio::disk::Disk;
use crate::virtio::transport::{Completion, Transport};
use crate::{irq, line, seconds};
use alloc::format;
use alloc::string::String;

/// DEVICE_NEEDS_RESET.
const NEEDS_RESET: u8 = 0x40;

/// What is wrong with an address, and the address.
const PLACES: [(&str, u64); 3] = [
    ("at the end of all addresses", u64::MAX - 0xfff),
    ("where no memory is", 0xd000_0000),
    ("at an odd address", 0x10_0001),
];

/// Tries each address, then uses the disk normally.
///
/// # Errors
/// The device accepted such a queue, or does not work afterwards.
pub fn run(guest: &Guest) -> Result<(), String> {
    let device = guest.device(BLOCK)?;
    let name = &device.name;
    for (what, place) in PLACES {
        let mut transport = Transport::start(device.clone(), 0, Completion::Polling)?;
        let common = device.common;
        common.write(QUEUE_SELECT, 0u16);
        common.write(QUEUE_SIZE, 16u16);
        for register in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE] {
            common.write(register, place as u32);
            common.write(register + 4, (place >> 32) as u32);
        }
        common.write(QUEUE_ENABLE, 1u16);
        transport.finish();
        wait_for_wish(&device).map_err(|why| format!("rings {what}: {why}"))?;
        line!("{name}: rings {what}: needs a reset");
    }
    disk::check(guest, device)
}

/// Starts to use the disk, waits until it requests a reset, and resets it.
///
/// # Errors
/// The device never requests a reset, or does not work afterwards.
pub fn wait_and_reset(guest: &Guest) -> Result<(), String> {
    let device = guest.device(BLOCK)?;
    let disk = Disk::start(device.clone(), Completion::Polling)?;
    line!("needs-reset: ready");
    wait_for_wish(&device)?;
    line!("{}: needs a reset", device.name);
    // That resets it.
    drop(disk);
    disk::check(guest, device)
}

fn wait_for_wish(device: &Device) -> Result<(), String> {
    let asks = || (device.status() & NEEDS_RESET != 0).then_some(());
    irq::wait_until(seconds(), asks).map_err(|_| format!("{}: no wish for a reset", device.name))
}

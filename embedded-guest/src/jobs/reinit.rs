//! `reset-reinit`: devices are reset and set up repeatedly, idle and with requests in flight.

use super::{Guest, disk, net};
use crate::irq;
use crate::line;
use crate::virtio::console::Console;
use crate::virtio::device::{self, Device};
use crate::virtio::disk::{Disk, SECTOR};
use crate::virtio::net::Net;
use crate::virtio::queue::SIZE as QUEUE_SIZE;
use crate::virtio::transport::Completion;
use crate::virtio::{BLOCK, CONSOLE};
use alloc::format;
use alloc::string::String;
use logic::packet::Station;

/// Bytes of the reads that a reset interrupts.
const LONG_READ: u64 = 64 * 1024;

/// Sets every device up `count` times; each time it must do its work.
///
/// # Errors
/// A device did not reset, or did not work after it.
pub fn run(guest: &Guest) -> Result<(), String> {
    let count = guest.options.number("count", 10)?;
    for (kind, function) in device::find(guest.pci) {
        if device::role(kind).is_none() {
            continue;
        }
        let device = Device::open(kind, function)?;
        let mut cut_short = 0;
        for round in 1..=count {
            let result = match kind {
                BLOCK => disk_round(&device, round).map(|cut| cut_short += cut),
                CONSOLE => console_round(&device, round),
                _ => net_round(guest, &device),
            };
            result.map_err(|error| format!("{error} (after {round} resets)"))?;
        }
        let name = &device.name;
        line!(
            "{name}: worked after each of {count} resets, {cut_short} requests cut short by them"
        );
    }
    Ok(())
}

/// Writes and verifies, then leaves reads unfinished: dropping the disk resets it.
/// Returns how many were left.
fn disk_round(device: &Device, round: u64) -> Result<u64, String> {
    let mut disk = Disk::start(device.clone(), Completion::Interrupt)?;
    let sectors = 8.min(disk.capacity());
    let seed = irq::cycles();
    if !disk.read_only() {
        disk::write(&mut disk, seed, 0, sectors)?;
        disk::read(&mut disk, seed, 0, sectors)?;
    }
    // A different number each time, so that the ring is cut off at different places.
    let left = (round % QUEUE_SIZE as u64 + 1).min(disk.depth() as u64);
    let length = LONG_READ.min(disk.capacity() * SECTOR);
    for _ in 0..left {
        disk.submit_read(0, length as usize)?;
    }
    Ok(left)
}

fn console_round(device: &Device, round: u64) -> Result<(), String> {
    Console::start(device.clone())?.send(format!("reset {round}\n").as_bytes())
}

fn net_round(guest: &Guest, device: &Device) -> Result<(), String> {
    let mut net = Net::start(device.clone())?;
    let own = Station {
        mac: net.mac(),
        ip: net::own_address(guest)?,
    };
    net::find(&mut net, &device.name, own, net::peer_address(guest)?).map(drop)
}

//! The disk's part of `main`.

use super::Guest;
use crate::irq;
use crate::line;
use crate::virtio::BLOCK;
use crate::virtio::device::Device;
use crate::virtio::disk::{Disk, SECTOR};
use crate::virtio::transport::Completion;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use logic::pattern;

/// Sectors in one request.
const REQUEST: u64 = 128;
/// Sectors written at each place, on a disk that is large enough.
const STRETCH: u64 = 2048;

/// VIRTIO_BLK_F_CONFIG_WCE and its field (virtio 1.2 section 5.2.5).
const CONFIG_WCE: u64 = 1 << 11;
const WRITEBACK: u64 = 32;

/// Sets the disk to write-through and prints the disk's cache mode, now and at each change;
/// never ends.
///
/// # Errors
/// There is no disk, or it does not start.
pub fn write_through(guest: &Guest) -> Result<(), String> {
    let device = guest.device(BLOCK)?;
    let _disk = Disk::start_with(device.clone(), CONFIG_WCE, Completion::Polling)?;
    device.config.write(WRITEBACK, 0u8);
    let mut last = None;
    loop {
        let now: u8 = device.config.read(WRITEBACK);
        if last != Some(now) {
            line!("{}: writeback is {now}", device.name);
            last = Some(now);
        }
    }
}

/// Writes four ranges, the last one at the end of the disk, flushes, and reads them back.
///
/// # Errors
/// A request failed, or what was read is not what was written.
pub fn check(guest: &Guest, device: Device) -> Result<(), String> {
    let (name, vector) = (device.name.clone(), device.queue_vector(0));
    let before = vector.count();
    let seed = guest.options.number("seed", irq::cycles())? ^ u64::from(device.function.device());
    let mut disk = Disk::start(device, Completion::Interrupt)?;
    let id = disk.id()?;
    let capacity = disk.capacity();
    if capacity < 4 {
        return Err(format!("{name}: {capacity} sectors are too few"));
    }
    let length = STRETCH.min(capacity / 4);
    let stretches = [0, capacity / 4, capacity / 2, capacity - length];
    if !disk.read_only() {
        for start in stretches {
            write(&mut disk, seed, start, length)?;
        }
        disk.flush()?;
    }
    for start in stretches {
        read(&mut disk, seed, start, length)?;
    }
    line!(
        "{name}: {} sectors, id {id:?}, {} KiB {}, {} interrupts on vector {}",
        capacity,
        4 * length * SECTOR / 1024,
        if disk.read_only() {
            "read (read-only)"
        } else {
            "written and verified"
        },
        vector.count() - before,
        vector.number()
    );
    Ok(())
}

/// The requests of a range: first sector and number of sectors.
fn requests(start: u64, length: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = start + length;
    (start..end)
        .step_by(REQUEST as usize)
        .map(move |sector| (sector, REQUEST.min(end - sector)))
}

/// Writes a range in requests of 64 KiB.
///
/// # Errors
/// See [`Disk::write`].
pub fn write(disk: &mut Disk, seed: u64, start: u64, length: u64) -> Result<(), String> {
    for (sector, sectors) in requests(start, length) {
        let mut data = vec![0; (sectors * SECTOR) as usize];
        pattern::fill(seed, sector * SECTOR, &mut data);
        disk.write(sector, data)?;
    }
    Ok(())
}

/// Reads a range in requests of 64 KiB; on a writable disk the data must be what [`write`]
/// wrote.
///
/// # Errors
/// See [`Disk::read`]; or it is something else.
pub fn read(disk: &mut Disk, seed: u64, start: u64, length: u64) -> Result<(), String> {
    for (sector, sectors) in requests(start, length) {
        let data = disk.read(sector, (sectors * SECTOR) as usize)?;
        let wrong = pattern::first_difference(seed, sector * SECTOR, &data);
        match wrong {
            Some(offset) if !disk.read_only() => {
                return Err(format!(
                    "{}: byte {offset} from sector {sector} is not what was written",
                    disk.name()
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

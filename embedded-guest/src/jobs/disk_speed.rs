//! `disk-io`, `disk-irq`: many reads of 4 KiB, timed.

use super::Guest;
use crate::irq;
use crate::line;
use crate::virtio::BLOCK;
use crate::virtio::disk::{Disk, SECTOR};
use crate::virtio::transport::Completion;
use alloc::format;
use alloc::string::String;
use logic::pattern;
use logic::times::Times;

const LENGTH: u64 = 4096;
const SECTORS: u64 = LENGTH / SECTOR;
const SEED: u64 = 0x6469_736b;

/// Reads and polls the used ring: between the first and the last request the guest leaves
/// user mode only for the doorbell.
///
/// # Errors
/// See [`Disk::complete`].
pub fn polling(guest: &Guest) -> Result<(), String> {
    irq::stop_timer();
    run(guest, "disk-io", Completion::Polling)
}

/// Reads waiting for an interrupt each time.
///
/// # Errors
/// See [`Disk::complete`].
pub fn interrupts(guest: &Guest) -> Result<(), String> {
    run(guest, "disk-irq", Completion::Interrupt)
}

fn run(guest: &Guest, job: &str, completion: Completion) -> Result<(), String> {
    let count = guest.options.number("count", 1000)?;
    let wanted = guest.options.number("qdepth", 1)?;
    let device = guest.device(BLOCK)?;
    let vector = device.queue_vector(0);
    let mut disk = Disk::start(device, completion)?;
    let depth = wanted.clamp(1, disk.depth() as u64);
    let places = disk.capacity() / SECTORS;
    if places == 0 {
        return Err(format!("{job}: the disk is too small"));
    }
    line!("{job}: ready");
    let interrupts = vector.count();
    let mut times = Times::default();
    let (mut submitted, mut before) = (0, irq::cycles());
    while times.count() < count {
        while submitted < count && submitted - times.count() < depth {
            let place = pattern::word(SEED, 8 * submitted) % places;
            disk.submit_read(place * SECTORS, LENGTH as usize)?;
            submitted += 1;
        }
        disk.complete()?;
        let now = irq::cycles();
        times.add(now - before);
        before = now;
    }
    let interrupts = vector.count() - interrupts;
    let (mean, least, median) = times
        .summary()
        .ok_or_else(|| format!("{job}: count is 0"))?;
    line!(
        "{job}: {count} reads of {LENGTH} bytes, {depth} at a time: {mean} cycles each, \
         least {least}, median {median}; {interrupts} interrupts"
    );
    Ok(())
}

//! A freestanding guest: finds its devices, drives them in user mode, reports the result and
//! ends the machine. README.md lists its jobs.

#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod irq;
mod jobs;
mod memory;
mod pci;
mod port;
mod report;
mod single;
mod uart;
mod virtio;

use alloc::string::String;
use core::sync::atomic::{AtomicU64, Ordering};
use report::fail;

/// How long a device may take, unless `deadline=` says otherwise.
static SECONDS: AtomicU64 = AtomicU64::new(30);

/// How long to wait for a device before giving up.
fn seconds() -> u64 {
    SECONDS.load(Ordering::Relaxed)
}

/// Entered by boot/start.s in user mode, with what the loader left in EBX.
#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: u64) -> ! {
    // SAFETY: start.s passes EBX on.
    let machine = unsafe { memory::start_info::read(start_info) };
    match machine
        .map_err(String::from)
        .and_then(|machine| run(&machine))
    {
        Ok(()) => report::pass(),
        Err(reason) => fail(&reason),
    }
}

fn run(machine: &memory::start_info::Machine) -> Result<(), String> {
    let guest = jobs::Guest::new(machine);
    SECONDS.store(
        guest.options.number("deadline", seconds())?,
        Ordering::Relaxed,
    );
    irq::wait_asleep(guest.options.get("wait") != Some("spin"));
    irq::start_timer();
    jobs::run(&guest)
}

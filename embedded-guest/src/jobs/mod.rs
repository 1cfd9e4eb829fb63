//! The jobs of the guest: `job=NAME` on its command line.

mod console;
mod disk;
mod disk_chaos;
mod disk_speed;
mod main;
mod net;
mod ports;
mod power;
mod ram;
mod reinit;
mod rings;
mod serial;

use crate::memory::pages::{self, Kind};
use crate::memory::start_info::Machine;
use crate::pci::Access;
use crate::report;
use crate::virtio::device::{self, Device};
use crate::{port, uart};
use alloc::format;
use alloc::string::String;
use logic::acpi;
use logic::options::Options;

/// What every job starts from.
pub struct Guest<'a> {
    /// The machine as the loader describes it.
    pub machine: &'a Machine,
    /// The command line.
    pub options: Options<'a>,
    /// How PCI configuration space is reached.
    pub pci: Access,
}

impl<'a> Guest<'a> {
    /// Looks for the configuration space of `machine`.
    pub fn new(machine: &'a Machine) -> Self {
        let ecam = acpi::find_ecam(machine.rsdp, read_memory);
        if let Some(ecam) = ecam {
            pages::map(ecam.base..ecam.base + (1 << 20), Kind::Device);
        }
        Self {
            machine,
            options: Options::new(&machine.command_line),
            pci: Access::new(ecam),
        }
    }

    /// Opens the first device of a type.
    ///
    /// # Errors
    /// There is none; or see [`Device::open`].
    pub fn device(&self, kind: u16) -> Result<Device, String> {
        let role = device::role(kind).map_or("device", |(role, _)| role);
        device::find(self.pci)
            .into_iter()
            .find(|(found, _)| *found == kind)
            .ok_or_else(|| format!("there is no {role}"))
            .and_then(|(kind, function)| Device::open(kind, function))
    }
}

/// Bytes below 4 GiB for the ACPI search.
fn read_memory<'a>(address: u64, length: usize) -> Option<&'a [u8]> {
    let end = address.checked_add(length as u64)?;
    if address == 0 || end > 1 << 32 {
        return None;
    }
    // SAFETY: mapped by boot/tables.s; ACPI tables are not written to.
    Some(unsafe { core::slice::from_raw_parts(address as *const u8, length) })
}

/// Does the job that the command line names.
///
/// # Errors
/// What went wrong, in one line.
pub fn run(guest: &Guest) -> Result<(), String> {
    job(guest)?;
    if guest.options.get("end") == Some("idle") {
        power::idle();
    }
    Ok(())
}

fn job(guest: &Guest) -> Result<(), String> {
    match guest.options.get("job").unwrap_or("main") {
        "main" => main::run(guest),
        "first-byte" => first_byte(),
        "ram" => ram::run(guest),
        "disk-io" => disk_speed::polling(guest),
        "disk-irq" => disk_speed::interrupts(guest),
        "disk-chaos" => disk_chaos::run(guest),
        "write-through" => disk::write_through(guest),
        "echo" => console::echo(guest),
        "serial" => serial::lines(guest),
        "serial-irq" => serial::echo(guest),
        "port-read" => ports::time_user(guest),
        "port-kernel" => ports::time_kernel(guest),
        "ports" => ports::unclaimed(guest),
        "rtc" => ports::date(guest),
        "idle" => power::idle(),
        "spin" => power::spin(),
        "reset" => power::reset(guest),
        "reset-reinit" => reinit::run(guest),
        "bad-rings" => rings::run(guest),
        "needs-reset" => rings::wait_and_reset(guest),
        "fail" => report::exit(guest.options.number("code", 1)? as u8),
        job => Err(format!("there is no job {job}")),
    }
}

/// Job `first-byte`, for a command line that does not start with it; see boot/start.s.
fn first_byte() -> ! {
    port::write8(uart::BASE, b'B');
    report::power_off()
}

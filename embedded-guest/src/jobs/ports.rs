//! `port-read`, `port-kernel`: the cost of a port access; `ports`: reads of unclaimed ports;
//! `rtc`: the date.

use super::Guest;
use crate::boot::{self, KERNEL_READS};
use crate::irq;
use crate::line;
use crate::port;
use crate::uart;
use crate::virtio::device::common::DEVICE_FEATURE_SELECT;
use crate::virtio::device::{self, Device};
use alloc::format;
use alloc::string::String;
use logic::clock::{self, Clock};
use logic::times::Times;

const LINE_STATUS: u64 = uart::BASE as u64 + 5;
/// A port without a device on a PC.
const UNCLAIMED_PORT: u64 = 0x500;

const CMOS_INDEX: u16 = 0x70;
const CMOS_DATA: u16 = 0x71;
const STATUS_A: u8 = 0x0a;
const UPDATING: u8 = 0x80;

fn port_number(guest: &Guest, default: u64) -> Result<u16, String> {
    let number = guest.options.number("port", default)?;
    u16::try_from(number).map_err(|_| format!("option port: {number:#x} is not a port"))
}

/// Times `count` reads of a port from user mode, each by itself.
///
/// # Errors
/// A bad option.
pub fn time_user(guest: &Guest) -> Result<(), String> {
    let port = port_number(guest, LINE_STATUS)?;
    let mut times = Times::default();
    for _ in 0..guest.options.number("count", 1000)? {
        let start = irq::cycles();
        port::read8(port);
        times.add(irq::cycles() - start);
    }
    report("port-read", port, times, 1)
}

/// Times `count` reads of a port from kernel mode, [`KERNEL_READS`] at a time.
///
/// # Errors
/// A bad option.
pub fn time_kernel(guest: &Guest) -> Result<(), String> {
    let port = port_number(guest, LINE_STATUS)?;
    let mut times = Times::default();
    for _ in 0..guest.options.number("count", 1000)?.div_ceil(KERNEL_READS) {
        let start = irq::cycles();
        boot::read_port_in_kernel(port);
        times.add((irq::cycles() - start) / KERNEL_READS);
    }
    report("port-kernel", port, times, KERNEL_READS)
}

fn report(job: &str, port: u16, times: Times, lot: u64) -> Result<(), String> {
    let count = times.count() * lot;
    let (mean, least, median) = times
        .summary()
        .ok_or_else(|| format!("{job}: count is 0"))?;
    line!("{job}: {count} reads of {port:#x}: {mean} cycles each, least {least}, median {median}");
    Ok(())
}

/// Reads a port without a device, which must return all ones, and prints device registers
/// with memory decoding disabled (all ones on most machines, 0 on QEMU).
///
/// # Errors
/// The port did not return all ones.
pub fn unclaimed(guest: &Guest) -> Result<(), String> {
    let port = port_number(guest, UNCLAIMED_PORT)?;
    let (byte, long) = (port::read8(port), port::read32(port));
    line!("ports: {port:#x} reads {byte:#x}, {long:#x}");
    if (byte, long) != (0xff, 0xffff_ffff) {
        return Err(format!("port {port:#x} reads {byte:#x} and {long:#x}"));
    }
    for (kind, function) in device::find(guest.pci) {
        if device::role(kind).is_none() {
            continue;
        }
        let device = Device::open(kind, function)?;
        // A register that holds what is written to it, while it answers.
        device.common.write(DEVICE_FEATURE_SELECT, 1u32);
        let on: u32 = device.common.read(DEVICE_FEATURE_SELECT);
        device.function.enable(false);
        let off: u32 = device.common.read(DEVICE_FEATURE_SELECT);
        device.function.enable(true);
        let name = &device.name;
        line!(
            "ports: {:#x} ({name}) reads {on:#x}, switched off {off:#x}",
            device.common.start
        );
        if (on, off == 1) != (1, false) {
            return Err(format!(
                "{name}: reads {on:#x} with memory decoding on and {off:#x} with it off"
            ));
        }
    }
    Ok(())
}

/// Prints the date and time.
///
/// # Errors
/// The clock never stops being updated, or shows no date.
pub fn date(_: &Guest) -> Result<(), String> {
    // Twice the same, so not read in the middle of an update.
    let values = irq::wait_until(crate::seconds(), || {
        let first = read_clock()?;
        (read_clock()? == first).then_some(first)
    })
    .map_err(|error| format!("rtc: the clock does not hold still: {error}"))?;
    let clock = clock::decode(values).ok_or_else(|| format!("rtc: no date: {values:x?}"))?;
    let Clock {
        year,
        month,
        day,
        hour,
        minute,
        second,
    } = clock;
    line!("rtc: {year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}");
    Ok(())
}

/// The clock's registers, unless it is being updated.
fn read_clock() -> Option<[u8; 8]> {
    (read_cmos(STATUS_A) & UPDATING == 0).then(|| clock::REGISTERS.map(read_cmos))
}

fn read_cmos(register: u8) -> u8 {
    port::write8(CMOS_INDEX, register);
    port::read8(CMOS_DATA)
}

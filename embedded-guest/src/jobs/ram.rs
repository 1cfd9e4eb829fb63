//! `ram`: all memory in the loader's map exists, and no two addresses are the same memory.

use super::Guest;
use crate::line;
use crate::memory::image;
use crate::memory::pages::{self, Kind};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;
use logic::pattern;

const MIB: u64 = 1 << 20;
/// Page 0 is left out, because a pointer to it is null.
const LOWEST: u64 = 4096;
/// Bytes at both ends of each range in which every page is tested.
const ENDS: u64 = MIB;
const END_STEP: u64 = 4096;
/// Distance of the tested words in between, in bytes.
const MIDDLE_STEP: u64 = 4 * MIB;
const SEED: u64 = 0x7261_6d21;

/// A tested word and its previous value.
struct Word {
    address: u64,
    old: u64,
}

/// Writes a different value to each tested word, reads all back, and restores them. So memory
/// that appears at two addresses is noticed.
///
/// # Errors
/// A word did not keep its value, or there is less or more memory than expected.
pub fn run(guest: &Guest) -> Result<(), String> {
    let mut found = 0;
    let mut words = Vec::new();
    for range in &guest.machine.ram {
        found += range.end - range.start;
        if range.end > 4 << 30 && pages::map(range.clone(), Kind::Ram) < range.end {
            return Err(format!(
                "ram: {:#x} is beyond what the guest can map",
                range.end
            ));
        }
        for address in places(range) {
            let old = read(address);
            write(address, pattern::word(SEED, address));
            words.push(Word { address, old });
        }
    }
    let wrong = words
        .iter()
        .find(|word| read(word.address) != pattern::word(SEED, word.address));
    let wrong = wrong.map(|word| (word.address, read(word.address)));
    // Backwards, in case a place was touched twice after all.
    for word in words.iter().rev() {
        write(word.address, word.old);
    }
    if let Some((address, value)) = wrong {
        return Err(format!(
            "ram: {address:#x} holds {value:#x} instead of what was written"
        ));
    }
    check_size(guest, found)?;
    line!(
        "ram: {} MiB ok, {} words in {} ranges",
        found.div_ceil(MIB),
        words.len(),
        guest.machine.ram.len()
    );
    Ok(())
}

/// Firmware reserves up to `tolerance-mib` (2).
fn check_size(guest: &Guest, found: u64) -> Result<(), String> {
    let expected = guest.options.number("expect-mib", 0)?;
    let tolerance = guest.options.number("tolerance-mib", 2)?;
    let low = expected.saturating_sub(tolerance).saturating_mul(MIB);
    if expected != 0 && !(low..=expected.saturating_mul(MIB)).contains(&found) {
        return Err(format!(
            "ram: {} KiB found, {expected} MiB expected",
            found >> 10
        ));
    }
    Ok(())
}

/// The addresses to test in a range, without those of the guest itself.
fn places(range: &Range<u64>) -> Vec<u64> {
    let start = range.start.max(LOWEST).next_multiple_of(END_STEP);
    let end = range.end & !(END_STEP - 1);
    let low_end = end.min(start + ENDS);
    let high_start = end.saturating_sub(ENDS).max(low_end);
    let mut places: Vec<u64> = (start..low_end).step_by(END_STEP as usize).collect();
    places.extend((low_end..high_start).step_by(MIDDLE_STEP as usize));
    places.extend((high_start..end).step_by(END_STEP as usize));
    // The very last word.
    places.extend((start < end).then(|| end - 8));
    let image = image();
    places.retain(|address| !image.contains(address));
    places
}

fn read(address: u64) -> u64 {
    // SAFETY: in RAM, aligned, mapped, and nothing of Rust's.
    unsafe { (address as *const u64).read_volatile() }
}

fn write(address: u64, value: u64) {
    // SAFETY: as in `read`; what was there is restored before anyone looks.
    unsafe { (address as *mut u64).write_volatile(value) }
}

//! Interrupt vectors, waiting for interrupts, and the local APIC's timer.
//!
//! Kernel-mode code only counts interrupts; see boot/interrupts.s. Comparing all 256 counters
//! shows an interrupt on an unused vector.

use crate::boot;
use crate::single::Single;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

// SAFETY: boot/interrupts.s defines them, with these types.
unsafe extern "C" {
    static irq_counts: [AtomicU64; 256];
    static irq_total: AtomicU64;
    static apic_id: AtomicU32;
    static x2apic: AtomicU8;
}

/// Vectors below are for exceptions and the timer.
const FIRST: u8 = 0x40;
/// The next is the spurious vector.
const LAST: u8 = 0xfe;
const TIMER: u8 = 0x30;

/// Offsets of local APIC registers (SDM 3A, table 12-1).
const LVT_TIMER: u32 = 0x320;
const INITIAL_COUNT: u32 = 0x380;
const DIVIDE: u32 = 0x3e0;
const LOCAL_APIC: u64 = 0xfee0_0000;
const X2APIC_MSRS: u32 = 0x800;
const IO_APIC: u64 = 0xfec0_0000;
const IO_APIC_TABLE: u32 = 0x10;
const PERIODIC: u32 = 1 << 17;
const MASKED: u32 = 1 << 16;
const DIVIDE_BY_1: u32 = 0xb;
/// KVM and QEMU run the timer at 1 GHz.
const TICK: u32 = 100_000_000;
/// Timer ticks in a second.
pub const TICKS_PER_SECOND: u64 = 10;

/// At least the frequency of any time stamp counter, so this many cycles are at least a
/// second.
const CYCLES_PER_SECOND: u64 = 5_000_000_000;

static OWNERS: Single<Vec<String>> = Single::new(Vec::new());
static SLEEP: AtomicBool = AtomicBool::new(true);

/// An interrupt vector with one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vector(u8);

impl Vector {
    /// Allocates a vector for `owner` (a name for messages).
    ///
    /// # Errors
    /// All are taken.
    pub fn new(owner: String) -> Result<Self, String> {
        let mut owners = OWNERS.borrow_mut();
        let number = usize::from(FIRST) + owners.len();
        if number > usize::from(LAST) {
            return Err(format!("{owner}: no interrupt vector left"));
        }
        owners.push(owner);
        Ok(Self(number as u8))
    }

    /// Its number.
    pub fn number(self) -> u8 {
        self.0
    }

    /// How often it was taken since start-up.
    pub fn count(self) -> u64 {
        count(self.0)
    }
}

fn count(vector: u8) -> u64 {
    // SAFETY: defined by boot/interrupts.s as 256 quadwords, changed by atomic-size
    // increments only.
    unsafe { irq_counts[usize::from(vector)].load(Ordering::Acquire) }
}

fn total() -> u64 {
    // SAFETY: as in `count`.
    unsafe { irq_total.load(Ordering::Acquire) }
}

/// Where a device must write a message so that this processor takes `vector`
/// (SDM 3A, 12.11): address and data.
pub fn message(vector: Vector) -> (u64, u32) {
    (
        LOCAL_APIC | u64::from(processor() & 0xff) << 12,
        u32::from(vector.0),
    )
}

/// The number of this processor's local APIC.
fn processor() -> u32 {
    // SAFETY: written by start-up code only.
    unsafe { apic_id.load(Ordering::Relaxed) }
}

/// Lets the I/O APIC turn ISA interrupt `line` into `vector`, on rising edges
/// (82093AA I/O APIC, 3.2).
pub fn route_isa(line: u8, vector: Vector) {
    let entry = IO_APIC_TABLE + 2 * u32::from(line);
    write_io_apic(entry + 1, processor() << 24);
    write_io_apic(entry, u32::from(vector.0));
}

fn write_io_apic(register: u32, value: u32) {
    // SAFETY: the I/O APIC's index and data registers, mapped in boot/tables.s.
    unsafe {
        (IO_APIC as *mut u32).write_volatile(register);
        ((IO_APIC + 0x10) as *mut u32).write_volatile(value);
    }
}

fn write_local_apic(register: u32, value: u32) {
    // SAFETY: the timer's registers only, mapped and open to user code in boot/tables.s.
    unsafe {
        if x2apic.load(Ordering::Relaxed) != 0 {
            boot::write_msr(X2APIC_MSRS + register / 16, value.into());
        } else {
            ((LOCAL_APIC + u64::from(register)) as *mut u32).write_volatile(value);
        }
    }
}

/// Starts the timer tick, by which sleepers check their deadline.
pub fn start_timer() {
    write_local_apic(DIVIDE, DIVIDE_BY_1);
    write_local_apic(LVT_TIMER, PERIODIC | u32::from(TIMER));
    write_local_apic(INITIAL_COUNT, TICK);
}

/// Stops the timer tick: from now on only devices interrupt.
pub fn stop_timer() {
    write_local_apic(INITIAL_COUNT, 0);
    write_local_apic(LVT_TIMER, MASKED | u32::from(TIMER));
}

/// Number of ticks so far.
pub fn ticks() -> u64 {
    count(TIMER)
}

/// Chooses how [`wait_until`] waits: asleep in `hlt`, or spinning.
pub fn wait_asleep(asleep: bool) {
    SLEEP.store(asleep, Ordering::Relaxed);
}

/// Waits once: until the number of interrupts differs from `seen`, or a short time.
fn pause(seen: u64) {
    if SLEEP.load(Ordering::Relaxed) {
        boot::sleep(seen);
    } else {
        core::hint::spin_loop();
    }
}

/// Sleeps until the next interrupt, however long it takes.
pub fn halt() {
    boot::sleep(total());
}

/// Cycles of the time stamp counter.
pub fn cycles() -> u64 {
    // SAFETY: the counter is there on every x86-64 processor.
    unsafe { _rdtsc() }
}

/// A time after which waiting ends with an error.
pub struct Deadline(u64);

impl Deadline {
    /// In `seconds` at the earliest.
    pub fn after(seconds: u64) -> Self {
        Self(cycles().saturating_add(seconds.saturating_mul(CYCLES_PER_SECOND)))
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        cycles() > self.0
    }
}

/// Waits until `ready` returns a value; calls it again after every interrupt.
///
/// # Errors
/// It returned none within `seconds`.
pub fn wait_until<T>(seconds: u64, mut ready: impl FnMut() -> Option<T>) -> Result<T, String> {
    let deadline = Deadline::after(seconds);
    loop {
        let seen = total();
        // What was written before must be out before `ready` looks.
        fence(Ordering::SeqCst);
        if let Some(found) = ready() {
            return Ok(found);
        }
        if deadline.is_over() {
            return Err(format!("nothing in {seconds} s"));
        }
        pause(seen);
    }
}

/// Waits without a deadline until `ready` returns true; calls it again after every interrupt.
pub fn wait_for_ever(mut ready: impl FnMut() -> bool) {
    loop {
        let seen = total();
        fence(Ordering::SeqCst);
        if ready() {
            return;
        }
        pause(seen);
    }
}

/// The interrupt counters at one moment.
pub struct Snapshot([u64; 256]);

impl Snapshot {
    /// As they are now.
    pub fn take() -> Self {
        let mut counts = [0; 256];
        for vector in 0..=255 {
            counts[usize::from(vector)] = count(vector);
        }
        Self(counts)
    }

    /// Checks that since then only `expected` vectors and the timer were taken.
    ///
    /// # Errors
    /// Says which others were, and whose they are.
    pub fn only(&self, expected: &[Vector]) -> Result<(), String> {
        for vector in 0..=255u8 {
            let more = count(vector) - self.0[usize::from(vector)];
            if more == 0 || vector == TIMER || expected.contains(&Vector(vector)) {
                continue;
            }
            let owners = OWNERS.borrow();
            let owner = vector
                .checked_sub(FIRST)
                .and_then(|index| owners.get(usize::from(index)))
                .map_or("no device", |name| name);
            return Err(format!(
                "{more} interrupts on vector {vector}, which is for {owner}"
            ));
        }
        Ok(())
    }
}

//! The real-time clock: an MC146818 at 0x70/0x71 with 128 bytes of CMOS RAM. It has the
//! host's time of day in UTC.
//!
//! Setting the time has no effect. There are no interrupts (alarm, periodic, update), so
//! line 8 is never raised; the alarm registers keep what is written. An update takes no
//! time, so UIP always reads as 0; a driver reads twice in case an update falls in between.

use std::time::{Duration, SystemTime};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Selects a register.
pub const INDEX_PORT: u16 = 0x70;
/// Reads or writes it.
pub const DATA_PORT: u16 = 0x71;

const SIZE: usize = 128;

const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Register of the century on PCs.
const CENTURY: u8 = 0x32;

/// Update in progress.
const A_UIP: u8 = 1 << 7;
/// Register A: oscillator at 32,768 Hz, with the rate that firmware sets.
const A_DEFAULT: u8 = 0x26;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
/// Periodic, alarm and update interrupts.
const B_INTERRUPTS: u8 = 0b111 << 4;
/// Register D: RAM and time are valid.
const D_VALID: u8 = 1 << 7;
const PM: u8 = 1 << 7;

/// Registers of the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Rtc {
    index: u8,
    reserved: [u8; 7],
    bytes: [u8; SIZE],
}

impl Rtc {
    /// State with a new battery.
    pub fn power_on() -> Self {
        let mut bytes = [0; SIZE];
        bytes[usize::from(STATUS_A)] = A_DEFAULT;
        bytes[usize::from(STATUS_B)] = B_24_HOURS;
        Rtc {
            index: 0,
            reserved: [0; 7],
            bytes,
        }
    }

    /// Resets the clock: disables interrupts. The battery keeps all other registers.
    pub fn reset(&mut self) {
        self.index = 0;
        self.bytes[usize::from(STATUS_B)] &= !B_INTERRUPTS;
    }

    /// Selects a register. Bit 7 masks NMIs; there are none.
    pub fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// Reads the selected register at the time `now`.
    pub fn read(&self, now: SystemTime) -> u8 {
        let register = self.index & 0x7f;
        let kept = self.bytes[usize::from(register)];
        match register {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                self.time(register, now)
            }
            STATUS_A => kept & !A_UIP,
            STATUS_C => 0,
            STATUS_D => D_VALID,
            _ => kept,
        }
    }

    /// Writes the selected register.
    pub fn write(&mut self, value: u8) {
        self.bytes[usize::from(self.index & 0x7f)] = value;
    }

    fn time(&self, register: u8, now: SystemTime) -> u8 {
        let since = now.duration_since(SystemTime::UNIX_EPOCH);
        let seconds = since.unwrap_or(Duration::ZERO).as_secs();
        let (days, seconds) = (seconds / 86_400, seconds % 86_400);
        let (year, month, day) = date(days);
        let hour = seconds / 3600;
        let status_b = self.bytes[usize::from(STATUS_B)];
        let value = match register {
            SECONDS => seconds % 60,
            MINUTES => seconds / 60 % 60,
            HOURS if status_b & B_24_HOURS == 0 => (hour + 11) % 12 + 1,
            HOURS => hour,
            // Sunday is 1; 1 January 1970 was a Thursday.
            WEEKDAY => (days + 4) % 7 + 1,
            DAY => day,
            MONTH => month,
            YEAR => year % 100,
            _ => year / 100 % 100,
        } as u8;
        let value = if status_b & B_BINARY == 0 {
            ((value / 10) << 4) | (value % 10)
        } else {
            value
        };
        let afternoon = register == HOURS && status_b & B_24_HOURS == 0 && hour >= 12;
        if afternoon { value | PM } else { value }
    }
}

/// Year, month (from 1) and day of the month (from 1) in the Gregorian calendar, `days` days
/// after 1 January 1970.
fn date(days: u64) -> (u64, u64, u64) {
    /// Days in 400, 100 and 4 years.
    const CYCLE: u64 = 146_097;
    const CENTURY: u64 = 36_524;
    const LEAP: u64 = 1_461;
    /// Days from 1 March 1600 to 1 January 1970. Years start in March here, so that a leap
    /// day is the last day of its year and cycle.
    const OFFSET: u64 = 135_080;

    let days = days + OFFSET;
    let (cycles, days) = (days / CYCLE, days % CYCLE);
    let centuries = (days / CENTURY).min(3);
    let days = days - centuries * CENTURY;
    let (leaps, days) = (days / LEAP, days % LEAP);
    let years = (days / 365).min(3);
    let mut day = days - years * 365;
    let mut year = 1600 + cycles * 400 + centuries * 100 + leaps * 4 + years;
    let mut month = 3;
    for length in [31, 30, 31, 30, 31, 31, 30, 31, 30, 31, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    if month > 12 {
        month -= 12;
        year += 1;
    }
    (year, month, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn read(rtc: &mut Rtc, register: u8, seconds: u64) -> u8 {
        rtc.select(register);
        rtc.read(at(seconds))
    }

    #[test]
    fn dates_are_right_around_leap_days() {
        // From date(1): `date -u -d DATE +%s`, divided by 86,400.
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (11_015, (2000, 2, 28)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (11_322, (2000, 12, 31)),
            (11_323, (2001, 1, 1)),
            (19_782, (2024, 2, 29)),
            (20_781, (2026, 11, 24)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(date(days), expected, "day {days}");
        }
    }

    #[test]
    fn every_day_of_centuries_follows_the_one_before() {
        let mut previous = date(0);
        for days in 1..150_000 {
            let (year, month, day) = date(days);
            let next_month = (previous.0 + previous.1 / 12, previous.1 % 12 + 1, 1);
            let next_day = (previous.0, previous.1, previous.2 + 1);
            assert!([next_day, next_month].contains(&(year, month, day)));
            previous = (year, month, day);
        }
        // `date -u -d @$((149999 * 86400))`.
        assert_eq!(previous, (2380, 9, 7));
    }

    #[test]
    fn formats_follow_status_b() {
        // 2026-11-24 15:59:07 UTC, a Tuesday.
        let now = 20_781 * 86_400 + 15 * 3600 + 59 * 60 + 7;
        let mut rtc = Rtc::power_on();
        let registers = [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS];
        let all = |rtc: &mut Rtc| registers.map(|register| read(rtc, register, now));
        assert_eq!(all(&mut rtc), [0x20, 0x26, 0x11, 0x24, 3, 0x15, 0x59, 0x07]);
        rtc.select(STATUS_B);
        rtc.write(B_BINARY | B_24_HOURS);
        assert_eq!(all(&mut rtc), [20, 26, 11, 24, 3, 15, 59, 7]);
        rtc.select(STATUS_B);
        rtc.write(0);
        assert_eq!(read(&mut rtc, HOURS, now), 0x03 | PM);
        let midnight = 20_781 * 86_400;
        assert_eq!(read(&mut rtc, HOURS, midnight), 0x12);
        assert_eq!(read(&mut rtc, HOURS, midnight + 12 * 3600), 0x12 | PM);
    }

    #[test]
    fn status_registers_and_ram_read_as_they_should() {
        let mut rtc = Rtc::power_on();
        rtc.select(STATUS_A);
        rtc.write(0xff);
        assert_eq!(read(&mut rtc, STATUS_A, 0), 0x7f);
        assert_eq!(read(&mut rtc, STATUS_C, 0), 0);
        assert_eq!(read(&mut rtc, STATUS_D, 0), D_VALID);
        rtc.select(0x7f | 0x80);
        rtc.write(0xa5);
        rtc.reset();
        assert_eq!(read(&mut rtc, 0x7f, 0), 0xa5);
    }
}

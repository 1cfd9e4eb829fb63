//! The date and time in the registers of an MC146818.

/// Register numbers to read, in the order that [`decode`] takes them: seconds,
/// minutes, hours, day, month, year, century, status B.
pub const REGISTERS: [u8; 8] = [0x00, 0x02, 0x04, 0x07, 0x08, 0x09, 0x32, 0x0b];

const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
const AFTERNOON: u8 = 0x80;

/// A date and time of day.
#[derive(Debug, PartialEq, Eq)]
pub struct Clock {
    /// With the century.
    pub year: u16,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 60.
    pub second: u8,
}

/// Makes sense of the values of [`REGISTERS`]; `None` if they are no date and time. A
/// century register that holds nothing sensible means the 21st.
pub fn decode(values: [u8; 8]) -> Option<Clock> {
    let [second, minute, hour, day, month, year, century, mode] = values;
    let number = |value: u8| match mode & BINARY {
        0 if value & 0x0f < 10 && value < 0xa0 => Some(value / 16 * 10 + value % 16),
        0 => None,
        _ => Some(value),
    };
    let hour = match mode & HOURS_24 {
        0 => number(hour & !AFTERNOON)? % 12 + if hour & AFTERNOON == 0 { 0 } else { 12 },
        _ => number(hour)?,
    };
    let century = number(century)
        .filter(|century| (19..=21).contains(century))
        .unwrap_or(20);
    let clock = Clock {
        year: u16::from(century) * 100 + u16::from(number(year)?),
        month: number(month)?,
        day: number(day)?,
        hour,
        minute: number(minute)?,
        second: number(second)?,
    };
    let valid = (1..=12).contains(&clock.month)
        && (1..=31).contains(&clock.day)
        && clock.hour < 24
        && clock.minute < 60
        && clock.second <= 60;
    valid.then_some(clock)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENING: Clock = Clock {
        year: 2026,
        month: 11,
        day: 24,
        hour: 21,
        minute: 5,
        second: 59,
    };

    #[test]
    fn all_four_modes() {
        assert_eq!(
            decode([0x59, 0x05, 0x21, 0x24, 0x11, 0x26, 0x20, 2]),
            Some(EVENING)
        );
        assert_eq!(
            decode([0x59, 0x05, 0x89, 0x24, 0x11, 0x26, 0x20, 0]),
            Some(EVENING)
        );
        assert_eq!(decode([59, 5, 21, 24, 11, 26, 20, 6]), Some(EVENING));
        assert_eq!(decode([59, 5, 0x89, 24, 11, 26, 20, 4]), Some(EVENING));
    }

    #[test]
    fn twelve_o_clock_and_a_missing_century() {
        let hour =
            |hour| decode([0, 0, hour, 1, 1, 0x26, 0xff, 0]).map(|clock| (clock.year, clock.hour));
        assert_eq!(hour(0x12), Some((2026, 0)));
        assert_eq!(hour(0x92), Some((2026, 12)));
    }

    #[test]
    fn no_date() {
        assert_eq!(decode([0xff; 8]), None);
        assert_eq!(decode([0x5a, 0x05, 0x21, 0x24, 0x11, 0x26, 0x20, 2]), None);
        assert_eq!(decode([0x59, 0x05, 0x21, 0x24, 0x13, 0x26, 0x20, 2]), None);
    }
}

//! Durations measured one by one.

use alloc::vec::Vec;

/// Number of durations that are kept; the rest is only counted.
const MOST: usize = 1 << 15;

/// Measured durations, in any unit.
#[derive(Default)]
pub struct Times {
    kept: Vec<u32>,
    count: u64,
    sum: u64,
}

impl Times {
    /// Adds one.
    pub fn add(&mut self, duration: u64) {
        self.count += 1;
        self.sum += duration;
        if self.kept.len() < MOST {
            self.kept.push(u32::try_from(duration).unwrap_or(u32::MAX));
        }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their mean, and the least and the median of those kept; `None` without any.
    pub fn summary(mut self) -> Option<(u64, u32, u32)> {
        self.kept.sort_unstable();
        let least = *self.kept.first()?;
        Some((self.sum / self.count, least, self.kept[self.kept.len() / 2]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_least_and_median() {
        let mut times = Times::default();
        [9, 1, 5, 2, 1 << 40]
            .into_iter()
            .for_each(|time| times.add(time));
        assert_eq!(times.count(), 5);
        assert_eq!(times.summary(), Some(((17 + (1 << 40)) / 5, 1, 5)));
        assert_eq!(Times::default().summary(), None);
    }
}

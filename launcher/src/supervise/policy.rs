//! When a process that has ended is started again.

use std::collections::VecDeque;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use crate::config::Restart;

/// The wait before the second start in a row; it doubles with each one.
const FIRST: Duration = Duration::from_millis(100);
/// The longest wait.
const LONGEST: Duration = Duration::from_secs(5);
/// Who ran for so long ran well: the next start is at once again.
const WELL: Duration = Duration::from_secs(10);
/// So many starts ...
pub const STARTS: usize = 10;
/// ... within this time are enough.
pub const WITHIN: Duration = Duration::from_secs(60);

impl Restart {
    /// Whether a process that ended so is to be started again.
    pub fn wants(self, status: ExitStatus) -> bool {
        match self {
            Restart::Always => true,
            Restart::OnFailure => !status.success(),
            Restart::Never => false,
        }
    }
}

/// The starts of one device's processes.
#[derive(Default)]
pub struct History {
    /// When processes were started again, of late.
    again: VecDeque<Instant>,
    /// Starts in a row, of processes that did not run well.
    row: u32,
}

impl History {
    /// A process that had been started at `started` ended at `now`: how long to wait
    /// before the next start; `None`: there were too many.
    pub fn wait(&mut self, started: Instant, now: Instant) -> Option<Duration> {
        while let Some(&first) = self.again.front()
            && now.saturating_duration_since(first) >= WITHIN
        {
            self.again.pop_front();
        }
        if self.again.len() >= STARTS {
            return None;
        }
        if now.saturating_duration_since(started) >= WELL {
            self.row = 0;
        }
        let wait = match self.row {
            0 => Duration::ZERO,
            row => FIRST.saturating_mul(1 << (row - 1).min(16)).min(LONGEST),
        };
        self.row += 1;
        self.again.push_back(now + wait);
        Some(wait)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn at_once_then_slower_then_no_more() {
        let mut history = History::default();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        while let Some(wait) = history.wait(now, now) {
            waits.push(wait.as_millis());
            now += wait;
        }
        assert_eq!(waits, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        // A minute later there may be another.
        assert_eq!(history.wait(now, now + WITHIN), Some(Duration::ZERO));
    }

    #[test]
    fn who_ran_well_comes_back_at_once() {
        let mut history = History::default();
        let mut now = Instant::now();
        for _ in 0..3 {
            assert_eq!(history.wait(now, now + WELL), Some(Duration::ZERO));
            now += WELL;
        }
        assert_eq!(history.wait(now, now), Some(FIRST));
        assert_eq!(history.wait(now, now), Some(2 * FIRST));
        assert_eq!(history.wait(now, now + WELL), Some(Duration::ZERO));
    }

    #[test]
    fn who_is_killed_now_and_then_is_never_given_up() {
        let mut history = History::default();
        let mut now = Instant::now();
        for _ in 0..100 {
            let started = now;
            now += WITHIN / STARTS as u32;
            let wait = history.wait(started, now).unwrap();
            now += wait;
        }
    }

    #[test]
    fn what_counts_as_a_failure() {
        let (ok, failed, killed) = (
            ExitStatus::from_raw(0),
            ExitStatus::from_raw(1 << 8),
            ExitStatus::from_raw(9),
        );
        for (policy, wanted) in [
            (Restart::Always, [true, true, true]),
            (Restart::OnFailure, [false, true, true]),
            (Restart::Never, [false, false, false]),
        ] {
            assert_eq!([ok, failed, killed].map(|it| policy.wants(it)), wanted);
        }
    }
}

//! Whether, and after which delay, a process that has ended is started again.

use std::collections::VecDeque;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use crate::config::RestartPolicy;

/// The delay before the second restart in a row. It doubles with each further one.
const FIRST_DELAY: Duration = Duration::from_millis(100);
/// The longest delay.
const MAX_DELAY: Duration = Duration::from_secs(5);
/// After a process has run for this long, the next restart has no delay again.
const STABLE: Duration = Duration::from_secs(10);
/// The device is given up after this many restarts ...
pub const MAX_RESTARTS: usize = 10;
/// ... within this time.
pub const RESTART_WINDOW: Duration = Duration::from_secs(60);

impl RestartPolicy {
    /// Whether a process that ended with `status` is started again.
    pub fn applies_to(self, status: ExitStatus) -> bool {
        match self {
            RestartPolicy::Always => true,
            RestartPolicy::OnFailure => !status.success(),
            RestartPolicy::Never => false,
        }
    }
}

/// The recent restarts of a device.
#[derive(Default)]
pub struct RestartHistory {
    /// The times of the restarts within the last [`RESTART_WINDOW`].
    restarts: VecDeque<Instant>,
    /// Restarts in a row of processes that ended before they had run for [`STABLE`].
    in_a_row: u32,
}

impl RestartHistory {
    /// Records that a process which was started at `started` ended at `now`. Returns the delay
    /// before its restart, or `None` after too many restarts.
    pub fn next_delay(&mut self, started: Instant, now: Instant) -> Option<Duration> {
        while let Some(&first) = self.restarts.front()
            && now.saturating_duration_since(first) >= RESTART_WINDOW
        {
            self.restarts.pop_front();
        }
        if self.restarts.len() >= MAX_RESTARTS {
            return None;
        }
        if now.saturating_duration_since(started) >= STABLE {
            self.in_a_row = 0;
        }
        let delay = match self.in_a_row {
            0 => Duration::ZERO,
            count => FIRST_DELAY
                .saturating_mul(1 << (count - 1).min(16))
                .min(MAX_DELAY),
        };
        self.in_a_row += 1;
        self.restarts.push_back(now + delay);
        Some(delay)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn delays_grow_until_the_device_is_given_up() {
        let mut history = RestartHistory::default();
        let mut now = Instant::now();
        let mut delays = Vec::new();
        while let Some(delay) = history.next_delay(now, now) {
            delays.push(delay.as_millis());
            now += delay;
        }
        assert_eq!(
            delays,
            [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]
        );
        // After the window there may be another.
        assert_eq!(
            history.next_delay(now, now + RESTART_WINDOW),
            Some(Duration::ZERO)
        );
    }

    #[test]
    fn after_a_stable_run_there_is_no_delay() {
        let mut history = RestartHistory::default();
        let mut now = Instant::now();
        for _ in 0..3 {
            assert_eq!(history.next_delay(now, now + STABLE), Some(Duration::ZERO));
            now += STABLE;
        }
        assert_eq!(history.next_delay(now, now), Some(FIRST_DELAY));
        assert_eq!(history.next_delay(now, now), Some(2 * FIRST_DELAY));
        assert_eq!(history.next_delay(now, now + STABLE), Some(Duration::ZERO));
    }

    #[test]
    fn a_process_that_is_killed_now_and_then_is_always_restarted() {
        let mut history = RestartHistory::default();
        let mut now = Instant::now();
        for _ in 0..100 {
            let started = now;
            now += RESTART_WINDOW / MAX_RESTARTS as u32;
            let delay = history.next_delay(started, now).unwrap();
            now += delay;
        }
    }

    #[test]
    fn the_policy_decides_by_the_exit_status() {
        let (ok, failed, killed) = (
            ExitStatus::from_raw(0),
            ExitStatus::from_raw(1 << 8),
            ExitStatus::from_raw(9),
        );
        for (policy, expected) in [
            (RestartPolicy::Always, [true, true, true]),
            (RestartPolicy::OnFailure, [false, true, true]),
            (RestartPolicy::Never, [false, false, false]),
        ] {
            assert_eq!(
                [ok, failed, killed].map(|it| policy.applies_to(it)),
                expected
            );
        }
    }
}

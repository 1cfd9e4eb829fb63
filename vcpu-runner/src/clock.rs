//! Deadlines as timeouts for poll(2).

use std::time::Instant;

use rustix::event::Timespec;

/// The time from now until `at`; 0 when that has passed.
pub fn until(at: Instant) -> Timespec {
    let left = at.saturating_duration_since(Instant::now());
    // Fails only for times that are too far away to come.
    Timespec::try_from(left).unwrap_or(Timespec {
        tv_sec: i64::MAX,
        tv_nsec: 0,
    })
}

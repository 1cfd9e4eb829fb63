//! Deadlines in the form that poll(2) takes.

use std::time::Instant;

use rustix::event::Timespec;

/// The time from now until `at`: 0 when that is past.
pub fn until(at: Instant) -> Timespec {
    let left = at.saturating_duration_since(Instant::now());
    // Fails only for times that never come.
    Timespec::try_from(left).unwrap_or(Timespec {
        tv_sec: i64::MAX,
        tv_nsec: 0,
    })
}

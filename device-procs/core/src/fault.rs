//! Points at which a process may be made to die, for tests of what is left behind.
//!
//! A point is armed by [`arm`] and by nothing else: no option, no variable of the
//! environment, no message. The programs do not call it, so they cannot be made to
//! die by it; the tests have programs of their own that do. Not armed, a point is one
//! relaxed load.

use std::sync::atomic::{AtomicU32, Ordering};

/// Where a process may die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultPoint {
    /// A message of this number is there and not yet handled.
    Message(u32),
    /// A request is taken from the ring, and nothing is done of it.
    Popped,
    /// Data have been moved; the used element is not written.
    Done,
    /// The used elements of a batch are written; the used index is not.
    Written,
    /// The used index is written; the inflight table still has the requests.
    Published,
    /// The inflight table has the requests no longer; its used index is the old one.
    Cleared,
    /// All is written; the interrupt is not sent.
    Interrupt,
}

/// Messages by their names (vhost-user, "Front-end message types").
const MESSAGES: &[(&str, u32)] = &[
    ("GET_FEATURES", 1),
    ("SET_FEATURES", 2),
    ("SET_OWNER", 3),
    ("SET_MEM_TABLE", 5),
    ("SET_VRING_NUM", 8),
    ("SET_VRING_ADDR", 9),
    ("SET_VRING_BASE", 10),
    ("GET_VRING_BASE", 11),
    ("SET_VRING_KICK", 12),
    ("SET_VRING_CALL", 13),
    ("SET_VRING_ERR", 14),
    ("GET_PROTOCOL_FEATURES", 15),
    ("SET_PROTOCOL_FEATURES", 16),
    ("GET_QUEUE_NUM", 17),
    ("SET_VRING_ENABLE", 18),
    ("SET_BACKEND_REQ_FD", 21),
    ("GET_CONFIG", 24),
    ("SET_CONFIG", 25),
    ("GET_INFLIGHT_FD", 31),
    ("SET_INFLIGHT_FD", 32),
    ("GET_MAX_MEM_SLOTS", 36),
    ("ADD_MEM_REG", 37),
    ("REM_MEM_REG", 38),
];

/// The other points by their names.
const STEPS: &[(&str, FaultPoint)] = &[
    ("popped", FaultPoint::Popped),
    ("done", FaultPoint::Done),
    ("written", FaultPoint::Written),
    ("published", FaultPoint::Published),
    ("cleared", FaultPoint::Cleared),
    ("interrupt", FaultPoint::Interrupt),
];

/// Code of the armed point, or 0.
static ARMED: AtomicU32 = AtomicU32::new(0);
/// It is passed so many times more before the process dies.
static LEFT: AtomicU32 = AtomicU32::new(0);

/// Exit status of a process that died at a point.
pub const STATUS: i32 = 86;

impl FaultPoint {
    /// A number that no other point has; never 0.
    const fn code(self) -> u32 {
        match self {
            FaultPoint::Popped => 1,
            FaultPoint::Done => 2,
            FaultPoint::Written => 3,
            FaultPoint::Published => 4,
            FaultPoint::Cleared => 5,
            FaultPoint::Interrupt => 6,
            FaultPoint::Message(request) => 0x8000_0000 | request,
        }
    }

    /// The point of this name: that of a message, or of a step.
    fn named(name: &str) -> Option<FaultPoint> {
        let message = MESSAGES.iter().find(|(known, _)| *known == name);
        let step = STEPS.iter().find(|(known, _)| *known == name);
        message
            .map(|&(_, request)| FaultPoint::Message(request))
            .or(step.map(|&(_, point)| point))
    }
}

/// Names of all points.
pub fn names() -> impl Iterator<Item = &'static str> {
    let messages = MESSAGES.iter().map(|(name, _)| *name);
    messages.chain(STEPS.iter().map(|(name, _)| *name))
}

/// Makes the process die the `nth` time (from 1 on) that it comes to the point `name`,
/// at once and without cleaning up, as SIGKILL would do. One point can be armed.
///
/// # Errors
/// When there is no such point, or no such time.
pub fn arm(name: &str, nth: u32) -> Result<(), String> {
    let point = FaultPoint::named(name).ok_or_else(|| format!("no point is called {name:?}"))?;
    let left = nth.checked_sub(1).ok_or("times count from 1 on")?;
    LEFT.store(left, Ordering::Relaxed);
    ARMED.store(point.code(), Ordering::Release);
    Ok(())
}

/// The process is at `point`.
#[inline]
pub(crate) fn hit(point: FaultPoint) {
    step();
    if ARMED.load(Ordering::Relaxed) == point.code() {
        reached();
    }
}

#[cold]
fn reached() {
    if LEFT.fetch_sub(1, Ordering::AcqRel) == 0 {
        // SAFETY: takes no memory and returns nothing; no destructor is to run.
        unsafe { libc::_exit(STATUS) }
    }
}

/// Between two stores of which the second may be missing. Only this crate's own tests
/// stop here.
#[inline(always)]
pub(crate) fn step() {
    #[cfg(test)]
    crate::testing::stepped();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_have_names_and_codes_of_their_own() {
        let mut codes: Vec<u32> = names()
            .map(|it| FaultPoint::named(it).unwrap().code())
            .collect();
        let count = codes.len();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), count);
        assert!(!codes.contains(&0));
        assert!(arm("nowhere", 1).is_err());
        assert!(arm("popped", 0).is_err());
    }
}

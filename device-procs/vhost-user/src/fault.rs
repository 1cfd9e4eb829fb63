//! Fault points: places at which a test can make the process die, to see whether the next
//! process resumes correctly.
//!
//! Only [`arm`] arms a point: there is no option, environment variable or message for it.
//! The device programs do not call it; the tests have programs of their own that do. A
//! point that is not armed costs one relaxed load.

use std::sync::atomic::{AtomicU32, Ordering};

/// Where a process may die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultPoint {
    /// A message with this request number has arrived and is not handled yet.
    Message(u32),
    /// A request is popped and nothing else is done.
    Popped,
    /// The data of a request are transferred; its used element is not written.
    Done,
    /// The used elements of a batch are written; the used index is not.
    Written,
    /// The used index is written; the in-flight table still contains the requests.
    Published,
    /// The requests are removed from the in-flight table; its used index is the old one.
    Cleared,
    /// Everything is written; the interrupt is not sent.
    Interrupt,
}

/// Request numbers by name (vhost-user, "Front-end message types").
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

/// The other points by name.
const STEPS: &[(&str, FaultPoint)] = &[
    ("popped", FaultPoint::Popped),
    ("done", FaultPoint::Done),
    ("written", FaultPoint::Written),
    ("published", FaultPoint::Published),
    ("cleared", FaultPoint::Cleared),
    ("interrupt", FaultPoint::Interrupt),
];

/// Code of the armed point; 0 if none is armed.
static ARMED: AtomicU32 = AtomicU32::new(0);
/// How many more times the process passes the armed point before it dies.
static LEFT: AtomicU32 = AtomicU32::new(0);

/// Exit status of a process that died at a fault point.
pub const STATUS: i32 = 86;

impl FaultPoint {
    /// A number that identifies the point; never 0.
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

    /// The point of this name.
    fn by_name(name: &str) -> Option<FaultPoint> {
        let message = MESSAGES.iter().find(|(known, _)| *known == name);
        let step = STEPS.iter().find(|(known, _)| *known == name);
        message
            .map(|&(_, request)| FaultPoint::Message(request))
            .or(step.map(|&(_, point)| point))
    }
}

/// The names of all fault points.
pub fn names() -> impl Iterator<Item = &'static str> {
    let messages = MESSAGES.iter().map(|(name, _)| *name);
    messages.chain(STEPS.iter().map(|(name, _)| *name))
}

/// Makes the process die the `nth` time (counted from 1) that it reaches the point `name`,
/// at once and without cleaning up, as SIGKILL would do. Only one point can be armed.
///
/// # Errors
/// There is no point of this name, or `nth` is 0.
pub fn arm(name: &str, nth: u32) -> Result<(), String> {
    let point =
        FaultPoint::by_name(name).ok_or_else(|| format!("there is no fault point {name:?}"))?;
    let left = nth.checked_sub(1).ok_or("the count begins with 1")?;
    LEFT.store(left, Ordering::Relaxed);
    ARMED.store(point.code(), Ordering::Release);
    Ok(())
}

/// The process has reached `point`.
#[inline]
pub(crate) fn hit(point: FaultPoint) {
    step();
    if ARMED.load(Ordering::Relaxed) == point.code() {
        hit_armed();
    }
}

#[cold]
fn hit_armed() {
    if LEFT.fetch_sub(1, Ordering::AcqRel) == 0 {
        // SAFETY: _exit has no preconditions. Destructors must not run, as after SIGKILL.
        unsafe { libc::_exit(STATUS) }
    }
}

/// Called before a store that may be the first one missing after a death. Only the unit
/// tests of this crate die here.
#[inline(always)]
pub(crate) fn step() {
    #[cfg(test)]
    crate::testing::step();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_of_points_are_unique() {
        let mut codes: Vec<u32> = names()
            .map(|it| FaultPoint::by_name(it).unwrap().code())
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

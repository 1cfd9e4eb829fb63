//! When to go on looking for requests and when to sleep.
//!
//! Being woken costs more than a request, so after a request the process looks for
//! the next one for a moment. That pays only while the vCPU runs on another
//! processor. On the same one it can't go on before we sleep, and waking each
//! other is then by far the quicker way. So looking must earn its keep: while it
//! does not, the process sleeps at once, and tries again now and then.

use std::time::{Duration, Instant};

/// For how long it looks after the last request. Less than a vCPU waits before
/// it sleeps: a request found later is one that we kept from being made.
const LOOK: Duration = Duration::from_micros(50);
/// What looking for nothing costs, in requests found.
const MISS: u32 = 4;
/// How much of what was found can be saved up.
const CREDIT: u32 = 2 * MISS;
/// A sleep that looking would have saved, the time to wake up included.
const NAP: Duration = Duration::from_micros(120);
/// After so many of these it tries to look again.
const NAPS: u32 = 32;
/// However busy, everything else is seen to this often.
const LOOK_AROUND: Duration = Duration::from_millis(1);
/// Requests, or looks for one, between two looks at the clock.
const STRIDE: u32 = 16;

/// What to do when there is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Look for a request again.
    Look,
    /// See to everything else, and come back.
    LookAround,
    /// Sleep until something happens.
    Sleep,
}

/// The measure.
pub struct Pace {
    /// It looks while this is not zero.
    credit: u32,
    naps: u32,
    count: u32,
    /// Since when there has been no request.
    quiet: Option<Instant>,
    looked_around: Instant,
}

impl Pace {
    /// Starts by looking.
    pub fn new() -> Self {
        Pace {
            credit: CREDIT,
            naps: 0,
            count: 0,
            quiet: None,
            looked_around: Instant::now(),
        }
    }

    /// A request was carried out; true when it is time to look around.
    pub fn worked(&mut self) -> bool {
        if let Some(since) = self.quiet.take() {
            self.looked(since.elapsed() <= LOOK);
        }
        self.count = self.count.wrapping_add(1);
        self.count.is_multiple_of(STRIDE) && self.is_time(Instant::now())
    }

    /// There is no request.
    pub fn idle(&mut self) -> Next {
        if self.credit == 0 {
            return Next::Sleep;
        }
        let Some(since) = self.quiet else {
            self.quiet = Some(Instant::now());
            return Next::Look;
        };
        self.count = self.count.wrapping_add(1);
        if !self.count.is_multiple_of(STRIDE) {
            return Next::Look;
        }
        let now = Instant::now();
        if now - since > LOOK {
            self.quiet = None;
            self.looked(false);
            Next::Sleep
        } else if self.is_time(now) {
            Next::LookAround
        } else {
            Next::Look
        }
    }

    /// It has slept for this time.
    pub fn slept(&mut self, time: Duration) {
        if self.credit > 0 || time > NAP {
            return;
        }
        self.naps += 1;
        if self.naps == NAPS {
            self.naps = 0;
            self.credit = 1;
        }
    }

    fn looked(&mut self, found: bool) {
        self.credit = if found {
            (self.credit + 1).min(CREDIT)
        } else {
            self.credit.saturating_sub(MISS)
        };
    }

    fn is_time(&mut self, now: Instant) -> bool {
        let due = now - self.looked_around >= LOOK_AROUND;
        if due {
            self.looked_around = now;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look_for_nothing(pace: &mut Pace) {
        let start = Instant::now();
        while pace.idle() != Next::Sleep {
            assert!(start.elapsed() < Duration::from_secs(10));
        }
    }

    #[test]
    fn looking_for_nothing_ends_and_is_tried_again_after_naps() {
        let mut pace = Pace::new();
        for _ in 0..CREDIT / MISS {
            assert_eq!(pace.idle(), Next::Look);
            look_for_nothing(&mut pace);
        }
        assert_eq!(pace.idle(), Next::Sleep);
        for _ in 0..2 * NAPS {
            pace.slept(Duration::from_secs(1));
        }
        assert_eq!(pace.idle(), Next::Sleep);
        for _ in 0..NAPS {
            pace.slept(Duration::from_micros(20));
        }
        assert_eq!(pace.idle(), Next::Look);
        // One miss is enough then ...
        look_for_nothing(&mut pace);
        assert_eq!(pace.idle(), Next::Sleep);
        // ... unless much was found before.
        for _ in 0..=MISS {
            pace.looked(true);
        }
        assert_eq!(pace.idle(), Next::Look);
        look_for_nothing(&mut pace);
        assert_eq!(pace.idle(), Next::Look);
    }

    #[test]
    fn it_looks_around_however_busy() {
        let mut pace = Pace::new();
        let start = Instant::now();
        while !pace.worked() {
            assert!(start.elapsed() < Duration::from_secs(10));
        }
    }
}

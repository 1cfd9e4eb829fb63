//! When to go on looking for requests and when to sleep.
//!
//! Being woken costs more than a request, so after a request a thread looks for
//! the next one for a moment. That pays only while the vCPU runs on another
//! processor. On the same one it can't go on before we sleep, and waking each
//! other is then by far the quicker way. So looking must earn its keep: while it
//! does not, the thread sleeps at once, and tries again now and then, as long as it is
//! woken so soon that it could have paid.

use std::time::{Duration, Instant};

/// What looking for nothing costs, in requests found.
const MISS: u32 = 4;
/// How much of what was found can be saved up.
const CREDIT: u32 = 2 * MISS;
/// Time to wake up: a sleep that is longer than a look by no more than this would have
/// been saved by looking.
const WAKE: Duration = Duration::from_micros(70);
/// After so many of these it tries to look again; after twice as many each time that this
/// fails, for a try is dear when it is in vain.
const NAPS: u32 = 32;
const MOST_NAPS: u32 = 32 * NAPS;
/// However busy, everything else is seen to this often.
const LOOK_AROUND: Duration = Duration::from_millis(1);
/// Requests, or looks for one, between two looks at the clock.
const STRIDE: u32 = 16;

/// What to do when there is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollAction {
    /// Look for a request again.
    Poll,
    /// See to everything else, and come back.
    CheckEvents,
    /// Sleep until something happens.
    Sleep,
}

/// The measure.
pub struct AdaptivePolling {
    /// For how long it looks after the last request.
    look: Duration,
    /// It looks while this is not zero.
    credit: u32,
    naps: u32,
    /// So many of them until the next try.
    patience: u32,
    count: u32,
    /// Since when there has been no request.
    quiet: Option<Instant>,
    looked_around: Instant,
}

impl AdaptivePolling {
    /// Starts by looking, for `look` at a time; zero: it never looks.
    pub fn new(look: Duration) -> Self {
        AdaptivePolling {
            look,
            credit: if look.is_zero() { 0 } else { CREDIT },
            naps: 0,
            patience: NAPS,
            count: 0,
            quiet: None,
            looked_around: Instant::now(),
        }
    }

    /// A request was carried out; true when it is time to look around.
    pub fn found_work(&mut self) -> bool {
        if let Some(since) = self.quiet.take() {
            self.looked(since.elapsed() <= self.look);
        }
        self.count = self.count.wrapping_add(1);
        self.count.is_multiple_of(STRIDE) && self.is_time(Instant::now())
    }

    /// Whether it looks before it sleeps, at present.
    pub fn is_polling(&self) -> bool {
        self.credit > 0
    }

    /// There is no request.
    pub fn found_nothing(&mut self) -> PollAction {
        if self.credit == 0 {
            return PollAction::Sleep;
        }
        let Some(since) = self.quiet else {
            self.quiet = Some(Instant::now());
            return PollAction::Poll;
        };
        self.count = self.count.wrapping_add(1);
        if !self.count.is_multiple_of(STRIDE) {
            return PollAction::Poll;
        }
        let now = Instant::now();
        if now - since > self.look {
            self.quiet = None;
            self.looked(false);
            PollAction::Sleep
        } else if self.is_time(now) {
            PollAction::CheckEvents
        } else {
            PollAction::Poll
        }
    }

    /// It has slept for this time.
    pub fn slept(&mut self, time: Duration) {
        if self.credit > 0 || self.look.is_zero() || time > self.look + WAKE {
            return;
        }
        self.naps += 1;
        if self.naps == self.patience {
            self.naps = 0;
            self.patience = (2 * self.patience).min(MOST_NAPS);
            self.credit = 1;
        }
    }

    fn looked(&mut self, found: bool) {
        if !found {
            self.credit = self.credit.saturating_sub(MISS);
        } else if self.credit < CREDIT {
            self.credit += 1;
        } else {
            self.patience = NAPS;
        }
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

    const LOOK: Duration = Duration::from_micros(50);

    fn poll_in_vain(polling: &mut AdaptivePolling) {
        let start = Instant::now();
        while polling.found_nothing() != PollAction::Sleep {
            assert!(start.elapsed() < Duration::from_secs(10));
        }
    }

    #[test]
    fn looking_for_nothing_ends_and_is_tried_again_after_naps() {
        let mut polling = AdaptivePolling::new(LOOK);
        for _ in 0..CREDIT / MISS {
            assert_eq!(polling.found_nothing(), PollAction::Poll);
            poll_in_vain(&mut polling);
        }
        assert_eq!(polling.found_nothing(), PollAction::Sleep);
        for _ in 0..2 * NAPS {
            polling.slept(Duration::from_secs(1));
        }
        assert_eq!(polling.found_nothing(), PollAction::Sleep);
        let nap = |polling: &mut AdaptivePolling, count| {
            for _ in 0..count {
                assert_eq!(polling.found_nothing(), PollAction::Sleep);
                polling.slept(Duration::from_micros(20));
            }
        };
        nap(&mut polling, NAPS);
        assert_eq!(polling.found_nothing(), PollAction::Poll);
        // One miss is enough then, and the next try is later ...
        poll_in_vain(&mut polling);
        nap(&mut polling, 2 * NAPS);
        assert_eq!(polling.found_nothing(), PollAction::Poll);
        poll_in_vain(&mut polling);
        // ... unless much was found before.
        for _ in 0..=CREDIT {
            polling.looked(true);
        }
        for _ in 0..CREDIT / MISS {
            assert_eq!(polling.found_nothing(), PollAction::Poll);
            poll_in_vain(&mut polling);
        }
        nap(&mut polling, NAPS);
        assert_eq!(polling.found_nothing(), PollAction::Poll);
    }

    #[test]
    fn without_a_time_it_never_looks() {
        let mut polling = AdaptivePolling::new(Duration::ZERO);
        for _ in 0..2 * NAPS {
            polling.found_work();
            assert_eq!(polling.found_nothing(), PollAction::Sleep);
            polling.slept(Duration::ZERO);
        }
    }

    #[test]
    fn it_looks_around_however_busy() {
        let mut polling = AdaptivePolling::new(LOOK);
        let start = Instant::now();
        while !polling.found_work() {
            assert!(start.elapsed() < Duration::from_secs(10));
        }
    }
}

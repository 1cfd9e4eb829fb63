//! Adaptive polling: when a thread polls for the next request, and when it sleeps.
//!
//! A wakeup costs more than a request, so after a request a thread polls for the next one
//! for a short time. That helps only if the vCPU runs on another processor: on the same
//! processor the guest cannot continue until this thread sleeps, and then a wakeup is the
//! faster way. So polling must pay for itself. It earns credit for each request that it
//! finds and loses credit for each poll that finds nothing. Without credit the thread sleeps
//! at once; after a number of sleeps that were so short that polling would have avoided
//! them, it polls once more.

use std::time::{Duration, Instant};

/// Credit that a poll costs which finds nothing; a request that polling finds earns 1.
const COST_OF_FAILURE: u32 = 4;
/// The most credit.
const MAX_CREDIT: u32 = 2 * COST_OF_FAILURE;
/// Time that a wakeup takes. A sleep that is no longer than a poll and a wakeup together
/// is short: polling would have avoided it.
const WAKEUP_TIME: Duration = Duration::from_micros(70);
/// Number of short sleeps after which a thread without credit polls again. The number
/// doubles each time that this fails, for a failed poll is expensive.
const MIN_SHORT_SLEEPS: u32 = 32;
const MAX_SHORT_SLEEPS: u32 = 32 * MIN_SHORT_SLEEPS;
/// However busy a thread is, it checks its other event sources this often.
const EVENT_CHECK_INTERVAL: Duration = Duration::from_millis(1);
/// Number of requests or polls between two readings of the clock.
const CLOCK_STRIDE: u32 = 16;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollAction {
    /// Poll for a request again.
    Poll,
    /// Check all other event sources without waiting, then poll again.
    CheckEvents,
    /// Sleep until an event.
    Sleep,
}

/// The state of one thread's polling.
pub struct AdaptivePolling {
    /// How long to poll after the last request; zero if polling is off.
    poll_time: Duration,
    /// The thread polls while this is not zero.
    credit: u32,
    /// Short sleeps since polling stopped or was last tried.
    short_sleeps: u32,
    /// Number of short sleeps after which polling is tried again.
    retry_after: u32,
    /// Requests and polls, for [`CLOCK_STRIDE`].
    count: u32,
    /// When the current poll began; `None` after a request.
    poll_start: Option<Instant>,
    last_event_check: Instant,
}

impl AdaptivePolling {
    /// Starts by polling, for `poll_time` after each request. Zero turns polling off.
    pub fn new(poll_time: Duration) -> Self {
        AdaptivePolling {
            poll_time,
            credit: if poll_time.is_zero() { 0 } else { MAX_CREDIT },
            short_sleeps: 0,
            retry_after: MIN_SHORT_SLEEPS,
            count: 0,
            poll_start: None,
            last_event_check: Instant::now(),
        }
    }

    /// Records that a request was processed; true when the other event sources are due.
    pub fn found_work(&mut self) -> bool {
        if let Some(start) = self.poll_start.take() {
            self.record_poll(start.elapsed() <= self.poll_time);
        }
        self.count = self.count.wrapping_add(1);
        self.count.is_multiple_of(CLOCK_STRIDE) && self.event_check_due(Instant::now())
    }

    /// Whether the thread currently polls before it sleeps.
    pub fn is_polling(&self) -> bool {
        self.credit > 0
    }

    /// Records that there is no request, and decides what to do.
    pub fn found_nothing(&mut self) -> PollAction {
        if self.credit == 0 {
            return PollAction::Sleep;
        }
        let Some(start) = self.poll_start else {
            self.poll_start = Some(Instant::now());
            return PollAction::Poll;
        };
        self.count = self.count.wrapping_add(1);
        if !self.count.is_multiple_of(CLOCK_STRIDE) {
            return PollAction::Poll;
        }
        let now = Instant::now();
        if now - start > self.poll_time {
            self.poll_start = None;
            self.record_poll(false);
            PollAction::Sleep
        } else if self.event_check_due(now) {
            PollAction::CheckEvents
        } else {
            PollAction::Poll
        }
    }

    /// Records how long the thread slept.
    pub fn slept(&mut self, time: Duration) {
        if self.credit > 0 || self.poll_time.is_zero() || time > self.poll_time + WAKEUP_TIME {
            return;
        }
        self.short_sleeps += 1;
        if self.short_sleeps == self.retry_after {
            self.short_sleeps = 0;
            self.retry_after = (2 * self.retry_after).min(MAX_SHORT_SLEEPS);
            self.credit = 1;
        }
    }

    fn record_poll(&mut self, found: bool) {
        if !found {
            self.credit = self.credit.saturating_sub(COST_OF_FAILURE);
        } else if self.credit < MAX_CREDIT {
            self.credit += 1;
        } else {
            self.retry_after = MIN_SHORT_SLEEPS;
        }
    }

    fn event_check_due(&mut self, now: Instant) -> bool {
        let due = now - self.last_event_check >= EVENT_CHECK_INTERVAL;
        if due {
            self.last_event_check = now;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLL_TIME: Duration = Duration::from_micros(50);

    fn poll_in_vain(polling: &mut AdaptivePolling) {
        let start = Instant::now();
        while polling.found_nothing() != PollAction::Sleep {
            assert!(start.elapsed() < Duration::from_secs(10));
        }
    }

    #[test]
    fn polling_stops_when_it_finds_nothing_and_is_tried_again_after_short_sleeps() {
        let mut polling = AdaptivePolling::new(POLL_TIME);
        for _ in 0..MAX_CREDIT / COST_OF_FAILURE {
            assert_eq!(polling.found_nothing(), PollAction::Poll);
            poll_in_vain(&mut polling);
        }
        assert_eq!(polling.found_nothing(), PollAction::Sleep);
        for _ in 0..2 * MIN_SHORT_SLEEPS {
            polling.slept(Duration::from_secs(1));
        }
        assert_eq!(polling.found_nothing(), PollAction::Sleep);
        let sleep_briefly = |polling: &mut AdaptivePolling, count| {
            for _ in 0..count {
                assert_eq!(polling.found_nothing(), PollAction::Sleep);
                polling.slept(Duration::from_micros(20));
            }
        };
        sleep_briefly(&mut polling, MIN_SHORT_SLEEPS);
        assert_eq!(polling.found_nothing(), PollAction::Poll);
        // Then one failure is enough, and the next try comes later ...
        poll_in_vain(&mut polling);
        sleep_briefly(&mut polling, 2 * MIN_SHORT_SLEEPS);
        assert_eq!(polling.found_nothing(), PollAction::Poll);
        poll_in_vain(&mut polling);
        // ... unless polling was successful before.
        for _ in 0..=MAX_CREDIT {
            polling.record_poll(true);
        }
        for _ in 0..MAX_CREDIT / COST_OF_FAILURE {
            assert_eq!(polling.found_nothing(), PollAction::Poll);
            poll_in_vain(&mut polling);
        }
        sleep_briefly(&mut polling, MIN_SHORT_SLEEPS);
        assert_eq!(polling.found_nothing(), PollAction::Poll);
    }

    #[test]
    fn a_poll_time_of_zero_turns_polling_off() {
        let mut polling = AdaptivePolling::new(Duration::ZERO);
        for _ in 0..2 * MIN_SHORT_SLEEPS {
            polling.found_work();
            assert_eq!(polling.found_nothing(), PollAction::Sleep);
            polling.slept(Duration::ZERO);
        }
    }

    #[test]
    fn other_event_sources_are_checked_however_busy_the_thread_is() {
        let mut polling = AdaptivePolling::new(POLL_TIME);
        let start = Instant::now();
        while !polling.found_work() {
            assert!(start.elapsed() < Duration::from_secs(10));
        }
    }
}

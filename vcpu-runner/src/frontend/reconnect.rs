//! Waiting for a back end after the last one was lost. [`Reconnect`] holds no reference
//! to the device task: the task polls [`Reconnect::poll_fd`] until
//! [`Reconnect::wakes_at`], calls [`Reconnect::advance`], and acts on what that returns.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::vhost_workarounds::connect::ConnectAttempt;
use crate::clock;
use crate::endpoint::Endpoint;

/// The pause before the second attempt to connect. It doubles with each attempt
const FIRST_RETRY: Duration = Duration::from_millis(2);
/// up to this.
const LONGEST_RETRY: Duration = Duration::from_millis(250);

/// What the device task has to do next.
pub enum ReconnectEvent {
    /// The time that `--on-loss` allows has passed.
    LimitReached,
    /// A stale back end has closed its connection.
    StaleBackendGone,
    /// A back end answered at this socket; the handshake can begin.
    BackendReady(UnixStream),
}

/// The state of a device without a back end.
pub struct Reconnect {
    lost_at: Instant,
    reason: String,
    lost_was_tracked: bool,
    /// Connections to back ends that were given up, until those close their ends. Only
    /// then is it certain that they do not access guest memory any more.
    stale: Vec<UnixStream>,
    attempt: Option<ConnectAttempt>,
    /// When to connect next, and the pause after a failure of that.
    retry_at: Instant,
    retry_interval: Duration,
    /// When the time that `--on-loss` allows has passed.
    limit: Option<Instant>,
    /// Events are sent once: for the first handshake, and for each new reason of a
    /// failure.
    handshake_reported: bool,
    failure_reported: Option<String>,
    in_handshake: bool,
}

impl Reconnect {
    /// The back end was lost just now, for `reason`; it did or did not track its
    /// requests. After `limit`, the device task gets [`ReconnectEvent::LimitReached`].
    pub fn new(reason: String, lost_was_tracked: bool, limit: Option<Duration>) -> Self {
        let now = Instant::now();
        Reconnect {
            lost_at: now,
            reason,
            lost_was_tracked,
            stale: Vec::new(),
            attempt: None,
            retry_at: now,
            retry_interval: FIRST_RETRY,
            limit: limit.map(|limit| now + limit),
            handshake_reported: false,
            failure_reported: None,
            in_handshake: false,
        }
    }

    /// Why the back end was lost.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Whether the lost back end tracked its requests.
    pub fn lost_was_tracked(&self) -> bool {
        self.lost_was_tracked
    }

    /// Time since the loss.
    pub fn outage(&self) -> Duration {
        self.lost_at.elapsed()
    }

    /// Whether a handshake is in progress.
    pub fn in_handshake(&self) -> bool {
        self.in_handshake
    }

    /// How many stale back ends may still write to guest memory.
    pub fn stale_count(&self) -> usize {
        self.stale.len()
    }

    /// Waits for the back end behind `connection` to close it, before any other back
    /// end is connected.
    pub fn add_stale(&mut self, connection: UnixStream) {
        self.stale.push(connection);
    }

    /// Waits until all stale back ends are gone; false if they are not within `limit`.
    pub fn wait_for_stale(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        self.stale.retain(|connection| {
            let left = deadline.saturating_duration_since(Instant::now());
            !hangs_up(connection, left)
        });
        self.stale.is_empty()
    }

    /// Sets the time limit again if it has passed: a new driver has started with the
    /// lost device.
    pub fn renew_limit(&mut self, limit: Option<Duration>) {
        if self.limit.is_none() {
            self.limit = limit.map(|limit| Instant::now() + limit);
        }
    }

    /// What to poll, if there is anything.
    pub fn poll_fd(&self) -> Option<PollFd<'_>> {
        match (self.stale.first(), &self.attempt) {
            // poll(2) reports a hang-up without being asked for it.
            (Some(stale), _) => Some(PollFd::new(stale, PollFlags::empty())),
            (None, Some(attempt)) => Some(PollFd::new(attempt.socket(), PollFlags::IN)),
            (None, None) => None,
        }
    }

    /// When to call [`Reconnect::advance`] although nothing became ready.
    pub fn wakes_at(&self) -> Option<Instant> {
        let idle = self.stale.is_empty() && self.attempt.is_none();
        let retry_at = idle.then_some(self.retry_at);
        retry_at.into_iter().chain(self.limit).min()
    }

    /// Takes the next step towards a back end at `endpoint`; `ready`: what
    /// [`Reconnect::poll_fd`] returned is ready.
    pub fn advance(&mut self, endpoint: &Endpoint, ready: bool) -> Option<ReconnectEvent> {
        let now = Instant::now();
        if self.limit.is_some_and(|limit| limit <= now) {
            self.limit = None;
            return Some(ReconnectEvent::LimitReached);
        }
        if ready && !self.stale.is_empty() {
            // The next one is polled in the next round.
            self.stale.remove(0);
            return Some(ReconnectEvent::StaleBackendGone);
        }
        if ready && let Some(mut attempt) = self.attempt.take() {
            match attempt.receive_reply() {
                Ok(true) => return Some(ReconnectEvent::BackendReady(attempt.into_socket())),
                Ok(false) => self.attempt = Some(attempt),
                Err(error) => {
                    tracing::debug!(%error, "a back end accepted the connection but did not answer");
                    self.retry_later();
                }
            }
            return None;
        }
        if let Endpoint::Path(path) = endpoint
            && self.stale.is_empty()
            && self.attempt.is_none()
            && self.retry_at <= now
        {
            match ConnectAttempt::start(path) {
                Ok(attempt) => self.attempt = Some(attempt),
                Err(error) => {
                    tracing::trace!(%error, path = %path.display(), "connecting failed");
                    self.retry_later();
                }
            }
        }
        None
    }

    /// A handshake begins; true for the first one, which is to be reported.
    pub fn begin_handshake(&mut self) -> bool {
        self.in_handshake = true;
        !std::mem::replace(&mut self.handshake_reported, true)
    }

    /// The handshake failed for `reason`, and another attempt follows; true if the
    /// reason is a new one, which is to be reported.
    pub fn handshake_failed(&mut self, reason: &str) -> bool {
        self.in_handshake = false;
        self.retry_later();
        let is_new = self.failure_reported.as_deref() != Some(reason);
        self.failure_reported = Some(reason.to_owned());
        is_new
    }

    fn retry_later(&mut self) {
        self.retry_at = Instant::now() + self.retry_interval;
        self.retry_interval = (2 * self.retry_interval).min(LONGEST_RETRY);
    }
}

/// Whether the other end of `socket` is closed, or closes within `limit`.
pub fn hangs_up(socket: &UnixStream, limit: Duration) -> bool {
    let limit = clock::until(Instant::now() + limit);
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    poll(&mut fds, Some(&limit)).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    /// Does what the device task does until there is an event.
    fn next_event(reconnect: &mut Reconnect, endpoint: &Endpoint) -> ReconnectEvent {
        loop {
            let timeout = reconnect.wakes_at().map(clock::until);
            let mut fds: Vec<PollFd<'_>> = reconnect.poll_fd().into_iter().collect();
            let ready = poll(&mut fds, timeout.as_ref()).unwrap() > 0;
            if let Some(event) = reconnect.advance(endpoint, ready) {
                return event;
            }
        }
    }

    #[test]
    fn a_stale_back_end_must_be_gone_before_another_one_is_connected() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let endpoint = Endpoint::Path(path);
        let mut reconnect = Reconnect::new("killed".into(), true, None);
        let (ours, stale) = UnixStream::pair().unwrap();
        reconnect.add_stale(ours);
        assert!(!reconnect.wait_for_stale(Duration::from_millis(1)));
        assert!(reconnect.advance(&endpoint, false).is_none());
        assert_eq!(reconnect.stale_count(), 1);
        drop(stale);
        let event = next_event(&mut reconnect, &endpoint);
        assert!(matches!(event, ReconnectEvent::StaleBackendGone));
        assert_eq!(reconnect.stale_count(), 0);

        assert!(reconnect.advance(&endpoint, false).is_none());
        let (mut backend, _) = listener.accept().unwrap();
        let reply = [1u32, 5, 8, 0, 0].map(u32::to_ne_bytes).concat();
        backend.write_all(&reply).unwrap();
        let event = next_event(&mut reconnect, &endpoint);
        assert!(matches!(event, ReconnectEvent::BackendReady(_)));
    }

    #[test]
    fn the_limit_is_reached_once_and_can_be_renewed() {
        let endpoint = Endpoint::Fd(0);
        let limit = Some(Duration::from_millis(1));
        let mut reconnect = Reconnect::new("killed".into(), false, limit);
        for _ in 0..2 {
            let event = next_event(&mut reconnect, &endpoint);
            assert!(matches!(event, ReconnectEvent::LimitReached));
            assert!(reconnect.advance(&endpoint, false).is_none());
            reconnect.renew_limit(limit);
        }
    }

    #[test]
    fn a_handshake_and_each_new_reason_of_its_failure_are_reported_once() {
        let mut reconnect = Reconnect::new("killed".into(), false, None);
        assert!(reconnect.begin_handshake());
        assert!(reconnect.in_handshake());
        assert!(reconnect.handshake_failed("too small"));
        assert!(!reconnect.in_handshake());
        assert!(!reconnect.begin_handshake());
        assert!(!reconnect.handshake_failed("too small"));
        assert!(reconnect.handshake_failed("too old"));
    }
}

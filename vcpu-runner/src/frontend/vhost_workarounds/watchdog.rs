//! Deadlines for vhost-user messages: one thread shuts down the socket of a back end that
//! misses its deadline, and the wait for its reply ends with an error.
//!
//! * Call in vhost 0.18: every request of `Frontend`, and
//!   `FrontendReqHandler::handle_request`; both end in `Endpoint::recv_into_iovec_all`.
//! * Limit: it retries EAGAIN without end. A receive timeout on the socket has no effect,
//!   and a silent back end blocks the caller.
//! * Upstream would have to return EAGAIN to the caller, or accept a deadline.

use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::Error;

/// The thread that watches the deadlines of all sockets.
pub struct Watchdog {
    state: Mutex<WatchdogState>,
    changed: Condvar,
}

#[derive(Default)]
struct WatchdogState {
    next_key: u64,
    watched: BTreeMap<u64, WatchedSocket>,
    /// When the thread wakes up by itself. Only an earlier deadline has to wake it:
    /// messages are many, and almost all are answered in time.
    wakes_at: Option<Instant>,
}

struct WatchedSocket {
    socket: UnixStream,
    /// When the socket is to be shut down.
    deadline: Instant,
    /// The first deadline has passed, and the socket was shut down for reading.
    expired: bool,
}

/// How long after its deadline a socket is shut down for writing as well.
const WRITE_GRACE: Duration = Duration::from_secs(1);

/// The deadline of one socket. Dropping it ends the watch.
pub struct DeadlineGuard {
    watchdog: Arc<Watchdog>,
    key: u64,
}

impl Watchdog {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the thread cannot be created.
    pub fn start() -> Result<Arc<Self>, Error> {
        let watchdog = Arc::new(Watchdog {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let thread = Arc::clone(&watchdog);
        std::thread::Builder::new()
            .name("watchdog".into())
            .spawn(move || thread.run())
            .map_err(Error::io("starting the watchdog thread"))?;
        Ok(watchdog)
    }

    fn lock(&self) -> MutexGuard<'_, WatchdogState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shuts `socket` down for reading if the guard still exists after `limit`.
    ///
    /// # Errors
    /// When the socket cannot be duplicated.
    pub fn guard(
        self: &Arc<Self>,
        socket: &UnixStream,
        limit: Duration,
    ) -> Result<DeadlineGuard, Error> {
        let socket = socket
            .try_clone()
            .map_err(Error::io("duplicating a socket"))?;
        let mut state = self.lock();
        let key = state.next_key;
        state.next_key += 1;
        let deadline = Instant::now() + limit;
        let watched = WatchedSocket {
            socket,
            deadline,
            expired: false,
        };
        state.watched.insert(key, watched);
        if state.wakes_at.is_none_or(|at| deadline < at) {
            self.changed.notify_one();
        }
        Ok(DeadlineGuard {
            watchdog: Arc::clone(self),
            key,
        })
    }

    fn run(&self) {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let expired = |watched: &&mut WatchedSocket| watched.deadline <= now;
            for watched in state.watched.values_mut().filter(expired) {
                // Reading first, which ends a wait for a reply; see
                // `connection::CancelHandle` for why not both at once. A thread that
                // still waits after that is blocked in sending. An error means that the
                // peer is gone already.
                let how = match std::mem::replace(&mut watched.expired, true) {
                    false => Shutdown::Read,
                    true => Shutdown::Both,
                };
                let _ = watched.socket.shutdown(how);
                watched.deadline = now + WRITE_GRACE;
            }
            let next = state.watched.values().map(|watched| watched.deadline).min();
            state.wakes_at = next;
            state = match next {
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    self.changed
                        .wait_timeout(state, deadline - now)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }
}

impl DeadlineGuard {
    /// Ends the watch; true when the deadline had passed.
    pub fn has_expired(self) -> bool {
        let watched = self.watchdog.lock().watched.remove(&self.key);
        watched.is_some_and(|watched| watched.expired)
    }
}

impl Drop for DeadlineGuard {
    fn drop(&mut self) {
        self.watchdog.lock().watched.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_socket_is_shut_down_only_after_its_deadline() {
        let watchdog = Watchdog::start().unwrap();
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let guard = watchdog.guard(&ours, Duration::from_millis(20)).unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 0, "shut down");
        assert!(guard.has_expired());

        let (in_time, _theirs) = UnixStream::pair().unwrap();
        let guard = watchdog.guard(&in_time, Duration::from_secs(60)).unwrap();
        assert!(!guard.has_expired());
    }
}

//! Deadlines for vhost-user messages. Crate vhost's front end waits for ever for
//! an answer, so whoever is late has its socket shut down for reading, and the
//! wait ends with an error.

use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::Error;

/// One thread that watches over all sockets.
pub struct Watchdog {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    next: u64,
    watched: BTreeMap<u64, Watched>,
    /// When the thread looks again by itself. It is woken only for a deadline
    /// before that: messages are many, and almost all are answered in time.
    looks_at: Option<Instant>,
}

struct Watched {
    socket: UnixStream,
    /// When something has to be done about it.
    at: Instant,
    /// Something was.
    late: bool,
}

/// How long after its deadline a socket may take to be given up.
const AGAIN: Duration = Duration::from_secs(1);

/// While it lives, its socket has a deadline.
pub struct Guard {
    watchdog: Arc<Watchdog>,
    key: u64,
}

impl Watchdog {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there are no threads left.
    pub fn start() -> Result<Arc<Self>, Error> {
        let watchdog = Arc::new(Watchdog {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let watcher = Arc::clone(&watchdog);
        std::thread::Builder::new()
            .name("watchdog".into())
            .spawn(move || watcher.watch())
            .map_err(Error::io("starting the watchdog thread"))?;
        Ok(watchdog)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shuts `socket` down for reading if the guard still lives after `limit`.
    ///
    /// # Errors
    /// When the socket cannot be duplicated.
    pub fn guard(self: &Arc<Self>, socket: &UnixStream, limit: Duration) -> Result<Guard, Error> {
        let socket = socket
            .try_clone()
            .map_err(Error::io("duplicating a socket"))?;
        let mut state = self.lock();
        let key = state.next;
        state.next += 1;
        let deadline = Instant::now() + limit;
        let watched = Watched {
            socket,
            at: deadline,
            late: false,
        };
        state.watched.insert(key, watched);
        if state.looks_at.is_none_or(|at| deadline < at) {
            self.changed.notify_one();
        }
        Ok(Guard {
            watchdog: Arc::clone(self),
            key,
        })
    }

    fn watch(&self) {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            for watched in state.watched.values_mut().filter(|it| it.at <= now) {
                // First what waits for an answer: see `session::Lifeline`. Who waits
                // still cannot even send, and must not wait for ever. An error means
                // that it is gone already.
                let how = match std::mem::replace(&mut watched.late, true) {
                    false => Shutdown::Read,
                    true => Shutdown::Both,
                };
                let _ = watched.socket.shutdown(how);
                watched.at = now + AGAIN;
            }
            let next = state.watched.values().map(|watched| watched.at).min();
            state.looks_at = next;
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

impl Guard {
    /// Ends the watch; true when the deadline had passed.
    pub fn finish(self) -> bool {
        let watched = self.watchdog.lock().watched.remove(&self.key);
        watched.is_some_and(|watched| watched.late)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.watchdog.lock().watched.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_silent_peer_is_cut_off_and_a_quick_one_is_not() {
        let watchdog = Watchdog::start().unwrap();
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let guard = watchdog.guard(&ours, Duration::from_millis(20)).unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 0, "shut down");
        assert!(guard.finish());

        let (quick, _theirs) = UnixStream::pair().unwrap();
        let guard = watchdog.guard(&quick, Duration::from_secs(60)).unwrap();
        assert!(!guard.finish());
    }
}

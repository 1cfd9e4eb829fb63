//! A worker thread: some rings, the device that serves them, one lock.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::adaptive_polling::{AdaptivePolling, PollAction};
use crate::{Device, Error, Poller};
use rustix::event::{EventfdFlags, eventfd};

mod state;

use state::WorkFound;
pub use state::WorkerState;

/// Marks the tokens that the core itself puts into the poller.
const CORE: u64 = 1 << 63;
const WAKE: u64 = CORE | (1 << 62);

/// One worker. The thread in [`Worker::run`] moves data; the control thread
/// reaches in through [`Worker::control`].
pub struct Worker {
    state: Mutex<WorkerState>,
    poller: Poller,
    wake: OwnedFd,
    /// Control operations that want the lock; the data path lets them in.
    waiting: AtomicUsize,
}

impl Worker {
    /// A worker that serves the queues listed in `own` out of `total`.
    ///
    /// # Errors
    /// When the device's own descriptors cannot be polled.
    pub fn new(
        mut device: Box<dyn Device>,
        own: &[usize],
        total: usize,
        queue_size: u16,
    ) -> Result<Self, Error> {
        let poller = Poller::new().map_err(Error::io("epoll_create"))?;
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|e| Error::io("eventfd")(e.into()))?;
        poller
            .add_readable(&wake, WAKE)
            .map_err(Error::io("epoll_ctl"))?;
        device
            .register_sources(&poller)
            .map_err(Error::io("watching the device's descriptors"))?;
        Ok(Worker {
            state: Mutex::new(WorkerState::new(device, own, total, queue_size)?),
            poller,
            wake,
            waiting: AtomicUsize::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, WorkerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` between two batches: while it runs, nothing of this worker
    /// touches guest memory.
    pub fn control<R>(&self, f: impl FnOnce(&mut WorkerState, &Poller) -> R) -> R {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let mut state = self.lock();
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        let result = f(&mut state, &self.poller);
        let pending = state.is_pending();
        drop(state);
        if pending {
            // EAGAIN: the counter is full, so the worker wakes anyway.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
        result
    }

    /// Moves data until the process ends. Looks for more for `poll` at most before it
    /// sleeps, if that pays.
    ///
    /// # Errors
    /// Only when epoll itself fails.
    pub fn run(&self, poll: Duration) -> std::io::Result<()> {
        let mut polling = AdaptivePolling::new(poll);
        let mut tokens = Vec::new();
        let mut next = PollAction::Sleep;
        loop {
            tokens.clear();
            match next {
                PollAction::Poll => std::hint::spin_loop(),
                PollAction::CheckEvents => self.poller.wait(&mut tokens, Some(Duration::ZERO))?,
                PollAction::Sleep => {
                    let start = Instant::now();
                    self.poller.wait(&mut tokens, None)?;
                    polling.slept(start.elapsed());
                }
            }
            // The lock is not fair: without this a busy ring starves a stop.
            while self.waiting.load(Ordering::Acquire) > 0 {
                std::thread::yield_now();
            }
            let mut state = self.lock();
            next = match state.work(&tokens, &self.poller, polling.is_polling()) {
                WorkFound::Nothing => polling.found_nothing(),
                WorkFound::Work if polling.found_work() => PollAction::CheckEvents,
                WorkFound::Work => polling.found_nothing(),
                WorkFound::More if polling.found_work() || !polling.is_polling() => {
                    PollAction::CheckEvents
                }
                WorkFound::More => PollAction::Poll,
            };
            if next == PollAction::Sleep && state.enable_notification() {
                next = PollAction::Poll;
            }
        }
    }
}

#[cfg(test)]
mod tests;

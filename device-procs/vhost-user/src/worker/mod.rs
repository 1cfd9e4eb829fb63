//! A worker thread: some rings and the device that processes them, under one lock.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use device_core::Poller;
use device_core::adaptive_polling::{AdaptivePolling, PollAction};
use rustix::event::{EventfdFlags, eventfd};

use crate::{Device, Error};

mod state;

use state::WorkFound;
pub use state::WorkerState;

/// Marks the poller's tokens that belong to the worker and not to its device.
const WORKER_TOKEN: u64 = 1 << 63;
const WAKEUP_TOKEN: u64 = WORKER_TOKEN | (1 << 62);

/// One worker. Its thread ([`Worker::run`]) moves data; the main thread changes its rings
/// through [`Worker::control`].
pub struct Worker {
    state: Mutex<WorkerState>,
    poller: Poller,
    wakeup: OwnedFd,
    /// Number of threads that wait for the lock in [`Worker::control`]. The worker's thread
    /// lets them go first.
    waiting: AtomicUsize,
}

impl Worker {
    /// A worker for the queues listed in `own`, of a device with `queues` queues.
    ///
    /// # Errors
    /// A descriptor cannot be polled, or `queue_size` is not a valid ring size.
    pub fn new(
        mut device: Box<dyn Device>,
        own: &[usize],
        queues: usize,
        queue_size: u16,
    ) -> Result<Self, Error> {
        let poller = Poller::new().map_err(Error::io("epoll_create"))?;
        let wakeup = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|e| Error::io("eventfd")(e.into()))?;
        poller
            .add_readable(&wakeup, WAKEUP_TOKEN)
            .map_err(Error::io("epoll_ctl"))?;
        device
            .register_sources(&poller)
            .map_err(Error::io("polling the device's descriptors"))?;
        Ok(Worker {
            state: Mutex::new(WorkerState::new(device, own, queues, queue_size)?),
            poller,
            wakeup,
            waiting: AtomicUsize::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, WorkerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` between two batches. While it runs, this worker does not touch guest memory.
    pub fn control<R>(&self, f: impl FnOnce(&mut WorkerState, &Poller) -> R) -> R {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let mut state = self.lock();
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        let result = f(&mut state, &self.poller);
        let pending = state.is_pending();
        drop(state);
        if pending {
            // EAGAIN: the counter is full, so the worker wakes up anyway.
            let _ = rustix::io::write(&self.wakeup, &1u64.to_ne_bytes());
        }
        result
    }

    /// Processes the rings until the process ends. Polls for more requests for at most
    /// `poll_time` before it sleeps, if polling pays.
    ///
    /// # Errors
    /// epoll_wait(2) fails.
    pub fn run(&self, poll_time: Duration) -> std::io::Result<()> {
        let mut polling = AdaptivePolling::new(poll_time);
        let mut tokens = Vec::new();
        let mut action = PollAction::Sleep;
        loop {
            tokens.clear();
            match action {
                PollAction::Poll => std::hint::spin_loop(),
                PollAction::CheckEvents => self.poller.wait(&mut tokens, Some(Duration::ZERO))?,
                PollAction::Sleep => {
                    let start = Instant::now();
                    self.poller.wait(&mut tokens, None)?;
                    polling.slept(start.elapsed());
                }
            }
            // The lock is not fair: without this, a busy ring could delay a stop for ever.
            while self.waiting.load(Ordering::Acquire) > 0 {
                std::thread::yield_now();
            }
            let mut state = self.lock();
            action = match state.process(&tokens, &self.poller, polling.is_polling()) {
                WorkFound::Nothing => polling.found_nothing(),
                WorkFound::Done if polling.found_work() => PollAction::CheckEvents,
                WorkFound::Done => polling.found_nothing(),
                WorkFound::More if polling.found_work() || !polling.is_polling() => {
                    PollAction::CheckEvents
                }
                WorkFound::More => PollAction::Poll,
            };
            if action == PollAction::Sleep && state.enable_notification() {
                action = PollAction::Poll;
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! A worker thread: some rings, the device that serves them, one lock.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::inflight::Table;
use crate::memory::MemoryTable;
use crate::{Context, Device, Error, GuestMemory, Poller, Ring};

/// Marks the tokens that the core itself puts into the poller.
const CORE: u64 = 1 << 63;
const WAKE: u64 = CORE | (1 << 62);

/// One worker. The thread in [`Worker::run`] moves data; the control thread
/// reaches in through [`Worker::control`].
pub struct Worker {
    state: Mutex<State>,
    poller: Poller,
    wake: OwnedFd,
    /// Control operations that want the lock; the data path lets them in.
    waiting: AtomicUsize,
}

/// What the lock protects.
pub struct State {
    device: Box<dyn Device>,
    rings: Vec<Option<Ring>>,
    memory: Arc<GuestMemory>,
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
        let mut rings: Vec<Option<Ring>> = (0..total).map(|_| None).collect();
        for &index in own {
            if let Some(place) = rings.get_mut(index) {
                *place = Some(Ring::new(index, queue_size)?);
            }
        }
        let poller = Poller::new().map_err(Error::io("epoll_create"))?;
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|e| Error::io("eventfd")(e.into()))?;
        poller
            .add_readable(&wake, WAKE)
            .map_err(Error::io("epoll_ctl"))?;
        device
            .attach(&poller)
            .map_err(Error::io("watching the device's descriptors"))?;
        Ok(Worker {
            state: Mutex::new(State {
                device,
                rings,
                memory: Arc::default(),
            }),
            poller,
            wake,
            waiting: AtomicUsize::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` between two batches: while it runs, nothing of this worker
    /// touches guest memory.
    pub fn control<R>(&self, f: impl FnOnce(&mut State, &Poller) -> R) -> R {
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

    /// Moves data until the process ends.
    ///
    /// # Errors
    /// Only when epoll itself fails.
    pub fn run(&self) -> std::io::Result<()> {
        let mut tokens = Vec::new();
        let mut more = false;
        loop {
            tokens.clear();
            self.poller
                .wait(&mut tokens, more.then_some(Duration::ZERO))?;
            // The lock is not fair: without this a busy ring starves a stop.
            while self.waiting.load(Ordering::Acquire) > 0 {
                std::thread::yield_now();
            }
            more = self.lock().batch(&tokens, &self.poller);
        }
    }
}

impl State {
    fn is_pending(&self) -> bool {
        self.rings
            .iter()
            .flatten()
            .any(|ring| ring.pending && ring.is_running())
    }

    fn batch(&mut self, tokens: &[u64], poller: &Poller) -> bool {
        let State {
            device,
            rings,
            memory,
        } = self;
        let mut cx = Context {
            rings,
            memory,
            poller,
        };
        for &token in tokens {
            if token == WAKE {
                continue;
            }
            if token & CORE == 0 {
                for ring in cx.rings.iter_mut().flatten() {
                    ring.refill();
                }
                device.ready(token, &mut cx);
            } else if let Some(Some(ring)) = cx.rings.get_mut((token & !CORE) as usize) {
                ring.pending = true;
            }
        }
        for index in 0..cx.rings.len() {
            let memory = cx.memory;
            match cx.ring(index) {
                Some(ring) if ring.pending => ring.begin(memory),
                _ => continue,
            }
            device.kicked(index, &mut cx);
        }
        for ring in cx.rings.iter_mut().flatten() {
            ring.finish(cx.memory);
        }
        self.is_pending()
    }

    fn drain(&mut self, index: usize, poller: &Poller) {
        let mut cx = Context {
            rings: &mut self.rings,
            memory: &self.memory,
            poller,
        };
        // A stop leaves nothing in flight, not even what was so before the start.
        while let Some(ring) = cx.ring(index).filter(|ring| ring.has_left_overs()) {
            ring.refill();
            self.device.kicked(index, &mut cx);
        }
        if let Some(ring) = cx.ring(index) {
            ring.refill();
        }
        self.device.drain(index, &mut cx);
        for ring in self.rings.iter_mut().flatten() {
            ring.finish(&self.memory);
        }
    }

    /// The ring of `index`.
    ///
    /// # Errors
    /// When it is not this worker's.
    pub fn ring(&mut self, index: usize) -> Result<&mut Ring, Error> {
        let queues = self.rings.len();
        self.rings
            .get_mut(index)
            .and_then(Option::as_mut)
            .ok_or(Error::NoSuchQueue { index, queues })
    }

    /// The driver's feature bits.
    pub fn set_features(&mut self, features: u64) {
        for ring in self.rings.iter_mut().flatten() {
            ring.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        }
        self.device.negotiated(features);
    }

    /// Puts another memory table in place once nothing uses the old one.
    pub fn set_memory(&mut self, table: &MemoryTable, poller: &Poller) {
        for index in 0..self.rings.len() {
            self.drain(index, poller);
        }
        self.memory = Arc::clone(table.memory());
        for ring in self.rings.iter_mut().flatten() {
            ring.replace_memory(table);
        }
    }

    /// Starts a ring, with the table of what is in flight there if there is one.
    ///
    /// # Errors
    /// When its addresses make no sense, the inflight table has no room for it, or its
    /// doorbell cannot be polled.
    pub fn start(
        &mut self,
        index: usize,
        kick: OwnedFd,
        enable: bool,
        table: &MemoryTable,
        inflight: Option<&Arc<Table>>,
        poller: &Poller,
    ) -> Result<(), Error> {
        let ring = self.ring(index)?;
        // First what may fail: a doorbell that stayed in the poller by mistake
        // could not be taken out again, and would be in its own way next time.
        ring.place(table)?;
        if let Some(inflight) = inflight {
            ring.must_fit(inflight)?;
        }
        poller
            .add_readable(&kick, CORE | index as u64)
            .map_err(Error::io(format!("queue {index}: watching its doorbell")))?;
        if let Some(old) = ring.start(kick, inflight, table.memory()) {
            // The front end replaces the doorbell of a running ring.
            let _ = poller.remove(old);
        }
        if enable {
            ring.set_enabled(true);
        }
        Ok(())
    }

    /// Stops a ring: drained, silent, and its doorbell out of the poller.
    ///
    /// # Errors
    /// When there is no such ring.
    pub fn stop(&mut self, index: usize, poller: &Poller) -> Result<u16, Error> {
        self.drain(index, poller);
        let ring = self.ring(index)?;
        if let Some(kick) = ring.kick() {
            let _ = poller.remove(kick);
        }
        Ok(ring.stop())
    }

    /// Passes a write to the configuration space on.
    ///
    /// # Errors
    /// The device's.
    pub fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), Error> {
        self.device.write_config(offset, data)
    }

    /// The front end left: all rings stop and its memory is unmapped.
    pub fn close(&mut self, poller: &Poller) {
        for index in 0..self.rings.len() {
            if self.rings[index].is_some() {
                // Cannot fail: the ring exists.
                let _ = self.stop(index, poller);
            }
        }
        for ring in self.rings.iter_mut().flatten() {
            ring.reset();
        }
        self.memory = Arc::default();
        self.device.closed();
    }
}

//! What a worker's lock protects: the device and its rings. The worker's thread processes
//! them in batches; the main thread changes them between two batches.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use device_core::Poller;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::{WAKEUP_TOKEN, WORKER_TOKEN};
use crate::inflight::InflightTable;
use crate::memory::MemoryTable;
use crate::ring::RingAddresses;
use crate::{Device, DeviceContext, Error, GuestMemory, Ring};

/// The device and its rings.
pub struct WorkerState {
    device: Box<dyn Device>,
    /// Indexed by queue; `None` for the queues of other workers.
    rings: Vec<Option<Ring>>,
    memory: Arc<GuestMemory>,
}

/// What [`WorkerState::process`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WorkFound {
    /// There was no work.
    Nothing,
    /// There was work, and all of it is done.
    Done,
    /// There is more work than one batch.
    More,
}

impl WorkerState {
    pub(super) fn new(
        device: Box<dyn Device>,
        own: &[usize],
        queues: usize,
        queue_size: u16,
    ) -> Result<Self, Error> {
        let mut rings: Vec<Option<Ring>> = (0..queues).map(|_| None).collect();
        for &index in own {
            if let Some(ring) = rings.get_mut(index) {
                *ring = Some(Ring::new(index, queue_size)?);
            }
        }
        Ok(WorkerState {
            device,
            rings,
            memory: Arc::default(),
        })
    }

    pub(super) fn is_pending(&self) -> bool {
        self.rings.iter().flatten().any(Ring::is_pending)
    }

    /// Processes the events of `tokens` and everything that is pending. If the worker is
    /// `polling`, it also checks the rings and the device for work without an event.
    pub(super) fn process(&mut self, tokens: &[u64], poller: &Poller, polling: bool) -> WorkFound {
        let WorkerState {
            device,
            rings,
            memory,
        } = self;
        let mut cx = DeviceContext {
            rings,
            memory,
            poller,
        };
        let mut found = false;
        for &token in tokens {
            if token == WAKEUP_TOKEN {
                continue;
            }
            if token & WORKER_TOKEN == 0 {
                found = true;
                cx.refill_budgets();
                device.handle_event(token, &mut cx);
            } else if let Some(Some(ring)) = cx.rings.get_mut((token & !WORKER_TOKEN) as usize) {
                ring.notified();
            }
        }
        if polling {
            cx.rings.iter_mut().flatten().for_each(Ring::poll);
            cx.refill_budgets();
            found |= device.poll(&mut cx);
        }
        for index in 0..cx.rings.len() {
            match &mut cx.rings[index] {
                Some(ring) if ring.is_pending() => ring.disable_notification(),
                _ => continue,
            }
            found = true;
            device.process_queue(index, &mut cx);
        }
        cx.rings.iter_mut().flatten().for_each(Ring::flush);
        match (found, self.is_pending()) {
            (_, true) => WorkFound::More,
            (true, false) => WorkFound::Done,
            (false, false) => WorkFound::Nothing,
        }
    }

    /// Before a sleep: turns the doorbells on; returns whether requests came in before that.
    pub(super) fn enable_notification(&mut self) -> bool {
        self.rings
            .iter_mut()
            .flatten()
            .for_each(Ring::enable_notification);
        self.is_pending()
    }

    /// Completes all requests of a ring that are in flight, and those that an earlier
    /// process left in flight.
    fn drain(&mut self, index: usize, poller: &Poller) {
        let mut cx = DeviceContext {
            rings: &mut self.rings,
            memory: &self.memory,
            poller,
        };
        loop {
            let Some(ring) = cx.rings.get_mut(index).and_then(Option::as_mut) else {
                return;
            };
            ring.refill_budget();
            let left = ring.to_resubmit();
            // First, so that a device with a limit on its requests in flight has room.
            self.device.drain_queue(index, &mut cx);
            if left == 0 {
                break;
            }
            self.device.process_queue(index, &mut cx);
            // If the device took none of them, they are left to the next process. If the
            // ring broke, what the device took before is still in flight.
            if cx.ring(index).is_none_or(|ring| ring.to_resubmit() == left) {
                self.device.drain_queue(index, &mut cx);
                break;
            }
        }
        self.rings.iter_mut().flatten().for_each(Ring::flush);
    }

    /// The ring of queue `index`.
    ///
    /// # Errors
    /// This worker does not serve the queue.
    pub fn ring(&mut self, index: usize) -> Result<&mut Ring, Error> {
        let queues = self.rings.len();
        self.rings
            .get_mut(index)
            .and_then(Option::as_mut)
            .ok_or(Error::NoSuchQueue { index, queues })
    }

    /// A front end has connected on `socket`.
    pub fn frontend_connected(&mut self, socket: BorrowedFd<'_>) {
        self.device.frontend_connected(socket);
    }

    /// The driver has accepted these feature bits.
    pub fn set_features(&mut self, features: u64) {
        for ring in self.rings.iter_mut().flatten() {
            ring.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        }
        self.device.set_features(features);
    }

    /// Completes all requests in flight of all rings.
    pub fn drain_all(&mut self, poller: &Poller) {
        for index in 0..self.rings.len() {
            self.drain(index, poller);
        }
    }

    /// Replaces the memory table, after all requests in flight are completed.
    pub fn set_memory(&mut self, table: &MemoryTable, poller: &Poller) {
        self.drain_all(poller);
        self.memory = Arc::clone(table.memory());
        for ring in self.rings.iter_mut().flatten() {
            ring.replace_memory(table);
        }
    }

    /// SET_VRING_KICK: starts a ring, with `inflight` if there is an in-flight table, and
    /// enables it if `enable`. A ring that is running gets `kick` as its new doorbell.
    ///
    /// # Errors
    /// The ring has invalid addresses, the in-flight table has no room for it, the device
    /// refuses the start, or the doorbell cannot be polled.
    pub fn start(
        &mut self,
        index: usize,
        kick: OwnedFd,
        enable: bool,
        table: &MemoryTable,
        inflight: Option<&Arc<InflightTable>>,
        poller: &Poller,
    ) -> Result<(), Error> {
        let token = WORKER_TOKEN | index as u64;
        let poll = |kick: &OwnedFd| {
            let operation = format!("queue {index}: polling its doorbell");
            poller
                .add_readable(kick, token)
                .map_err(Error::io(operation))
        };
        if self.ring(index)?.is_running() {
            poll(&kick)?;
            if let Some(old) = self.ring(index)?.replace_kick(kick) {
                let _ = poller.remove(old);
            }
        } else {
            // Requests in flight of a broken ring must not be completed in the new one.
            self.stop_ring(index, poller)?;
            let split = self.ring(index)?.prepare(table, inflight)?;
            self.device
                .start_queue(index)
                .map_err(Error::io(format!("queue {index}: starting")))?;
            // The last step that can fail: a doorbell that stayed in the poller could not be
            // added again.
            if let Err(error) = poll(&kick) {
                self.device.stop_queue(index);
                return Err(error);
            }
            self.ring(index)?.start(split, kick, inflight);
        }
        if enable {
            self.ring(index)?.set_enabled(true);
        }
        Ok(())
    }

    /// SET_VRING_ADDR. A running ring moves after its requests in flight are completed.
    ///
    /// # Errors
    /// There is no such ring, or it cannot be at these addresses; then it does not move.
    pub fn set_addresses(
        &mut self,
        index: usize,
        addresses: RingAddresses,
        table: &MemoryTable,
        poller: &Poller,
    ) -> Result<(), Error> {
        if self.ring(index)?.is_running() {
            self.drain(index, poller);
        }
        self.ring(index)?.set_addresses(addresses, table)
    }

    /// SET_VRING_ENABLE. A ring is disabled after its requests in flight are completed.
    ///
    /// # Errors
    /// There is no such ring.
    pub fn set_enabled(
        &mut self,
        index: usize,
        enabled: bool,
        poller: &Poller,
    ) -> Result<(), Error> {
        if !enabled && self.ring(index)?.is_active() {
            self.drain(index, poller);
        }
        self.ring(index)?.set_enabled(enabled);
        Ok(())
    }

    /// GET_VRING_BASE: drains and stops a ring. Returns the available index up to which it
    /// was processed.
    ///
    /// # Errors
    /// There is no such ring.
    pub fn stop(&mut self, index: usize, poller: &Poller) -> Result<u16, Error> {
        self.stop_ring(index, poller)?;
        Ok(self.ring(index)?.take_base())
    }

    /// Drains and stops a ring, whether it is running or broken, and tells the device.
    fn stop_ring(&mut self, index: usize, poller: &Poller) -> Result<(), Error> {
        if self.ring(index)?.is_stopped() {
            return Ok(());
        }
        self.drain(index, poller);
        if let Some(kick) = self.ring(index)?.stop() {
            let _ = poller.remove(kick);
        }
        self.device.stop_queue(index);
        Ok(())
    }

    /// Passes a write to the configuration space on to the device.
    ///
    /// # Errors
    /// The device has no such writable field.
    pub fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), Error> {
        self.device.write_config(offset, data)
    }

    /// The front end has left: stops all rings and unmaps its memory.
    pub fn close(&mut self, poller: &Poller) {
        self.reset(poller);
        self.device.frontend_disconnected();
    }

    /// Stops all rings and resets everything that the front end has set.
    pub fn reset(&mut self, poller: &Poller) {
        for index in 0..self.rings.len() {
            if self.rings[index].is_some() {
                // Cannot fail: the ring exists.
                let _ = self.stop_ring(index, poller);
            }
        }
        self.rings.iter_mut().flatten().for_each(Ring::reset);
        self.memory = Arc::default();
    }
}

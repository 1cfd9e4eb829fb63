//! What a worker's lock protects: the device and its rings, and what is done with them
//! between two batches and within one.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::CORE;
use crate::inflight::InflightTable;
use crate::memory::MemoryTable;
use crate::ring::RingAddresses;
use crate::{Device, DeviceContext, Error, GuestMemory, Poller, Ring};

/// What the lock protects.
pub struct WorkerState {
    device: Box<dyn Device>,
    rings: Vec<Option<Ring>>,
    pub(super) memory: Arc<GuestMemory>,
}

/// What a worker found to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WorkFound {
    Nothing,
    /// It is done.
    Work,
    /// More than it does at a time.
    More,
}

impl WorkerState {
    pub(super) fn new(
        device: Box<dyn Device>,
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
        Ok(WorkerState {
            device,
            rings,
            memory: Arc::default(),
        })
    }

    pub(super) fn is_pending(&self) -> bool {
        self.rings
            .iter()
            .flatten()
            .any(|ring| ring.pending && ring.is_running())
    }

    /// Does what there is to do. While it is `looking`, it finds work without being told.
    pub(super) fn work(&mut self, tokens: &[u64], poller: &Poller, looking: bool) -> WorkFound {
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
            if token == super::WAKE {
                continue;
            }
            if token & CORE == 0 {
                found = true;
                refill(&mut cx);
                device.handle_event(token, &mut cx);
            } else if let Some(Some(ring)) = cx.rings.get_mut((token & !CORE) as usize) {
                ring.pending = true;
            }
        }
        if looking {
            for ring in cx.rings.iter_mut().flatten() {
                ring.poll();
            }
            refill(&mut cx);
            found |= device.poll(&mut cx);
        }
        for index in 0..cx.rings.len() {
            match cx.ring(index) {
                Some(ring) if ring.pending => ring.disable_notification(),
                _ => continue,
            }
            found = true;
            device.process_queue(index, &mut cx);
        }
        for ring in cx.rings.iter_mut().flatten() {
            ring.flush();
        }
        match (found, self.is_pending()) {
            (_, true) => WorkFound::More,
            (true, false) => WorkFound::Work,
            (false, false) => WorkFound::Nothing,
        }
    }

    /// Before a sleep: doorbells on; returns whether something came in between.
    pub(super) fn enable_notification(&mut self) -> bool {
        for ring in self.rings.iter_mut().flatten() {
            ring.enable_notification();
        }
        self.is_pending()
    }

    /// A stop leaves nothing of a ring in flight, not even what was so before the start.
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
            ring.refill();
            let left = ring.to_resubmit();
            // A device that may have no more in flight than this must complete it first.
            self.device.drain_queue(index, &mut cx);
            if left == 0 {
                break;
            }
            self.device.process_queue(index, &mut cx);
            // One that does not want them leaves them to the next process; and what it took
            // before the ring broke is in flight.
            if cx.ring(index).is_none_or(|ring| ring.to_resubmit() == left) {
                self.device.drain_queue(index, &mut cx);
                break;
            }
        }
        for ring in self.rings.iter_mut().flatten() {
            ring.flush();
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

    /// A front end has come, on this socket.
    pub fn frontend_connected(&mut self, socket: BorrowedFd<'_>) {
        self.device.frontend_connected(socket);
    }

    /// The driver's feature bits.
    pub fn set_features(&mut self, features: u64) {
        for ring in self.rings.iter_mut().flatten() {
            ring.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        }
        self.device.set_features(features);
    }

    /// Completes all that is in flight.
    pub fn quiesce(&mut self, poller: &Poller) {
        for index in 0..self.rings.len() {
            self.drain(index, poller);
        }
    }

    /// Puts another memory table in place once nothing uses the old one.
    pub fn set_memory(&mut self, table: &MemoryTable, poller: &Poller) {
        self.quiesce(poller);
        self.memory = Arc::clone(table.memory());
        for ring in self.rings.iter_mut().flatten() {
            ring.replace_memory(table);
        }
    }

    /// Starts a ring, with the table of what is in flight there if there is one. One that
    /// runs gets another doorbell.
    ///
    /// # Errors
    /// When its addresses make no sense, the inflight table has no room for it, the device
    /// cannot start it, or its doorbell cannot be polled.
    pub fn start(
        &mut self,
        index: usize,
        kick: OwnedFd,
        enable: bool,
        table: &MemoryTable,
        inflight: Option<&Arc<InflightTable>>,
        poller: &Poller,
    ) -> Result<(), Error> {
        let token = CORE | index as u64;
        let watch = |kick: &OwnedFd| {
            let what = format!("queue {index}: watching its doorbell");
            poller.add_readable(kick, token).map_err(Error::io(what))
        };
        let ring = self.ring(index)?;
        if ring.is_started() {
            watch(&kick)?;
            if let Some(old) = ring.replace_kick(kick) {
                let _ = poller.remove(old);
            }
        } else {
            // What is in flight of a broken ring must not be completed in the new one.
            self.end(index, poller)?;
            let ring = self.ring(index)?;
            ring.place(table)?;
            if let Some(inflight) = inflight {
                ring.must_fit(inflight)?;
            }
            self.device
                .start_queue(index)
                .map_err(Error::io(format!("queue {index}: starting")))?;
            // Last what cannot be taken back: a doorbell that stayed in the poller would be
            // in its own way next time.
            if let Err(error) = watch(&kick) {
                self.device.stop_queue(index);
                return Err(error);
            }
            self.ring(index)?.start(kick, inflight);
        }
        if enable {
            self.ring(index)?.set_enabled(true);
        }
        Ok(())
    }

    /// Changes where a ring is. A running one moves when nothing of it is in flight.
    ///
    /// # Errors
    /// When there is no such ring, or it cannot be there; then it stays where it is.
    pub fn set_addresses(
        &mut self,
        index: usize,
        addresses: RingAddresses,
        table: &MemoryTable,
        poller: &Poller,
    ) -> Result<(), Error> {
        if self.ring(index)?.is_started() {
            self.drain(index, poller);
        }
        self.ring(index)?.set_addresses(addresses, table)
    }

    /// Enables a ring, or disables it when nothing of it is in flight any more.
    ///
    /// # Errors
    /// When there is no such ring.
    pub fn set_enabled(
        &mut self,
        index: usize,
        enabled: bool,
        poller: &Poller,
    ) -> Result<(), Error> {
        if !enabled && self.ring(index)?.is_running() {
            self.drain(index, poller);
        }
        self.ring(index)?.set_enabled(enabled);
        Ok(())
    }

    /// Stops a ring: drained, silent, and its doorbell out of the poller.
    ///
    /// # Errors
    /// When there is no such ring.
    pub fn stop(&mut self, index: usize, poller: &Poller) -> Result<u16, Error> {
        self.end(index, poller)?;
        Ok(self.ring(index)?.stop())
    }

    /// Whether it ran or broke, a ring ends drained, and the device hears of it once.
    fn end(&mut self, index: usize, poller: &Poller) -> Result<(), Error> {
        if !self.ring(index)?.was_started() {
            return Ok(());
        }
        self.drain(index, poller);
        if let Some(kick) = self.ring(index)?.end() {
            let _ = poller.remove(kick);
        }
        self.device.stop_queue(index);
        Ok(())
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
        self.reset(poller);
        self.device.frontend_disconnected();
    }

    /// All rings stop, and nothing of what the front end has set stays.
    pub fn reset(&mut self, poller: &Poller) {
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
    }
}

/// All rings may be served a batch's worth again.
fn refill(cx: &mut DeviceContext<'_>) {
    for ring in cx.rings.iter_mut().flatten() {
        ring.refill();
    }
}

//! A split virtqueue from the device's side (virtio 1.2 section 2.7), with the eventfds
//! through which driver and device notify each other.
//!
//! A [`Ring`] has two parts. `RingSettings` is what the front end sets: addresses, size,
//! base, eventfds, enabled. `RunningRing` exists while the ring runs and owns what moves
//! data: the mapped ring, its positions and the requests in flight.

use std::fmt::Display;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::fault::{self, FaultPoint};
use crate::inflight::InflightTable;
use crate::memory::MemoryTable;
use crate::split_ring::SplitRing;
use crate::{DescriptorChain, Error, GuestMemory};

mod running;
mod settings;

use running::RunningRing;
pub use settings::RingAddresses;
use settings::{RingSettings, signal};

/// The largest size of a split ring.
const MAX_RING_SIZE: u16 = 1 << 15;

#[expect(
    clippy::large_enum_variant,
    reason = "few rings, and no indirection on the data path"
)]
enum RingState {
    /// Not started, or stopped by GET_VRING_BASE.
    Stopped,
    /// Started by SET_VRING_KICK.
    Running(RunningRing),
    /// The driver corrupted the ring; only another start helps.
    Broken,
}

/// One virtqueue.
pub struct Ring {
    index: usize,
    max_size: u16,
    settings: RingSettings,
    state: RingState,
}

impl Ring {
    /// A stopped ring.
    ///
    /// # Errors
    /// `max_size` is not a power of two up to 32768.
    pub fn new(index: usize, max_size: u16) -> Result<Self, Error> {
        check_size(index, max_size.into(), MAX_RING_SIZE)?;
        Ok(Ring {
            index,
            max_size,
            settings: RingSettings {
                size: max_size,
                ..RingSettings::default()
            },
            state: RingState::Stopped,
        })
    }

    /// Queue index.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Whether the device may work on the ring: it is running and enabled.
    pub fn is_active(&self) -> bool {
        self.settings.enabled && matches!(self.state, RingState::Running(_))
    }

    /// Whether the ring was started and is neither stopped nor broken.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, RingState::Running(_))
    }

    pub(crate) fn is_stopped(&self) -> bool {
        matches!(self.state, RingState::Stopped)
    }

    /// The running ring, if it is also enabled.
    #[inline]
    fn active(&mut self) -> Option<&mut RunningRing> {
        match &mut self.state {
            RingState::Running(running) if self.settings.enabled => Some(running),
            _ => None,
        }
    }
}

/// What the main thread does with a ring, on behalf of the front end.
impl Ring {
    pub(crate) fn set_size(&mut self, size: u32) -> Result<(), Error> {
        self.settings.size = check_size(self.index, size, self.max_size)?;
        Ok(())
    }

    pub(crate) fn set_addresses(
        &mut self,
        addresses: RingAddresses,
        table: &MemoryTable,
    ) -> Result<(), Error> {
        let old = self.settings.addresses.replace(addresses);
        if let RingState::Running(running) = &mut self.state {
            match self.settings.map(self.index, table) {
                Ok(split) => running.replace_split_ring(split),
                Err(error) => {
                    self.settings.addresses = old;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn set_base(&mut self, base: u16) {
        self.settings.base = base;
        if let RingState::Running(running) = &mut self.state {
            running.next_avail = base;
        }
    }

    /// QEMU sets the call eventfd once more after the start, and loses interrupts that were
    /// sent to the first one. So a ring that resumed sends its interrupt again.
    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.settings.call = call;
        if let RingState::Running(running) = &mut self.state {
            running.signal_again_if_resumed();
        }
    }

    pub(crate) fn set_err(&mut self, err: Option<OwnedFd>) {
        self.settings.err = err;
    }

    pub(crate) fn set_enabled(&mut self, enabled: bool) {
        self.settings.enabled = enabled;
        if let RingState::Running(running) = &mut self.state {
            running.pending |= enabled;
        }
    }

    pub(crate) fn set_event_idx(&mut self, on: bool) {
        self.settings.event_idx = on;
        if let RingState::Running(running) = &mut self.state {
            running.split.set_event_idx(on);
        }
    }

    /// Maps the ring and checks that it can start, with `inflight` if there is a table.
    ///
    /// # Errors
    /// The ring is not in guest memory, or the table has no room for it.
    pub(crate) fn prepare(
        &self,
        table: &MemoryTable,
        inflight: Option<&Arc<InflightTable>>,
    ) -> Result<SplitRing, Error> {
        let split = self.settings.map(self.index, table)?;
        if let Some(inflight) = inflight {
            inflight.check_room(self.index, self.settings.size)?;
        }
        Ok(split)
    }

    /// SET_VRING_KICK (vhost-user, "Ring states"): starts the ring on `split`, which
    /// [`Ring::prepare`] returned. The ring resumes where `inflight` says, or without a
    /// table where SET_VRING_BASE said.
    pub(crate) fn start(
        &mut self,
        split: SplitRing,
        kick: OwnedFd,
        inflight: Option<&Arc<InflightTable>>,
    ) {
        self.settings.kick = Some(kick);
        match RunningRing::new(self.index, split, self.settings.base, inflight) {
            Ok(running) => self.state = RingState::Running(running),
            Err(why) => self.break_down(&why),
        }
    }

    /// SET_VRING_KICK while the ring runs; returns the old doorbell.
    pub(crate) fn replace_kick(&mut self, kick: OwnedFd) -> Option<OwnedFd> {
        self.notified();
        self.settings.kick.replace(kick)
    }

    /// The memory table has changed.
    pub(crate) fn replace_memory(&mut self, table: &MemoryTable) {
        if let RingState::Running(running) = &mut self.state {
            match self.settings.map(self.index, table) {
                Ok(split) => running.replace_split_ring(split),
                Err(error) => self.break_down(&error),
            }
        }
    }

    /// Stops the ring: nothing is done here until the next start. Returns the doorbell.
    pub(crate) fn stop(&mut self) -> Option<OwnedFd> {
        self.leave_running(RingState::Stopped);
        self.settings.kick.take()
    }

    /// The answer to GET_VRING_BASE of a stopped ring, which also drops the call eventfd.
    pub(crate) fn take_base(&mut self) -> u16 {
        self.settings.call = None;
        self.settings.base
    }

    /// Resets everything that the front end has set.
    pub(crate) fn reset(&mut self) {
        self.state = RingState::Stopped;
        self.settings = RingSettings {
            size: self.max_size,
            ..RingSettings::default()
        };
    }

    fn leave_running(&mut self, state: RingState) {
        if let RingState::Running(running) = &self.state {
            self.settings.base = running.next_avail;
        }
        self.state = state;
    }

    fn break_down(&mut self, error: &dyn Display) {
        let queue = self.index;
        tracing::error!(queue, %error, "the ring is corrupt; the queue stops until its next start");
        self.leave_running(RingState::Broken);
        signal(self.settings.err.as_ref(), queue);
    }
}

/// What the worker does around a batch.
impl Ring {
    /// The doorbell rang, or the ring must be processed for another reason.
    pub(crate) fn notified(&mut self) {
        if let RingState::Running(running) = &mut self.state {
            running.pending = true;
        }
    }

    /// Whether the ring must be processed although no event reports it.
    pub(crate) fn is_pending(&self) -> bool {
        matches!(&self.state, RingState::Running(running) if running.pending && self.settings.enabled)
    }

    /// How many requests that an earlier process left in flight are still to be popped.
    pub(crate) fn to_resubmit(&self) -> usize {
        match &self.state {
            RingState::Running(running) if self.settings.enabled => running.to_resubmit(),
            _ => 0,
        }
    }

    /// Lets the device pop another batch of requests.
    pub(crate) fn refill_budget(&mut self) {
        if let RingState::Running(running) = &mut self.state {
            running.refill_budget();
        }
    }

    /// Checks for new requests while the doorbell is off.
    pub(crate) fn poll(&mut self) {
        if let Some(running) = self.active() {
            running.poll();
        }
    }

    /// Before a batch: turns the doorbell off, for the device looks at the ring anyway.
    pub(crate) fn disable_notification(&mut self) {
        if let Some(running) = self.active() {
            running.pending = false;
            running.refill_budget();
            running.split.disable_notification();
        }
    }

    /// Before a sleep: turns the doorbell on and checks once more for new requests.
    pub(crate) fn enable_notification(&mut self) {
        if let Some(running) = self.active() {
            running.enable_notification();
        }
    }

    /// After a batch: returns the refused requests, and sends the interrupt if the driver
    /// wants one or may have missed one.
    pub(crate) fn flush(&mut self) {
        let Some(running) = self.active() else { return };
        match running.flush() {
            Ok(false) => {}
            Ok(true) => {
                fault::hit(FaultPoint::Interrupt);
                signal(self.settings.call.as_ref(), self.index);
            }
            Err(why) => self.break_down(&why),
        }
    }
}

/// What a device does with a ring. On a ring that is not active nothing happens: a request
/// that was in flight when the ring broke is not completed.
impl Ring {
    /// Returns the next request, or `None` when there is none now, or enough for one batch.
    /// A malformed descriptor chain is refused, and the next one is tried.
    #[inline]
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Option<DescriptorChain<'m>> {
        match self.active()?.pop(memory) {
            Ok(chain) => chain,
            Err(why) => {
                self.break_down(&why);
                None
            }
        }
    }

    /// Refuses `chain`: it is returned to the driver at the end of the batch with nothing
    /// written, unless [`Ring::undo_pop`] takes it back before.
    pub fn refuse(&mut self, chain: &DescriptorChain<'_>) {
        if let Some(running) = self.active() {
            running.refuse(chain.head, chain.origin);
        }
    }

    /// Puts `chain` and all requests that were popped after it back, as if they had not
    /// been popped. None of them may be completed.
    pub fn undo_pop(&mut self, chain: &DescriptorChain<'_>) {
        if let Some(Err(why)) = self.active().map(|running| running.undo_pop(chain)) {
            self.break_down(&why);
        }
    }

    /// Asks for another [`Device::process_queue`](crate::Device::process_queue) although
    /// nothing new may have come: the device has done enough for one batch.
    pub fn process_again(&mut self) {
        self.notified();
    }

    /// Completes the request with head `head`, into whose writable buffers the device wrote
    /// `written` bytes.
    pub fn add_used(&mut self, head: u16, written: u32) {
        self.add_used_batch(&[(head, written)]);
    }

    /// Completes several requests, heads and lengths, which the driver sees all at once.
    pub fn add_used_batch(&mut self, completed: &[(u16, u32)]) {
        if let Some(Err(why)) = self
            .active()
            .filter(|_| !completed.is_empty())
            .map(|running| running.add_used_batch(completed))
        {
            self.break_down(&why);
        }
    }

    /// Whether another error of this queue may be logged. A hostile guest must not fill the
    /// log, so their number is limited from one start of the ring to the next.
    pub fn may_log_error(&mut self) -> bool {
        self.active().is_some_and(RunningRing::may_log_error)
    }
}

/// A size that a split ring can have (virtio 1.2 section 2.7).
fn check_size(queue: usize, size: u32, max: u16) -> Result<u16, Error> {
    u16::try_from(size)
        .ok()
        .filter(|value| value.is_power_of_two() && *value <= max)
        .ok_or(Error::RingSize { queue, size, max })
}

#[cfg(test)]
mod tests;

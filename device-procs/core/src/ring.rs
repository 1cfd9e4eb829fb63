//! A split virtqueue from the device's side (virtio 1.2 section 2.7), with the
//! descriptors through which driver and device wake each other.

use std::fmt::Display;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::chain::ChainOrigin;
use crate::fault::{self, FaultPoint};
use crate::inflight::{InflightTable, InflightTracker};
use crate::memory::MemoryTable;
use crate::split::{RingLayout, SplitRing};
use crate::{DescriptorChain, Error, GuestMemory};

/// Chains that one batch takes from one ring at most, so that other rings and
/// the control thread get their turn.
const BATCH: u32 = 256;

/// The most entries that a split ring can have.
const MAX_SIZE: u16 = 1 << 15;

/// Complaints about the guest that are logged from one start of a ring to the
/// next: a hostile guest must not fill the log.
const MAX_REPORTED_ERRORS: u32 = 10;

/// Ring addresses as SET_VRING_ADDR gives them: front-end user addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RingState {
    /// Not started, or stopped by GET_VRING_BASE.
    Stopped,
    /// Started by SET_VRING_KICK.
    Started,
    /// The guest corrupted it; only a new start helps.
    Broken,
}

/// One virtqueue.
pub struct Ring {
    index: usize,
    max_size: u16,
    size: u16,
    event_idx: bool,
    /// Where it is, while it is started.
    split: Option<SplitRing>,
    /// Available index up to which it is served.
    next_avail: u16,
    /// Used index up to which requests are completed.
    next_used: u16,
    /// Requests that are popped and not pushed.
    in_flight: u16,
    addresses: Option<RingAddresses>,
    state: RingState,
    enabled: bool,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    /// What is in flight, if the front end keeps a table of it.
    tracker: Option<InflightTracker>,
    /// Popped, and to go back unused at the end of the batch: until then what was popped
    /// before may be put back, and these with it.
    refused: Vec<(u16, ChainOrigin)>,
    /// Must be served although no event says so.
    pub(crate) pending: bool,
    budget: u32,
    starved: bool,
    pushed: bool,
    /// Used index up to which the driver has been told.
    announced: u16,
    /// Somebody served the ring before this start, and may have died with an interrupt
    /// still to be sent.
    resumed: bool,
    /// The driver is to be told in any case.
    unannounced: bool,
    reported_errors: u32,
}

impl Ring {
    /// A stopped ring.
    ///
    /// # Errors
    /// When `max_size` is no power of two up to 32768.
    pub fn new(index: usize, max_size: u16) -> Result<Self, Error> {
        check_size(index, max_size.into(), MAX_SIZE)?;
        Ok(Ring {
            index,
            max_size,
            size: max_size,
            event_idx: false,
            split: None,
            next_avail: 0,
            next_used: 0,
            in_flight: 0,
            addresses: None,
            state: RingState::Stopped,
            enabled: false,
            kick: None,
            call: None,
            err: None,
            tracker: None,
            refused: Vec::new(),
            pending: false,
            budget: 0,
            starved: false,
            pushed: false,
            announced: 0,
            resumed: false,
            unannounced: false,
            reported_errors: 0,
        })
    }

    /// Whether the device may work on it: started, enabled and not corrupt.
    pub fn is_running(&self) -> bool {
        self.state == RingState::Started && self.enabled
    }

    /// Whether it was started and is neither stopped nor corrupt; enabled or not.
    pub(crate) fn is_started(&self) -> bool {
        self.state == RingState::Started
    }

    /// Whether it was started and not stopped since, corrupt or not.
    pub(crate) fn was_started(&self) -> bool {
        self.state != RingState::Stopped
    }

    /// Queue index.
    pub fn index(&self) -> usize {
        self.index
    }

    // What the control thread does with a ring ------------------------------

    pub(crate) fn set_size(&mut self, size: u32) -> Result<(), Error> {
        self.size = check_size(self.index, size, self.max_size)?;
        Ok(())
    }

    pub(crate) fn set_addresses(
        &mut self,
        addresses: RingAddresses,
        table: &MemoryTable,
    ) -> Result<(), Error> {
        let old = self.addresses.replace(addresses);
        let placed = match self.is_started() {
            true => self.place(table),
            false => Ok(()),
        };
        if placed.is_err() {
            self.addresses = old;
        }
        placed
    }

    pub(crate) fn set_base(&mut self, base: u16) {
        self.next_avail = base;
    }

    /// QEMU says where interrupts go once more after the start, and forgets those that
    /// went where it said first.
    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call;
        if self.state == RingState::Started && self.resumed {
            self.unannounced = true;
            self.pending = true;
        }
    }

    pub(crate) fn set_err(&mut self, err: Option<OwnedFd>) {
        self.err = err;
    }

    pub(crate) fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
        self.pending |= enabled;
    }

    pub(crate) fn set_event_idx(&mut self, on: bool) {
        self.event_idx = on;
        if let Some(split) = &mut self.split {
            split.set_event_idx(on);
        }
    }

    /// Puts the rings where the front end says and picks up the used index that
    /// whoever served this ring before has reached.
    ///
    /// # Errors
    /// When they are not in guest memory.
    pub(crate) fn place(&mut self, table: &MemoryTable) -> Result<(), Error> {
        let queue = self.index;
        let at = |address| {
            table
                .to_guest(address)
                .ok_or(Error::RingAddress { queue, address })
        };
        let addresses = self.addresses.unwrap_or_default();
        let place = RingLayout {
            descriptors: at(addresses.descriptors)?,
            available: at(addresses.available)?,
            used: at(addresses.used)?,
        };
        let split = SplitRing::new(table.memory(), place, self.size, self.event_idx)
            .ok_or(Error::RingPlacement { queue })?;
        self.next_used = split.used_index();
        self.announced = self.next_used;
        self.split = Some(split);
        Ok(())
    }

    /// Whether `table` has room for this ring.
    ///
    /// # Errors
    /// When it has not.
    pub(crate) fn must_fit(&self, table: &InflightTable) -> Result<(), Error> {
        table.must_hold(self.index, self.size)
    }

    /// SET_VRING_KICK: the ring, which has its place, starts (vhost-user, "Ring
    /// states"). With `inflight`, it goes on where the table says.
    pub(crate) fn start(&mut self, kick: OwnedFd, inflight: Option<&Arc<InflightTable>>) {
        self.state = RingState::Started;
        self.pending = true;
        (self.pushed, self.starved) = (false, false);
        self.refused.clear();
        self.reported_errors = 0;
        self.in_flight = 0;
        self.resumed = self.next_used != 0;
        self.unannounced = self.resumed;
        if let Err(error) = self.recover(inflight) {
            self.break_down(&error);
        }
        self.kick = Some(kick);
    }

    /// SET_VRING_KICK while it runs; returns the doorbell that it had.
    pub(crate) fn replace_kick(&mut self, kick: OwnedFd) -> Option<OwnedFd> {
        self.pending = true;
        self.kick.replace(kick)
    }

    /// Finds out where a ring with an inflight table is. What SET_VRING_BASE said does
    /// not count: nobody but the table knows after a death, and after an orderly stop
    /// both say the same.
    fn recover(&mut self, inflight: Option<&Arc<InflightTable>>) -> Result<(), Error> {
        self.tracker = None;
        let (Some(table), Some(split)) = (inflight, &self.split) else {
            return Ok(());
        };
        let queue = self.index;
        let (used, available) = (self.next_used, split.available_index());
        let tracker =
            InflightTracker::recover(Arc::clone(table), queue, split.size(), used, available)?;
        let inflight = tracker.inflight();
        self.next_avail = used.wrapping_add(inflight);
        if inflight > 0 {
            tracing::info!("queue {queue}: {inflight} requests were in flight: done again");
        }
        self.tracker = Some(tracker);
        Ok(())
    }

    /// How many requests a process before this one left undone that are not taken again.
    pub(crate) fn to_resubmit(&self) -> usize {
        match &self.tracker {
            Some(tracker) if self.is_running() => tracker.to_resubmit(),
            _ => 0,
        }
    }

    /// The memory table changed under a started ring.
    pub(crate) fn replace_memory(&mut self, table: &MemoryTable) {
        if self.is_started()
            && let Err(error) = self.place(table)
        {
            self.break_down(&error);
        }
    }

    /// Nothing more is done here until a start. Returns the doorbell.
    pub(crate) fn end(&mut self) -> Option<OwnedFd> {
        self.state = RingState::Stopped;
        self.split = None;
        self.pending = false;
        self.tracker = None;
        self.kick.take()
    }

    /// GET_VRING_BASE: the ring, which has ended, is silent, too; returns the next available
    /// index.
    pub(crate) fn stop(&mut self) -> u16 {
        self.call = None;
        self.next_avail
    }

    /// The front end left: nothing of what it set stays.
    pub(crate) fn reset(&mut self) {
        self.stop();
        self.size = self.max_size;
        self.event_idx = false;
        (self.next_avail, self.next_used) = (0, 0);
        self.enabled = false;
        self.addresses = None;
        self.err = None;
    }

    // What a batch does with a ring ------------------------------------------

    /// Before a batch: while the device looks anyway, doorbells are a waste.
    pub(crate) fn disable_notification(&mut self) {
        self.pending = false;
        self.refill();
        if let Some(split) = &self.split {
            split.disable_doorbell();
        }
    }

    /// The device may take a batch's worth of chains again.
    pub(crate) fn refill(&mut self) {
        self.budget = BATCH;
    }

    /// Whether something has come since the ring ran dry, although the doorbell is off.
    pub(crate) fn poll(&mut self) {
        if self.starved
            && let Some(split) = self.running()
        {
            self.pending |= split.available_index() != self.next_avail;
        }
    }

    /// Before a sleep: the doorbell on again if the ring ran dry, and one look more, for
    /// what came in between.
    pub(crate) fn enable_notification(&mut self) {
        if self.starved
            && let Some(split) = self.running()
        {
            self.pending |= split.enable_doorbell(self.next_avail);
            self.starved = false;
        }
    }

    /// After a batch: the interrupt, if the driver wants one or may have missed one.
    pub(crate) fn flush(&mut self) {
        let refused = std::mem::take(&mut self.refused);
        let empty: Vec<(u16, u32)> = refused.iter().map(|&(head, _)| (head, 0)).collect();
        self.complete(&empty);
        let new = self.next_used;
        let Some(split) = self.running() else { return };
        let wanted = self.unannounced || self.pushed && split.wants_interrupt(self.announced, new);
        if self.unannounced || self.pushed {
            self.announced = new;
        }
        (self.unannounced, self.pushed) = (false, false);
        if wanted {
            self.signal();
        }
    }

    fn running(&self) -> Option<&SplitRing> {
        self.split.as_ref().filter(|_| self.is_running())
    }

    fn signal(&self) {
        fault::hit(FaultPoint::Interrupt);
        if let Some(call) = &self.call
            && let Err(error) = rustix::io::write(call, &1u64.to_ne_bytes())
        {
            // EAGAIN: the counter is full, so the interrupt is pending anyway.
            tracing::debug!("queue {}: call: {error}", self.index);
        }
    }

    /// The next request, or `None` when there is none now. A chain that no
    /// driver may build is refused, and the next is tried.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Option<DescriptorChain<'m>> {
        while self.is_running() {
            if self.budget == 0 {
                self.pending = true;
                return None;
            }
            self.budget -= 1;
            let (head, origin) = self.take()?;
            fault::hit(FaultPoint::Popped);
            let split = self.split.as_ref()?;
            match DescriptorChain::parse(self.index, origin, head, split, memory) {
                Ok(chain) => return Some(chain),
                Err(error) => {
                    self.report_error(&error);
                    self.refused.push((head, origin));
                }
            }
        }
        None
    }

    /// The head of the next request, which is in flight from now on.
    fn take(&mut self) -> Option<(u16, ChainOrigin)> {
        let again = self
            .tracker
            .as_mut()
            .map_or(Ok(None), InflightTracker::take_again);
        match again {
            Ok(Some(head)) => {
                self.in_flight = self.in_flight.saturating_add(1);
                return Some((head, ChainOrigin::Inflight));
            }
            Ok(None) => {}
            Err(why) => {
                self.corrupt(&why);
                return None;
            }
        }
        let head = match self.available() {
            Ok(Some(head)) => head,
            Ok(None) => {
                self.starved = true;
                return None;
            }
            Err(why) => {
                self.corrupt(&why);
                return None;
            }
        };
        let position = self.next_avail;
        if let Some(tracker) = &mut self.tracker
            && let Err(why) = tracker.take(head, position)
        {
            self.corrupt(&why);
            return None;
        }
        self.next_avail = position.wrapping_add(1);
        self.in_flight += 1;
        Some((head, ChainOrigin::Available(position)))
    }

    /// The head of what the driver has made available next.
    fn available(&self) -> Result<Option<u16>, &'static str> {
        let Some(split) = &self.split else {
            return Ok(None);
        };
        let waiting = split.available_index().wrapping_sub(self.next_avail);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > split.size() {
            return Err("more requests are available than it has entries");
        }
        if self.in_flight >= split.size() {
            return Err("more requests are in flight than it has entries");
        }
        let head = split.head(self.next_avail);
        if head >= split.size() {
            return Err("a request's number is too high");
        }
        Ok(Some(head))
    }

    /// The device has no use for `chain`: it goes back with nothing written at the end of
    /// the batch, unless it is put back before.
    pub fn refuse(&mut self, chain: &DescriptorChain<'_>) {
        self.refused.push((chain.head, chain.origin));
    }

    /// Puts `chain`, and all that was popped after it, back, as if it had never
    /// been taken. None of it may have been pushed.
    pub fn undo_pop(&mut self, chain: &DescriptorChain<'_>) {
        self.starved = false;
        if self.tracker.is_none() {
            if let ChainOrigin::Available(position) = chain.origin {
                let count = self.next_avail.wrapping_sub(position);
                self.refused.retain(|&(_, origin)| {
                    !matches!(origin, ChainOrigin::Available(at) if at.wrapping_sub(position) < count)
                });
                self.in_flight = self.in_flight.saturating_sub(count);
                self.next_avail = position;
            }
            return;
        }
        while let Some(tracker) = &mut self.tracker {
            match tracker.take_back() {
                Ok(Some(last)) => {
                    self.in_flight = self.in_flight.saturating_sub(1);
                    self.refused.retain(|refused| *refused != last);
                    if let (_, ChainOrigin::Available(position)) = last {
                        self.next_avail = position;
                    }
                    if last == (chain.head, chain.origin) {
                        return;
                    }
                }
                Ok(None) => return,
                Err(why) => return self.corrupt(&why),
            }
        }
    }

    /// The device has done enough for one batch: it wants to be called again
    /// although nothing new may have come.
    pub fn serve_again(&mut self) {
        self.pending = true;
    }

    /// Completes the request with head `head`, into whose writable buffers
    /// `written` bytes went.
    pub fn add_used(&mut self, head: u16, written: u32) {
        self.add_used_batch(&[(head, written)]);
    }

    /// Completes several requests, which the driver gets to see all at once. One that was
    /// in flight when the ring broke goes nowhere.
    pub fn add_used_batch(&mut self, completed: &[(u16, u32)]) {
        self.complete(completed);
    }

    fn complete(&mut self, completed: &[(u16, u32)]) {
        if !self.is_running() || completed.is_empty() {
            return;
        }
        match self.try_push(completed) {
            Ok(()) => self.pushed = true,
            Err(why) => self.corrupt(&why),
        }
    }

    /// The order matters: whatever the last step of a process is, the next one must see
    /// from the table and the used index together what is completed.
    fn try_push(&mut self, completed: &[(u16, u32)]) -> Result<(), String> {
        fault::hit(FaultPoint::Done);
        let Some(split) = &self.split else {
            return Ok(());
        };
        let mut next = self.next_used;
        for &(head, written) in completed {
            if head >= split.size() {
                return Err(format!("there is no request {head} to complete"));
            }
            if let Some(tracker) = &self.tracker {
                tracker.link(head)?;
            }
            split.complete(next, head, written);
            next = next.wrapping_add(1);
        }
        fault::hit(FaultPoint::Written);
        split.publish(next);
        let count = next.wrapping_sub(self.next_used);
        self.next_used = next;
        self.in_flight = self.in_flight.saturating_sub(count);
        fault::hit(FaultPoint::Published);
        match &mut self.tracker {
            Some(tracker) => tracker.complete(completed, next),
            None => Ok(()),
        }
    }

    /// Logs what is wrong with a request, unless there was too much of it already.
    pub fn report_error(&mut self, what: &dyn Display) {
        match self.reported_errors {
            0..MAX_REPORTED_ERRORS => tracing::warn!("{what}"),
            MAX_REPORTED_ERRORS => tracing::warn!("{what}; no more is logged of this queue"),
            _ => return,
        }
        self.reported_errors += 1;
    }

    fn corrupt(&mut self, why: &dyn Display) {
        let error = Error::Corrupt {
            queue: self.index,
            why: why.to_string(),
        };
        self.break_down(&error);
    }

    fn break_down(&mut self, error: &Error) {
        tracing::error!("{error}; the queue stops until it is set up again");
        self.state = RingState::Broken;
        self.split = None;
        if let Some(err) = &self.err {
            // Nobody may listen, and there is nothing to do about it.
            let _ = rustix::io::write(err, &1u64.to_ne_bytes());
        }
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

//! A split virtqueue from the device's side (virtio 1.2 section 2.7), with the
//! descriptors through which driver and device wake each other.

use std::fmt::Display;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::chain::Origin;
use crate::fault::{self, Point};
use crate::inflight::{Table, Tracker};
use crate::memory::MemoryTable;
use crate::{Chain, Error, GuestMemory};

/// Chains that one batch takes from one ring at most, so that other rings and
/// the control thread get their turn.
const BATCH: u32 = 256;

/// Complaints about the guest that are logged from one start of a ring to the
/// next: a hostile guest must not fill the log.
const COMPLAINTS: u32 = 10;

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
enum State {
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
    queue: Queue,
    addresses: Option<RingAddresses>,
    state: State,
    enabled: bool,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    /// What is in flight, if the front end keeps a table of it.
    tracker: Option<Tracker>,
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
    complaints: u32,
}

impl Ring {
    /// A stopped ring.
    ///
    /// # Errors
    /// When `max_size` is no power of two up to 32768.
    pub fn new(index: usize, max_size: u16) -> Result<Self, Error> {
        let queue = Queue::new(max_size).map_err(|_| Error::RingSize {
            queue: index,
            size: max_size.into(),
            max: 32768,
        })?;
        Ok(Ring {
            index,
            queue,
            addresses: None,
            state: State::Stopped,
            enabled: false,
            kick: None,
            call: None,
            err: None,
            tracker: None,
            pending: false,
            budget: 0,
            starved: false,
            pushed: false,
            announced: 0,
            resumed: false,
            unannounced: false,
            complaints: 0,
        })
    }

    /// Whether the device may work on it: started, enabled and not corrupt.
    pub fn is_running(&self) -> bool {
        self.state == State::Started && self.enabled
    }

    /// Whether it was started and is neither stopped nor corrupt; enabled or not.
    pub(crate) fn is_started(&self) -> bool {
        self.state == State::Started
    }

    /// Whether it was started and not stopped since, corrupt or not.
    pub(crate) fn was_started(&self) -> bool {
        self.state != State::Stopped
    }

    /// Queue index.
    pub fn index(&self) -> usize {
        self.index
    }

    // What the control thread does with a ring ------------------------------

    pub(crate) fn set_size(&mut self, size: u32) -> Result<(), Error> {
        u16::try_from(size)
            .ok()
            .and_then(|value| self.queue.try_set_size(value).ok())
            .ok_or(Error::RingSize {
                queue: self.index,
                size,
                max: self.queue.max_size(),
            })
    }

    pub(crate) fn set_addresses(
        &mut self,
        addresses: RingAddresses,
        table: &MemoryTable,
    ) -> Result<(), Error> {
        let old = self.addresses.replace(addresses);
        if self.is_started()
            && let Err(error) = self.place(table)
        {
            self.addresses = old;
            // It was there before.
            self.replace_memory(table);
            return Err(error);
        }
        Ok(())
    }

    pub(crate) fn set_base(&mut self, base: u16) {
        self.queue.set_next_avail(base);
    }

    /// QEMU says where interrupts go once more after the start, and forgets those that
    /// went where it said first.
    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call;
        if self.state == State::Started && self.resumed {
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
        self.queue.set_event_idx(on);
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
        let (descriptors, available, used) = (
            at(addresses.descriptors)?,
            at(addresses.available)?,
            at(addresses.used)?,
        );
        let memory: &GuestMemory = table.memory();
        let misplaced = |_| Error::RingPlacement { queue };
        self.queue
            .try_set_desc_table_address(descriptors)
            .and_then(|()| self.queue.try_set_avail_ring_address(available))
            .and_then(|()| self.queue.try_set_used_ring_address(used))
            .map_err(misplaced)?;
        self.queue.set_ready(true);
        if !self.queue.is_valid(memory) {
            return Err(Error::RingPlacement { queue });
        }
        let used = self
            .queue
            .used_idx(memory, Ordering::Acquire)
            .map_err(misplaced)?;
        self.queue.set_next_used(used.0);
        self.announced = used.0;
        Ok(())
    }

    /// Whether `table` has room for this ring.
    ///
    /// # Errors
    /// When it has not.
    pub(crate) fn must_fit(&self, table: &Table) -> Result<(), Error> {
        table.must_hold(self.index, self.queue.size())
    }

    /// SET_VRING_KICK: the ring, which has its place, starts (vhost-user, "Ring
    /// states"). With `inflight`, it goes on where the table says.
    pub(crate) fn start(
        &mut self,
        kick: OwnedFd,
        inflight: Option<&Arc<Table>>,
        memory: &GuestMemory,
    ) {
        self.state = State::Started;
        self.pending = true;
        (self.pushed, self.starved) = (false, false);
        self.complaints = 0;
        self.resumed = self.queue.next_used() != 0;
        self.unannounced = self.resumed;
        if let Err(error) = self.recover(inflight, memory) {
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
    fn recover(
        &mut self,
        inflight: Option<&Arc<Table>>,
        memory: &GuestMemory,
    ) -> Result<(), Error> {
        self.tracker = None;
        let Some(table) = inflight else { return Ok(()) };
        let queue = self.index;
        let available = self
            .queue
            .avail_idx(memory, Ordering::Acquire)
            .map_err(|_| Error::RingPlacement { queue })?;
        let used = self.queue.next_used();
        let size = self.queue.size();
        let tracker = Tracker::recover(Arc::clone(table), queue, size, used, available.0)?;
        let inflight = tracker.inflight();
        self.queue.set_next_avail(used.wrapping_add(inflight));
        if inflight > 0 {
            tracing::info!("queue {queue}: {inflight} requests were in flight: done again");
        }
        self.tracker = Some(tracker);
        Ok(())
    }

    /// How many requests a process before this one left undone that are not taken again.
    pub(crate) fn left_overs(&self) -> usize {
        match &self.tracker {
            Some(tracker) if self.is_running() => tracker.left_overs(),
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
        self.state = State::Stopped;
        self.queue.set_ready(false);
        self.pending = false;
        self.tracker = None;
        self.kick.take()
    }

    /// GET_VRING_BASE: the ring, which has ended, is silent, too; returns the next available
    /// index.
    pub(crate) fn stop(&mut self) -> u16 {
        self.call = None;
        self.queue.next_avail()
    }

    /// The front end left: nothing of what it set stays.
    pub(crate) fn reset(&mut self) {
        self.stop();
        self.queue.reset();
        self.enabled = false;
        self.addresses = None;
        self.err = None;
    }

    // What a batch does with a ring ------------------------------------------

    /// Before a batch: while the device looks anyway, doorbells are a waste.
    pub(crate) fn begin(&mut self, memory: &GuestMemory) {
        self.pending = false;
        self.refill();
        if let Err(error) = self.queue.disable_notification(memory) {
            self.corrupt(&error);
        }
    }

    /// The device may take a batch's worth of chains again.
    pub(crate) fn refill(&mut self) {
        self.budget = BATCH;
    }

    /// Whether something has come since the ring ran dry, although the doorbell is off.
    pub(crate) fn look(&mut self, memory: &GuestMemory) {
        if self.starved && self.is_running() {
            match self.queue.avail_idx(memory, Ordering::Acquire) {
                Ok(index) => self.pending |= index.0 != self.queue.next_avail(),
                Err(error) => self.corrupt(&error),
            }
        }
    }

    /// Before a sleep: the doorbell on again if the ring ran dry, and one look more, for
    /// what came in between.
    pub(crate) fn rest(&mut self, memory: &GuestMemory) {
        if self.is_running() && std::mem::take(&mut self.starved) {
            match self.queue.enable_notification(memory) {
                Ok(more) => self.pending |= more,
                Err(error) => self.corrupt(&error),
            }
        }
    }

    /// After a batch: the interrupt, if the driver wants one or may have missed one.
    pub(crate) fn finish(&mut self, memory: &GuestMemory) {
        if !self.is_running() {
            return;
        }
        if std::mem::take(&mut self.unannounced) {
            (self.pushed, self.announced) = (false, self.queue.next_used());
            self.signal();
        }
        if std::mem::take(&mut self.pushed) {
            match self.wants_interrupt(memory) {
                Ok(true) => self.signal(),
                Ok(false) => {}
                Err(error) => self.corrupt(&error),
            }
        }
    }

    /// Whether the driver wants an interrupt for what was completed since the
    /// last time that this was asked (virtio 1.2 section 2.7.7).
    fn wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, virtio_queue::Error> {
        // The used index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let load = |offset: u64| {
            memory
                .load(GuestAddress(available + offset), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(virtio_queue::Error::GuestMemory)
        };
        let new = self.queue.next_used();
        let old = std::mem::replace(&mut self.announced, new);
        if self.queue.event_idx_enabled() {
            let event = load(4 + 2 * u64::from(self.queue.size()))?;
            Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    fn signal(&self) {
        fault::reach(Point::Interrupt);
        if let Some(call) = &self.call
            && let Err(error) = rustix::io::write(call, &1u64.to_ne_bytes())
        {
            // EAGAIN: the counter is full, so the interrupt is pending anyway.
            tracing::debug!("queue {}: call: {error}", self.index);
        }
    }

    /// The next request, or `None` when there is none now. A chain that no
    /// driver may build goes back with nothing written, and the next is tried.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Option<Chain<'m>> {
        while self.is_running() {
            if self.budget == 0 {
                self.pending = true;
                return None;
            }
            self.budget -= 1;
            let (head, origin) = self.take(memory)?;
            fault::reach(Point::Popped);
            let (table, size) = (GuestAddress(self.queue.desc_table()), self.queue.size());
            match Chain::parse(self.index, origin, head, table, size, memory) {
                Ok(chain) => return Some(chain),
                Err(error) => {
                    self.complain(&error);
                    self.push(memory, head, 0);
                }
            }
        }
        None
    }

    /// The head of the next request, which is in flight from now on.
    fn take(&mut self, memory: &GuestMemory) -> Option<(u16, Origin)> {
        if let Some(head) = self.tracker.as_mut().and_then(Tracker::take_again) {
            return Some((head, Origin::Inflight));
        }
        let next = match self.queue.iter(memory) {
            Ok(mut chains) => chains.next(),
            Err(error) => {
                self.corrupt(&error);
                return None;
            }
        };
        let Some(next) = next else {
            self.starved = true;
            return None;
        };
        let head = next.head_index();
        let position = self.queue.next_avail().wrapping_sub(1);
        if let Some(tracker) = &mut self.tracker
            && let Err(why) = tracker.take(head, position)
        {
            self.corrupt(&why);
            return None;
        }
        Some((head, Origin::Available(position)))
    }

    /// Puts `chain`, and all that was popped after it, back, as if it had never
    /// been taken. None of it may have been pushed.
    pub fn unpop(&mut self, chain: &Chain<'_>) {
        self.starved = false;
        if self.tracker.is_none() {
            if let Origin::Available(position) = chain.origin {
                self.queue.set_next_avail(position);
            }
            return;
        }
        while let Some(tracker) = &mut self.tracker {
            match tracker.take_back() {
                Ok(Some(last)) => {
                    if let (_, Origin::Available(position)) = last {
                        self.queue.set_next_avail(position);
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
    pub fn push(&mut self, memory: &GuestMemory, head: u16, written: u32) {
        self.push_all(memory, &[(head, written)]);
    }

    /// Completes several requests, which the driver gets to see all at once. One that was
    /// in work when the ring broke goes nowhere.
    pub fn push_all(&mut self, memory: &GuestMemory, completed: &[(u16, u32)]) {
        if !self.is_running() || completed.is_empty() {
            return;
        }
        match self.try_push(memory, completed) {
            Ok(()) => self.pushed = true,
            Err(why) => self.corrupt(&why),
        }
    }

    /// The order matters: whatever the last step of a process is, the next one must see
    /// from the table and the used index together what is completed.
    fn try_push(&mut self, memory: &GuestMemory, completed: &[(u16, u32)]) -> Result<(), String> {
        fault::reach(Point::Done);
        let outside = |error: vm_memory::GuestMemoryError| error.to_string();
        let size = self.queue.size();
        let used = self.queue.used_ring();
        let mut next = self.queue.next_used();
        for &(head, written) in completed {
            if head >= size {
                return Err(virtio_queue::Error::InvalidDescriptorIndex.to_string());
            }
            if let Some(tracker) = &self.tracker {
                tracker.link(head)?;
            }
            let at = used + 4 + 8 * u64::from(next % size);
            let element = [u32::from(head).to_le(), written.to_le()];
            memory
                .write_obj(element, GuestAddress(at))
                .map_err(outside)?;
            next = next.wrapping_add(1);
        }
        fault::reach(Point::Written);
        self.queue.set_next_used(next);
        memory
            .store(next.to_le(), GuestAddress(used + 2), Ordering::Release)
            .map_err(outside)?;
        fault::reach(Point::Published);
        match &mut self.tracker {
            Some(tracker) => tracker.complete(completed, next),
            None => Ok(()),
        }
    }

    /// Logs what is wrong with a request, unless there was too much of it already.
    pub fn complain(&mut self, what: &dyn Display) {
        match self.complaints {
            0..COMPLAINTS => tracing::warn!("{what}"),
            COMPLAINTS => tracing::warn!("{what}; no more is logged of this queue"),
            _ => return,
        }
        self.complaints += 1;
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
        self.state = State::Broken;
        if let Some(err) = &self.err {
            // Nobody may listen, and there is nothing to do about it.
            let _ = rustix::io::write(err, &1u64.to_ne_bytes());
        }
    }
}

//! A running ring: where it is in guest memory, how far it is, and what is in flight.

use std::sync::Arc;

use crate::chain::ChainOrigin;
use crate::fault::{self, FaultPoint};
use crate::inflight::{InflightTable, InflightTracker};
use crate::split_ring::SplitRing;
use crate::{DescriptorChain, GuestMemory};

/// The most chains that one batch takes from one ring, so that other rings and the main
/// thread get their turn.
const BATCH_SIZE: u32 = 256;

/// The most errors of the guest that are logged from one start of a ring to the next.
const MAX_LOGGED_ERRORS: u32 = 10;

/// The requests that are popped and not completed.
enum InFlight {
    /// Their number, if there is no in-flight table.
    Counted(u16),
    /// Their list, which also updates the in-flight table.
    Tracked(InflightTracker),
}

/// A running ring. Where a function returns an error, the driver has corrupted the ring.
pub(super) struct RunningRing {
    queue: usize,
    pub split: SplitRing,
    /// The available index up to which requests are popped.
    pub next_avail: u16,
    /// The used index up to which requests are completed.
    next_used: u16,
    in_flight: InFlight,
    /// Popped, and to be returned unused at the end of the batch. Until then `undo_pop`
    /// may put back requests that were popped before them, and them as well.
    refused: Vec<(u16, ChainOrigin)>,
    /// The ring must be processed although no event reports it.
    pub pending: bool,
    /// How many chains the device may still pop in this batch.
    budget: u32,
    /// The device found the ring empty, so it waits for the doorbell.
    empty: bool,
    /// Requests were completed since the last `flush`.
    used_added: bool,
    /// The used index up to which the driver got its interrupt.
    signalled_used: u16,
    /// The ring was used before this start, perhaps by a process that died before it sent
    /// its last interrupt.
    resumed: bool,
    /// The next `flush` sends an interrupt in any case.
    must_signal: bool,
    logged_errors: u32,
}

impl RunningRing {
    /// Starts a ring. Without an in-flight table it continues at the available index `base`.
    /// With one, it continues where the table says, whatever `base` is: only the table knows
    /// after a death, and after an orderly stop both say the same.
    pub fn new(
        queue: usize,
        split: SplitRing,
        base: u16,
        inflight: Option<&Arc<InflightTable>>,
    ) -> Result<Self, String> {
        let used = split.used_index();
        let (next_avail, in_flight) = match inflight {
            None => (base, InFlight::Counted(0)),
            Some(table) => {
                let available = split.available_index();
                let table = Arc::clone(table);
                let tracker = InflightTracker::recover(table, queue, split.size(), used, available)
                    .map_err(|why| format!("inflight table: {why}"))?;
                let count = tracker.to_resubmit() as u16; // no more than the ring has entries
                if count > 0 {
                    tracing::info!(
                        queue,
                        requests = count,
                        "requests of an earlier process were in flight: they are submitted again"
                    );
                }
                (used.wrapping_add(count), InFlight::Tracked(tracker))
            }
        };
        let resumed = used != 0;
        Ok(RunningRing {
            queue,
            split,
            next_avail,
            next_used: used,
            in_flight,
            refused: Vec::new(),
            pending: true,
            budget: 0,
            empty: false,
            used_added: false,
            signalled_used: used,
            resumed,
            must_signal: resumed,
            logged_errors: 0,
        })
    }

    /// Continues on `split`: the addresses or the memory table have changed.
    pub fn replace_split_ring(&mut self, split: SplitRing) {
        self.next_used = split.used_index();
        self.signalled_used = self.next_used;
        self.split = split;
    }

    pub fn signal_again_if_resumed(&mut self) {
        self.must_signal |= self.resumed;
        self.pending |= self.resumed;
    }

    pub fn to_resubmit(&self) -> usize {
        match &self.in_flight {
            InFlight::Counted(_) => 0,
            InFlight::Tracked(tracker) => tracker.to_resubmit(),
        }
    }

    pub fn refill_budget(&mut self) {
        self.budget = BATCH_SIZE;
    }

    pub fn poll(&mut self) {
        if self.empty {
            self.pending |= self.split.available_index() != self.next_avail;
        }
    }

    pub fn enable_notification(&mut self) {
        if self.empty {
            self.pending |= self.split.enable_notification(self.next_avail);
            self.empty = false;
        }
    }

    /// Returns the refused requests to the driver; returns whether an interrupt is due.
    pub fn flush(&mut self) -> Result<bool, String> {
        if !self.refused.is_empty() {
            let refused: Vec<_> = self.refused.drain(..).map(|(head, _)| (head, 0)).collect();
            self.add_used_batch(&refused)?;
        }
        let (old, new) = (self.signalled_used, self.next_used);
        let due = self.must_signal || self.used_added && self.split.wants_interrupt(old, new);
        if self.must_signal || self.used_added {
            self.signalled_used = new;
        }
        (self.must_signal, self.used_added) = (false, false);
        Ok(due)
    }

    #[inline]
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemory,
    ) -> Result<Option<DescriptorChain<'m>>, String> {
        loop {
            if self.budget == 0 {
                self.pending = true;
                return Ok(None);
            }
            self.budget -= 1;
            let Some((head, origin)) = self.next_head()? else {
                return Ok(None);
            };
            fault::hit(FaultPoint::Popped);
            match DescriptorChain::parse(origin, head, &self.split, memory) {
                Ok(chain) => return Ok(Some(chain)),
                Err(error) => {
                    if self.may_log_error() {
                        let queue = self.queue;
                        tracing::warn!(queue, request = head, %error, "malformed descriptor chain");
                    }
                    self.refuse(head, origin);
                }
            }
        }
    }

    /// The head of the next request, which is in flight from now on: first those that an
    /// earlier process left in flight, then those of the available ring.
    fn next_head(&mut self) -> Result<Option<(u16, ChainOrigin)>, String> {
        let in_flight = match &mut self.in_flight {
            InFlight::Counted(count) => *count,
            InFlight::Tracked(tracker) => {
                if let Some(head) = tracker.resubmit()? {
                    return Ok(Some((head, ChainOrigin::Resubmitted)));
                }
                tracker.in_flight()
            }
        };
        let (position, size) = (self.next_avail, self.split.size());
        let waiting = self.split.available_index().wrapping_sub(position);
        if waiting == 0 {
            self.empty = true;
            return Ok(None);
        }
        if waiting > size {
            return Err("more requests are available than it has entries".into());
        }
        if in_flight >= size {
            return Err("more requests are in flight than it has entries".into());
        }
        let head = self.split.head(position);
        if head >= size {
            return Err(format!("request {head} is beyond its {size} entries"));
        }
        match &mut self.in_flight {
            InFlight::Counted(count) => *count += 1,
            InFlight::Tracked(tracker) => tracker.submit(head, position)?,
        }
        self.next_avail = position.wrapping_add(1);
        Ok(Some((head, ChainOrigin::Available(position))))
    }

    pub fn refuse(&mut self, head: u16, origin: ChainOrigin) {
        self.refused.push((head, origin));
    }

    pub fn undo_pop(&mut self, chain: &DescriptorChain<'_>) -> Result<(), String> {
        self.empty = false;
        match &mut self.in_flight {
            InFlight::Counted(count) => {
                if let ChainOrigin::Available(position) = chain.origin {
                    let undone = self.next_avail.wrapping_sub(position);
                    self.refused.retain(|&(_, origin)| {
                        !matches!(origin, ChainOrigin::Available(at) if at.wrapping_sub(position) < undone)
                    });
                    *count = count.saturating_sub(undone);
                    self.next_avail = position;
                }
            }
            InFlight::Tracked(tracker) => {
                while let Some(last) = tracker.undo_last()? {
                    self.refused.retain(|refused| *refused != last);
                    if let (_, ChainOrigin::Available(position)) = last {
                        self.next_avail = position;
                    }
                    if last == (chain.head, chain.origin) {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// The order of the steps matters: whatever step of this process is its last, the
    /// in-flight table and the used index together must tell the next process which
    /// requests are complete.
    pub fn add_used_batch(&mut self, completed: &[(u16, u32)]) -> Result<(), String> {
        fault::hit(FaultPoint::Done);
        let mut next = self.next_used;
        for &(head, written) in completed {
            if head >= self.split.size() {
                return Err(format!("there is no request {head} to complete"));
            }
            if let InFlight::Tracked(tracker) = &self.in_flight {
                tracker.link(head)?;
            }
            self.split.add_used(next, head, written);
            next = next.wrapping_add(1);
        }
        fault::hit(FaultPoint::Written);
        self.split.publish_used(next);
        let count = next.wrapping_sub(self.next_used);
        self.next_used = next;
        fault::hit(FaultPoint::Published);
        match &mut self.in_flight {
            InFlight::Counted(in_flight) => *in_flight = in_flight.saturating_sub(count),
            InFlight::Tracked(tracker) => tracker.complete(completed, next)?,
        }
        self.used_added = true;
        Ok(())
    }

    pub fn may_log_error(&mut self) -> bool {
        if self.logged_errors == MAX_LOGGED_ERRORS {
            let queue = self.queue;
            tracing::warn!(
                queue,
                "too many errors: no more are logged until the queue restarts"
            );
        }
        self.logged_errors = self.logged_errors.saturating_add(1);
        self.logged_errors <= MAX_LOGGED_ERRORS
    }

    /// Positions and the number of requests in flight, for tests.
    #[cfg(test)]
    pub fn counters(&self) -> (u16, u16, u16) {
        let in_flight = match &self.in_flight {
            InFlight::Counted(count) => *count,
            InFlight::Tracked(tracker) => tracker.in_flight(),
        };
        (self.next_avail, self.next_used, in_flight)
    }
}

//! What a running ring records in its region of the in-flight table.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use vm_memory::AtomicInteger;

use super::in_flight_list::InFlightList;
use super::{
    COUNTER_OFFSET, DESC_NUM_OFFSET, INFLIGHT_OFFSET, InflightTable, LAST_BATCH_HEAD_OFFSET,
    NEXT_OFFSET, USED_IDX_OFFSET, VERSION, VERSION_OFFSET, entry_offset, no_such_request,
};
use crate::chain::ChainOrigin;
use crate::fault::{self, FaultPoint};

/// The requests in flight of one running ring.
pub struct InflightTracker {
    table: Arc<InflightTable>,
    queue: usize,
    /// Number of the next request, which tells the order of submission.
    counter: u64,
    in_flight: InFlightList,
    /// What was in flight when an earlier process died, in its order of submission, and is
    /// not submitted again yet.
    to_resubmit: VecDeque<u16>,
}

impl InflightTracker {
    /// Finds out what is in flight in queue `queue`, whose ring has `size` entries, the
    /// used index `used` and the available index `available`. Completes the step that a
    /// process died in.
    ///
    /// # Errors
    /// The table contradicts the ring.
    pub fn recover(
        table: Arc<InflightTable>,
        queue: usize,
        size: u16,
        used: u16,
        available: u16,
    ) -> Result<Self, String> {
        table
            .check_room(queue, size)
            .map_err(|error| error.to_string())?;
        let mut tracker = InflightTracker {
            table,
            queue,
            counter: 0,
            in_flight: InFlightList::new(size),
            to_resubmit: VecDeque::new(),
        };
        let version = tracker.load::<AtomicU16>(VERSION_OFFSET)?;
        match version {
            0 => {
                tracker.store::<AtomicU16>(DESC_NUM_OFFSET, tracker.table.layout.size)?;
                tracker.store::<AtomicU16>(USED_IDX_OFFSET, used)?;
                tracker.store::<AtomicU16>(VERSION_OFFSET, VERSION)?;
            }
            VERSION => {
                tracker.complete_last_batch(size, used)?;
                tracker.load_in_flight(size, available.wrapping_sub(used))?;
            }
            _ => return Err(format!("version {version} is not supported")),
        }
        Ok(tracker)
    }

    /// Finds the requests in flight of an earlier process, of which there are at most
    /// `incomplete`: those that the driver has made available and that are not used.
    fn load_in_flight(&mut self, size: u16, incomplete: u16) -> Result<(), String> {
        let mut in_flight = Vec::new();
        for head in 0..self.table.layout.size {
            if self.load::<AtomicU8>(entry_offset(head, INFLIGHT_OFFSET))? == 0 {
                continue;
            }
            if head >= size {
                return Err(format!(
                    "request {head} is in flight in a ring of {size} entries"
                ));
            }
            let counter = self.load::<AtomicU64>(entry_offset(head, COUNTER_OFFSET))?;
            in_flight.push((counter, head));
        }
        if in_flight.len() > usize::from(incomplete) {
            return Err(format!(
                "{} requests are in flight, but the ring has only {incomplete} incomplete ones",
                in_flight.len()
            ));
        }
        in_flight.sort_unstable();
        self.counter = in_flight.last().map_or(0, |(last, _)| last.wrapping_add(1));
        self.to_resubmit = in_flight.into_iter().map(|(_, head)| head).collect();
        Ok(())
    }

    /// A process may die after it has published a batch in the used ring and before it has
    /// removed the batch from the table. The used index tells. The requests of the batch
    /// are linked, from the last one on.
    fn complete_last_batch(&self, size: u16, used: u16) -> Result<(), String> {
        let count = used.wrapping_sub(self.load::<AtomicU16>(USED_IDX_OFFSET)?);
        if count == 0 {
            return Ok(());
        }
        let mut head = self.load::<AtomicU16>(LAST_BATCH_HEAD_OFFSET)?;
        // A ring that was used without this table is further ahead than any batch. Nothing
        // may be in flight then, which is checked later.
        let count = if count > size { 0 } else { count };
        for _ in 0..count {
            let next = self.load::<AtomicU16>(entry_offset(head, NEXT_OFFSET))?;
            self.store::<AtomicU8>(entry_offset(head, INFLIGHT_OFFSET), 0)?;
            head = next;
        }
        self.store::<AtomicU16>(USED_IDX_OFFSET, used)
    }

    /// How many requests are submitted and not completed.
    pub fn in_flight(&self) -> u16 {
        self.in_flight.len()
    }

    /// How many requests of an earlier process are still to be submitted again.
    pub fn to_resubmit(&self) -> usize {
        self.to_resubmit.len()
    }

    /// Submits the next request of an earlier process again.
    ///
    /// # Errors
    /// The request is in flight already, which cannot be as long as these come first.
    pub fn resubmit(&mut self) -> Result<Option<u16>, String> {
        let Some(head) = self.to_resubmit.pop_front() else {
            return Ok(None);
        };
        self.in_flight.push(head, ChainOrigin::Resubmitted)?;
        Ok(Some(head))
    }

    /// Submits a request that was found in the available ring at `position`.
    ///
    /// # Errors
    /// The ring has no such head, or the request is already in flight.
    pub fn submit(&mut self, head: u16, position: u16) -> Result<(), String> {
        self.in_flight
            .push(head, ChainOrigin::Available(position))?;
        self.store::<AtomicU64>(entry_offset(head, COUNTER_OFFSET), self.counter)?;
        self.store::<AtomicU8>(entry_offset(head, INFLIGHT_OFFSET), 1)?;
        self.counter = self.counter.wrapping_add(1);
        Ok(())
    }

    /// Takes the last submission back; returns its request.
    ///
    /// # Errors
    /// The table has no such request, which cannot be for one that was submitted.
    pub(crate) fn undo_last(&mut self) -> Result<Option<(u16, ChainOrigin)>, String> {
        let Some((head, origin)) = self.in_flight.pop() else {
            return Ok(None);
        };
        match origin {
            ChainOrigin::Available(_) => {
                self.store::<AtomicU8>(entry_offset(head, INFLIGHT_OFFSET), 0)?;
            }
            ChainOrigin::Resubmitted => self.to_resubmit.push_front(head),
        }
        Ok(Some((head, origin)))
    }

    /// Adds a request to the batch that is about to be published in the used ring.
    ///
    /// # Errors
    /// The table has no such request.
    pub fn link(&self, head: u16) -> Result<(), String> {
        let last = self.load::<AtomicU16>(LAST_BATCH_HEAD_OFFSET)?;
        self.store::<AtomicU16>(entry_offset(head, NEXT_OFFSET), last)?;
        self.store::<AtomicU16>(LAST_BATCH_HEAD_OFFSET, head)
    }

    /// Removes the batch `completed`, which is published: the used index is `used` now.
    ///
    /// # Errors
    /// The table has no such request, which cannot be for one that was linked.
    pub fn complete(&mut self, completed: &[(u16, u32)], used: u16) -> Result<(), String> {
        for &(head, _) in completed {
            self.store::<AtomicU8>(entry_offset(head, INFLIGHT_OFFSET), 0)?;
            self.in_flight.remove(head);
        }
        fault::hit(FaultPoint::Cleared);
        self.store::<AtomicU16>(USED_IDX_OFFSET, used)
    }

    fn load<T: AtomicInteger>(&self, offset: usize) -> Result<T::V, String> {
        let field = self.table.field::<T>(self.queue, offset);
        field
            .map(|field| field.load(Ordering::Acquire))
            .ok_or_else(no_such_request)
    }

    fn store<T: AtomicInteger>(&self, offset: usize, value: T::V) -> Result<(), String> {
        fault::step();
        let field = self.table.field::<T>(self.queue, offset);
        field
            .map(|field| field.store(value, Ordering::Release))
            .ok_or_else(no_such_request)
    }
}

//! Requests that a queue has taken and not completed.

use std::io;
use std::time::Instant;

use crate::request::BlockRequest;
use crate::stats::RequestKind;
use device_vhost_user::Ring;

use crate::virtio_blk::status;

/// A request under way.
pub struct InFlightRequest {
    /// Its queue.
    pub queue: usize,
    /// Its head in the ring.
    pub head: u16,
    /// What it is.
    pub kind: RequestKind,
    /// Bytes of data that it moves.
    pub bytes: u64,
    /// Bytes of its buffers that count as written once it is completed.
    pub written: u32,
    /// When it was taken.
    pub begun: Instant,
    /// Where the status byte goes.
    place: *mut u8,
    /// Parts that have not ended: itself, and those in the engine.
    parts: usize,
    /// How the parts that have ended went: well, or as the first that did not.
    result: io::Result<()>,
}

// SAFETY: the pointer is to guest memory, which all threads share.
unsafe impl Send for InFlightRequest {}

impl InFlightRequest {
    /// A request of which nothing is done yet.
    pub fn new(queue: usize, head: u16, begun: Instant, request: &BlockRequest<'_>) -> Self {
        // The status byte comes last, so all before it counts as written.
        let written = u32::try_from(request.data_len).map_or(u32::MAX, |it| it.saturating_add(1));
        let status = request.status.slices().first();
        InFlightRequest {
            queue,
            head,
            kind: request.kind,
            bytes: request.bytes,
            written,
            begun,
            place: status.map_or(std::ptr::null_mut(), |it| it.ptr_guard_mut().as_ptr()),
            parts: 1,
            result: Ok(()),
        }
    }

    /// The status byte.
    pub fn status(&self) -> u8 {
        status(&self.result)
    }

    /// Logs why the request failed, if it did.
    pub fn log_error(&self, ring: &mut Ring) {
        let Err(error) = &self.result else { return };
        // An unsupported request is no error: its status tells the driver.
        if error.kind() != io::ErrorKind::Unsupported && ring.may_log_error() {
            let (queue, request, operation) = (self.queue, self.head, self.kind.name());
            tracing::warn!(queue, request, operation, %error, "request failed");
        }
    }

    /// Writes the status byte to where it belongs.
    ///
    /// # Safety
    /// The request's buffers are still mapped.
    pub unsafe fn write_status(&self) {
        if !self.place.is_null() {
            // SAFETY: the caller's; it is one byte of guest memory.
            unsafe { self.place.write_volatile(self.status()) };
        }
    }
}

/// Requests under way, by number.
#[derive(Default)]
pub struct InFlightRequests {
    all: Vec<Option<InFlightRequest>>,
    free: Vec<usize>,
}

impl InFlightRequests {
    /// Adds one; returns its number.
    pub fn add(&mut self, active: InFlightRequest) -> usize {
        match self.free.pop() {
            Some(id) => {
                self.all[id] = Some(active);
                id
            }
            None => {
                self.all.push(Some(active));
                self.all.len() - 1
            }
        }
    }

    /// A part more of it is under way.
    pub fn add_part(&mut self, id: usize) {
        if let Some(Some(active)) = self.all.get_mut(id) {
            active.parts += 1;
        }
    }

    /// A part has ended; returns whether it was the last.
    pub fn part_ended(&mut self, id: usize, result: io::Result<()>) -> bool {
        let Some(Some(active)) = self.all.get_mut(id) else {
            return false;
        };
        if active.result.is_ok() {
            active.result = result;
        }
        active.parts -= 1;
        active.parts == 0
    }

    /// Takes it out.
    pub fn remove(&mut self, id: usize) -> Option<InFlightRequest> {
        let active = self.all.get_mut(id)?.take()?;
        self.free.push(id);
        Some(active)
    }

    /// How many there are of `queue`.
    pub fn of_queue(&self, queue: usize) -> usize {
        let of_queue = |it: &&InFlightRequest| it.queue == queue;
        self.all.iter().flatten().filter(of_queue).count()
    }
}

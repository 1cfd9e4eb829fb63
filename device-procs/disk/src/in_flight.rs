//! The requests of one queue that are popped and not completed.

use std::io;
use std::time::Instant;

use device_vhost_user::Ring;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

use crate::guest_iovec::GuestIovec;
use crate::request::BlockRequest;
use crate::stats::RequestKind;

/// A request in flight.
pub struct InFlightRequest {
    /// Its head in the ring.
    pub head: u16,
    /// What it asks for.
    pub kind: RequestKind,
    /// Bytes of the disk that it is about.
    pub bytes: u64,
    /// Bytes of its buffers that are reported as written.
    pub written: u32,
    /// When it was popped.
    pub start: Instant,
    /// Where the status byte goes.
    status: Option<GuestIovec>,
    /// What must still end: its transfers, and the call that started them.
    pending: usize,
    /// The first error, if there was one.
    result: io::Result<()>,
}

impl InFlightRequest {
    /// The status byte (virtio 1.2 section 5.2.6).
    pub fn status(&self) -> u8 {
        let status = match &self.result {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => VIRTIO_BLK_S_UNSUPP,
            Err(_) => VIRTIO_BLK_S_IOERR,
        };
        status as u8
    }

    /// Writes the status byte to guest memory.
    ///
    /// # Safety
    /// The request's buffers are still mapped.
    pub unsafe fn write_status(&self) {
        if let Some(byte) = &self.status {
            // SAFETY: it is a byte of guest memory, mapped as the caller promises.
            unsafe { byte.base().write_volatile(self.status()) };
        }
    }

    /// Logs why the request failed, if it did.
    pub fn log_error(&self, ring: &mut Ring) {
        let Err(error) = &self.result else { return };
        // An unsupported request is not an error: its status tells the driver.
        if error.kind() != io::ErrorKind::Unsupported && ring.may_log_error() {
            let (queue, request) = (ring.index(), self.head);
            let operation = self.kind.name();
            tracing::warn!(queue, request, operation, %error, "request failed");
        }
    }
}

/// The requests in flight, by ID.
#[derive(Default)]
pub struct InFlightRequests {
    requests: Vec<Option<InFlightRequest>>,
    free: Vec<usize>,
}

impl InFlightRequests {
    /// Adds the request with head `head`, which was popped at `start`; returns its ID.
    pub fn add(&mut self, head: u16, start: Instant, request: &BlockRequest<'_>) -> usize {
        // The status byte comes last, so everything before it counts as written.
        let written = u32::try_from(request.data_len).map_or(u32::MAX, |it| it.saturating_add(1));
        let status = request.status.slices().first();
        let request = InFlightRequest {
            head,
            kind: request.kind,
            bytes: request.bytes,
            written,
            start,
            status: status.map(|it| GuestIovec::new(it.ptr_guard_mut().as_ptr(), it.len())),
            pending: 1,
            result: Ok(()),
        };
        match self.free.pop() {
            Some(id) => {
                self.requests[id] = Some(request);
                id
            }
            None => {
                self.requests.push(Some(request));
                self.requests.len() - 1
            }
        }
    }

    /// Another transfer of request `id` is in flight.
    pub fn transfer_started(&mut self, id: usize) {
        if let Some(Some(request)) = self.requests.get_mut(id) {
            request.pending += 1;
        }
    }

    /// A transfer of request `id` has ended. If nothing more of the request is in flight,
    /// removes and returns it.
    pub fn transfer_ended(&mut self, id: usize, result: io::Result<()>) -> Option<InFlightRequest> {
        let entry = self.requests.get_mut(id)?;
        let request = entry.as_mut()?;
        if request.result.is_ok() {
            request.result = result;
        }
        request.pending -= 1;
        if request.pending > 0 {
            return None;
        }
        self.free.push(id);
        entry.take()
    }

    /// Number of requests.
    pub fn len(&self) -> usize {
        self.requests.len() - self.free.len()
    }
}

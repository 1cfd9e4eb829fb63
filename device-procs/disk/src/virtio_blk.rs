//! The virtio-blk device of one queue: requests from the ring to the image and back.
//!
//! What does not have to wait is done at once in the queue's thread: reading what the page
//! cache holds, and writing to the page cache. Everything else runs on the [`IoEngine`]
//! while the next requests are popped.

mod operations;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use device_core::Poller;
use device_vhost_user::{Device, DeviceContext, Error};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_OK};

use crate::block_backend::BlockBackend;
use crate::config::WRITEBACK_OFFSET;
use crate::guest_iovec::GuestIovec;
use crate::in_flight::{InFlightRequest, InFlightRequests};
use crate::io_engine::IoEngine;
use crate::request::{BlockRequest, RequestError};

/// Poller token: transfers of the engine may have ended.
const ENGINE_TOKEN: u64 = 0;
/// The most requests that are completed together. A driver on another processor continues
/// with the first ones while the rest are in progress.
const COMPLETION_BATCH: usize = 8;
/// A batch ends after about this many bytes, because a stop waits for it.
const MAX_BATCH_BYTES: u64 = 64 << 20;
/// Pause after the kernel had no memory for an io_uring call.
const RETRY_PAUSE: Duration = Duration::from_millis(1);

/// The device of one queue.
pub struct VirtioBlk {
    /// `None` where the host has no io_uring: then every transfer waits. The first field, so
    /// that it is dropped first, for it works on the files of `backend`.
    engine: Option<IoEngine>,
    backend: Arc<BlockBackend>,
    queue: usize,
    requests: InFlightRequests,
    /// Requests that have ended and are not in the used ring yet.
    completed: VecDeque<InFlightRequest>,
    /// An allocation to use again.
    spare: Vec<GuestIovec>,
}

impl VirtioBlk {
    /// The device of queue `queue`.
    pub fn new(backend: Arc<BlockBackend>, queue: usize, engine: Option<IoEngine>) -> Self {
        VirtioBlk {
            engine,
            backend,
            queue,
            requests: InFlightRequests::default(),
            completed: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    /// A transfer of request `id` has ended. If it was the last one, the request has ended.
    fn transfer_ended(&mut self, id: usize, result: io::Result<()>) {
        let Some(request) = self.requests.transfer_ended(id, result) else {
            return;
        };
        if let Some(recorder) = self.backend.recorders.get(self.queue) {
            let ok = request.status() == VIRTIO_BLK_S_OK as u8;
            let (bytes, time) = (request.bytes, request.start.elapsed());
            recorder.completed(request.kind, bytes, ok, time, self.requests.len());
        }
        // SAFETY: guest memory stays mapped until the queue is drained, which waits for
        // this request.
        unsafe { request.write_status() };
        self.completed.push_back(request);
    }

    /// Takes the results of the engine's transfers; returns whether there were any.
    fn take_results(&mut self) -> bool {
        let mut any = false;
        while let Some((id, result)) = self.engine.as_mut().and_then(IoEngine::next_completed) {
            any = true;
            self.transfer_ended(id, result);
        }
        any
    }

    /// Puts the completed requests into the used ring.
    fn add_completed(&mut self, cx: &mut DeviceContext<'_>) {
        let mut ring = cx.ring(self.queue);
        while !self.completed.is_empty() {
            let mut batch = [(0, 0); COMPLETION_BATCH];
            let mut count = 0;
            while count < COMPLETION_BATCH
                && let Some(request) = self.completed.pop_front()
            {
                batch[count] = (request.head, request.written);
                count += 1;
                if let Some(ring) = &mut ring {
                    request.log_error(ring);
                }
            }
            if let Some(ring) = &mut ring {
                ring.add_used_batch(&batch[..count]);
            }
        }
    }

    /// Runs one step of the engine and completes the requests that have ended; returns
    /// whether the engine had results.
    fn run_engine(&mut self, cx: &mut DeviceContext<'_>) -> bool {
        let stepped = self.engine.as_mut().map_or(Ok(()), IoEngine::step);
        let any = self.take_results();
        self.add_completed(cx);
        if let Err(error) = stepped {
            // The kernel is out of memory, for example. Perhaps no event comes that would
            // make us try again.
            std::thread::sleep(RETRY_PAUSE);
            if let Some(ring) = cx.ring(self.queue) {
                if ring.may_log_error() {
                    let queue = self.queue;
                    tracing::warn!(queue, %error, "io_uring_enter failed; trying again");
                }
                ring.process_again();
            }
        }
        any
    }
}

impl Device for VirtioBlk {
    fn register_sources(&mut self, poller: &Poller) -> io::Result<()> {
        match &self.engine {
            Some(engine) => poller.add_readable(engine, ENGINE_TOKEN),
            None => Ok(()),
        }
    }

    fn frontend_connected(&mut self, socket: std::os::fd::BorrowedFd<'_>) {
        if self.backend.direct.is_some()
            && let Some(engine) = &self.engine
            && let Err(error) = engine.hold_socket(Some(socket))
        {
            tracing::warn!(%error, "registering the front end's socket with the io_uring failed");
        }
    }

    fn frontend_disconnected(&mut self) {
        if self.backend.direct.is_some()
            && let Some(engine) = &self.engine
        {
            // If it fails, the socket stays open a little longer. Nothing is in flight.
            let _ = engine.hold_socket(None);
        }
    }

    fn set_features(&mut self, features: u64) {
        // This also sets the initial value of the field (virtio 1.2 section 5.2.5.2).
        self.backend
            .set_writeback(features & (1 << VIRTIO_BLK_F_FLUSH) != 0);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), Error> {
        match (offset, data) {
            (WRITEBACK_OFFSET, [value @ 0..=1]) => {
                self.backend.set_writeback(*value == 1);
                Ok(())
            }
            _ => Err(Error::ConfigRange {
                offset,
                size: data.len(),
            }),
        }
    }

    fn start_queue(&mut self, _queue: usize) -> io::Result<()> {
        self.backend.start_queue()
    }

    fn stop_queue(&mut self, _queue: usize) {
        self.backend.stop_queue();
    }

    fn process_queue(&mut self, queue: usize, cx: &mut DeviceContext<'_>) {
        let memory = cx.memory;
        let geometry = self.backend.geometry();
        let start = Instant::now();
        let mut bytes = 0;
        while let Some(ring) = cx.ring(queue) {
            if bytes >= MAX_BATCH_BYTES {
                ring.process_again();
                break;
            }
            let Some(chain) = ring.pop(memory) else { break };
            let head = chain.head;
            let Some(request) = BlockRequest::parse(chain, &geometry) else {
                if ring.may_log_error() {
                    tracing::warn!(queue, request = head, "a request has no status byte");
                }
                ring.add_used(head, 0);
                continue;
            };
            bytes += request.bytes;
            let id = self.requests.add(head, start, &request);
            if let Some(recorder) = self.backend.recorders.get(queue) {
                recorder.started(self.requests.len());
            }
            let result = match request.operation {
                Ok(operation) => self.start_operation(id, operation),
                Err(RequestError::Unsupported) => Err(io::ErrorKind::Unsupported.into()),
                Err(RequestError::Invalid(why)) => {
                    Err(io::Error::other(format!("invalid request: {why}")))
                }
            };
            // The part of the request that was done at once.
            self.transfer_ended(id, result);
            if self.completed.len() >= COMPLETION_BATCH {
                self.add_completed(cx);
            }
        }
        self.run_engine(cx);
    }

    fn handle_event(&mut self, _token: u64, cx: &mut DeviceContext<'_>) {
        self.run_engine(cx);
    }

    fn poll(&mut self, cx: &mut DeviceContext<'_>) -> bool {
        self.run_engine(cx)
    }

    fn drain_queue(&mut self, _queue: usize, cx: &mut DeviceContext<'_>) {
        self.run_engine(cx);
        while self.requests.len() > 0
            && let Some(engine) = &mut self.engine
        {
            if let Err(error) = engine.wait() {
                tracing::error!(queue = self.queue, %error, "io_uring_enter failed; trying again");
                std::thread::sleep(RETRY_PAUSE);
            }
            self.run_engine(cx);
        }
    }
}

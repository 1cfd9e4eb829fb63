//! A queue's worth of disk: requests from the ring to the image and back.
//!
//! What needs no wait is done at once, in the queue's thread: reading what the page cache
//! holds, writing to it. All else goes on in the [`IoEngine`] while the queue's next
//! requests are taken.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use device_core::Poller;
use device_vhost_user::Buffers;
use device_vhost_user::{Device, DeviceContext, Error};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};

use crate::block_backend::{BlockBackend, CacheMode};
use crate::bounce::Bounce;
use crate::config::WRITEBACK;
use crate::image::Extent;
use crate::in_flight::{InFlightRequest, InFlightRequests};
use crate::io_engine::{IoEngine, IoOp, IoPath, IoTransfer};
use crate::request::{BlockOperation, BlockRequest, ID_SIZE, RequestError};
use crate::transfer::{self, transfer};

/// The engine has news.
const ENGINE: u64 = 0;
/// As many requests are completed together at most: a driver on another processor goes
/// on with the first while the rest are done.
const TOGETHER: usize = 8;
/// A batch ends when it is about so many bytes: a stop waits for it.
const BATCH: u64 = 64 << 20;
/// The longest [`Bounce`], in bytes; longer transfers are made in pieces. A multiple of what
/// any medium wants.
const LONGEST_BOUNCE: usize = 1 << 20;
/// Before the kernel is asked once more for what it had no memory for, say.
const PAUSE: Duration = Duration::from_millis(1);
/// What a write through the page cache must be a multiple of, or it may have to read the
/// rest of a page from the medium first.
const PAGE: u64 = 4096;

/// One worker's disk.
pub struct VirtioBlk {
    /// `None` where the host has no io_uring: then everything is done at once. Goes first,
    /// for it works on the drive's files until it is gone.
    engine: Option<IoEngine>,
    backend: Arc<BlockBackend>,
    requests: InFlightRequests,
    /// Completed and not pushed yet.
    completed: VecDeque<InFlightRequest>,
    spare: Vec<libc::iovec>,
}

// SAFETY: the pointers in `spare` are left-overs that nobody follows.
unsafe impl Send for VirtioBlk {}

impl VirtioBlk {
    /// A disk before any driver.
    pub fn new(backend: Arc<BlockBackend>, engine: Option<IoEngine>) -> Self {
        VirtioBlk {
            engine,
            backend,
            requests: InFlightRequests::default(),
            completed: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    /// Does the request, or begins it; what can be said of it at once is in `active`.
    fn begin(&mut self, id: usize, operation: BlockOperation<'_>) -> io::Result<()> {
        let backend = Arc::clone(&self.backend);
        let through = backend.is_write_through();
        match operation {
            BlockOperation::Read(offset, buffers) => self.read(id, offset, buffers),
            BlockOperation::Write(offset, buffers) => self.write(id, offset, buffers, through),
            BlockOperation::Flush if backend.cache == CacheMode::Unsafe => Ok(()),
            BlockOperation::Flush => self.flush(id),
            BlockOperation::GetId(buffers) => {
                let mut serial = [0; ID_SIZE];
                serial[..backend.serial.len()].copy_from_slice(backend.serial.as_bytes());
                buffers.copy_from(&serial);
                Ok(())
            }
            BlockOperation::Discard(ranges) => ranges
                .iter()
                .filter(|range| range.len > 0)
                .try_for_each(|range| backend.image.discard(range.offset, range.len)),
            BlockOperation::WriteZeroes(ranges) => {
                for range in ranges.iter().filter(|range| range.len > 0) {
                    let image = &backend.image;
                    image.write_zeroes(range.offset, range.len, range.unmap)?;
                }
                if through { self.flush(id) } else { Ok(()) }
            }
        }
    }

    fn read(&mut self, id: usize, mut offset: u64, mut buffers: Buffers<'_>) -> io::Result<()> {
        let backend = Arc::clone(&self.backend);
        while !buffers.is_empty() {
            let len = match backend.image.map(offset, buffers.len() as u64)? {
                Extent::Data { offset: at, len } => {
                    let piece = take(&mut buffers, len)?;
                    self.move_data(id, IoOp::Read, at, &piece)?;
                    len
                }
                Extent::Zero { len } => {
                    fill_with_zeros(&take(&mut buffers, len)?);
                    len
                }
                Extent::Special { len } => {
                    backend.image.read(offset, &take(&mut buffers, len)?)?;
                    len
                }
            };
            offset += len;
        }
        Ok(())
    }

    fn write(
        &mut self,
        id: usize,
        mut offset: u64,
        mut buffers: Buffers<'_>,
        durable: bool,
    ) -> io::Result<()> {
        let backend = Arc::clone(&self.backend);
        let mut special = false;
        while !buffers.is_empty() {
            let len = match backend.image.place(offset, buffers.len() as u64)? {
                Extent::Data { offset: at, len } => {
                    let piece = take(&mut buffers, len)?;
                    self.move_data(id, IoOp::Write { durable }, at, &piece)?;
                    len
                }
                Extent::Zero { len } | Extent::Special { len } => {
                    backend.image.write(offset, &take(&mut buffers, len)?)?;
                    special = true;
                    len
                }
            };
            offset += len;
        }
        // What was written is nowhere as long as the tables that point there may be lost, be
        // it another request that has changed them.
        match durable && (special || backend.image.has_tables()) {
            true => self.flush(id),
            false => Ok(()),
        }
    }

    fn flush(&mut self, id: usize) -> io::Result<()> {
        if self.engine.is_none() {
            return self.backend.flush();
        }
        self.begin_part(IoTransfer {
            request: id,
            task: IoOp::Flush,
            path: IoPath::Cached,
            offset: 0,
            memory: Vec::new(),
            bounce: None,
        })
    }

    /// Moves `piece` from or to `offset` of the file.
    fn move_data(
        &mut self,
        id: usize,
        task: IoOp,
        offset: u64,
        piece: &Buffers<'_>,
    ) -> io::Result<()> {
        let mut memory = self.iovecs(piece);
        let len = piece.len() as u64;
        let backend = &*self.backend;
        if self.engine.is_none() {
            let done = wait_for(backend, &task, offset, &mut memory);
            self.spare = memory;
            return done;
        }
        let direct = backend.direct.as_ref().filter(|it| it.takes(offset, len));
        if let Some(direct) = direct {
            if direct.must_bounce(&memory) {
                let align = direct.memory_align.max(512);
                self.spare = memory;
                return self.bounce(id, task, offset, piece.clone(), align);
            }
            return self.begin_part(IoTransfer {
                request: id,
                task,
                path: IoPath::Direct,
                offset,
                memory,
                bounce: None,
            });
        }
        let is_whole = (offset | len).is_multiple_of(PAGE);
        let done = now(backend, &task, offset, &mut memory, is_whole)?;
        if done == len {
            self.spare = memory;
            return Ok(());
        }
        let left = transfer::skip(&mut memory, 0).len();
        memory.drain(..memory.len() - left);
        self.begin_part(IoTransfer {
            request: id,
            task,
            path: IoPath::Cached,
            offset: offset + done,
            memory,
            bounce: None,
        })
    }

    /// Moves `rest` past the page cache by buffers of the alignment `align`.
    fn bounce(
        &mut self,
        id: usize,
        task: IoOp,
        mut offset: u64,
        mut rest: Buffers<'_>,
        align: usize,
    ) -> io::Result<()> {
        while !rest.is_empty() {
            let len = rest.len().min(LONGEST_BOUNCE);
            let memory = self.iovecs(&take(&mut rest, len as u64)?);
            let mut bounce = Bounce::new(len, align)?;
            if matches!(task, IoOp::Write { .. }) {
                // SAFETY: the memory is guest memory of `len` bytes.
                unsafe { bounce.take(&memory) };
            }
            self.begin_part(IoTransfer {
                request: id,
                task,
                path: IoPath::Direct,
                offset,
                memory,
                bounce: Some(bounce),
            })?;
            offset += len as u64;
        }
        Ok(())
    }

    fn iovecs(&mut self, piece: &Buffers<'_>) -> Vec<libc::iovec> {
        let mut memory = std::mem::take(&mut self.spare);
        memory.clear();
        memory.extend(piece.slices().iter().map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        }));
        memory
    }

    /// Hands `part` to the engine once there is room in it. Its memory stays: a worker's
    /// queues are drained before guest memory changes.
    fn begin_part(&mut self, part: IoTransfer) -> io::Result<()> {
        let id = part.request;
        while let Some(engine) = &mut self.engine
            && engine.is_full()
        {
            engine.wait()?;
            self.collect();
        }
        let Some(engine) = &mut self.engine else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        engine.begin(part)?;
        self.requests.add_part(id);
        Ok(())
    }

    /// A part of request `id` has ended: if it was the last, the request has, too.
    fn part_ended(&mut self, id: usize, result: io::Result<()>) {
        if !self.requests.part_ended(id, result) {
            return;
        }
        let Some(active) = self.requests.remove(id) else {
            return;
        };
        if let Some(recorder) = self.backend.recorders.get(active.queue) {
            let ok = active.status() == VIRTIO_BLK_S_OK as u8;
            recorder.completed(active.kind, active.bytes, ok, active.begun.elapsed());
        }
        // SAFETY: guest memory stays until its queue is drained, and this one is not.
        unsafe { active.write_status() };
        self.completed.push_back(active);
    }

    /// Takes what the engine has ended; returns whether there was anything.
    fn collect(&mut self) -> bool {
        let mut any = false;
        while let Some((id, result)) = self.engine.as_mut().and_then(IoEngine::ended) {
            any = true;
            self.part_ended(id, result);
        }
        any
    }

    /// Hands what is completed to the driver.
    fn push(&mut self, cx: &mut DeviceContext<'_>) {
        let mut batch = [(0, 0); TOGETHER];
        while let Some(&InFlightRequest { queue, .. }) = self.completed.front() {
            let mut ring = cx.ring(queue);
            let mut count = 0;
            while count < TOGETHER
                && let Some(active) = self.completed.front()
                && active.queue == queue
            {
                batch[count] = (active.head, active.written);
                count += 1;
                if let Some(ring) = &mut ring {
                    active.log_error(ring);
                }
                self.completed.pop_front();
            }
            if let Some(ring) = ring {
                ring.add_used_batch(&batch[..count]);
            }
        }
    }

    /// Completes what the engine has ended, and lets it go on with what was short; returns
    /// whether there was anything.
    fn reap(&mut self, cx: &mut DeviceContext<'_>) -> bool {
        let any = self.collect();
        self.push(cx);
        self.submit(cx);
        any
    }

    fn submit(&mut self, cx: &mut DeviceContext<'_>) {
        let Some(Err(error)) = self.engine.as_mut().map(IoEngine::submit) else {
            return;
        };
        // The kernel is out of memory, say. Nothing else may happen that would make us
        // try again.
        std::thread::sleep(PAUSE);
        for queue in 0..self.backend.recorders.len() {
            if let Some(ring) = cx.ring(queue) {
                if ring.may_log_error() {
                    tracing::warn!(queue, %error, "io_uring_enter failed; trying again");
                }
                ring.process_again();
            }
        }
    }
}

/// Does of a transfer what needs no wait; returns how many bytes are done. What is left is
/// left in `memory`. Of a write that replaces whole pages (`is_whole`) the page cache takes
/// all; any other may have to read first, and a durable one waits for the medium.
fn now(
    backend: &BlockBackend,
    task: &IoOp,
    offset: u64,
    memory: &mut [libc::iovec],
    is_whole: bool,
) -> io::Result<u64> {
    let total: usize = memory.iter().map(|it| it.iov_len).sum();
    let (call, flags): (transfer::Vectored, _) = match task {
        IoOp::Read if backend.is_memory => (libc::preadv2, 0),
        IoOp::Read => (libc::preadv2, libc::RWF_NOWAIT),
        IoOp::Write { .. } if backend.is_memory => (libc::pwritev2, 0),
        IoOp::Write { durable: false } if is_whole => (libc::pwritev2, 0),
        IoOp::Write { .. } | IoOp::Flush => return Ok(0),
    };
    // SAFETY: the caller's pieces of guest memory.
    let result = unsafe { transfer(call, backend.image.file(), offset, memory, flags) };
    match result {
        Ok(()) => Ok(total as u64),
        Err(error) if flags == libc::RWF_NOWAIT && would_wait(&error) => {
            let left: usize = memory.iter().map(|it| it.iov_len).sum();
            Ok((total - left) as u64)
        }
        Err(error) => Err(error),
    }
}

/// Does all of a transfer, however long it takes.
fn wait_for(
    backend: &BlockBackend,
    task: &IoOp,
    offset: u64,
    memory: &mut [libc::iovec],
) -> io::Result<()> {
    let (call, flags): (transfer::Vectored, _) = match task {
        IoOp::Read => (libc::preadv2, 0),
        IoOp::Write { durable: true } => (libc::pwritev2, libc::RWF_DSYNC),
        IoOp::Write { durable: false } => (libc::pwritev2, 0),
        IoOp::Flush => return backend.flush(),
    };
    // SAFETY: the caller's pieces of guest memory.
    unsafe { transfer(call, backend.image.file(), offset, memory, flags) }
}

/// Not in the page cache, or not a file that can tell.
fn would_wait(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EOPNOTSUPP))
}

/// The next `len` bytes; an image that maps none or too many is broken.
fn take<'m>(buffers: &mut Buffers<'m>, len: u64) -> io::Result<Buffers<'m>> {
    usize::try_from(len)
        .ok()
        .filter(|&len| len > 0)
        .and_then(|len| buffers.take(len))
        .ok_or_else(|| io::Error::other("the image mapped a wrong length"))
}

fn fill_with_zeros(buffers: &Buffers<'_>) {
    const ZEROS: [u8; 4096] = [0; 4096];
    for slice in buffers.slices() {
        let mut at = 0;
        while let Ok(rest) = slice.offset(at)
            && !rest.is_empty()
        {
            let len = rest.len().min(ZEROS.len());
            rest.copy_from(&ZEROS[..len]);
            at += len;
        }
    }
}

impl Device for VirtioBlk {
    fn register_sources(&mut self, poller: &Poller) -> io::Result<()> {
        match &self.engine {
            Some(engine) => poller.add_readable(engine, ENGINE),
            None => Ok(()),
        }
    }

    fn frontend_connected(&mut self, socket: std::os::fd::BorrowedFd<'_>) {
        if self.backend.direct.is_some()
            && let Some(engine) = &self.engine
            && let Err(error) = engine.hold(Some(socket))
        {
            tracing::warn!("io_uring: the front end's socket: {error}");
        }
    }

    fn frontend_disconnected(&mut self) {
        if self.backend.direct.is_some()
            && let Some(engine) = &self.engine
        {
            // Nothing is under way.
            let _ = engine.hold(None);
        }
    }

    fn set_features(&mut self, features: u64) {
        // Also what the field says until the driver writes to it (virtio 1.2 section
        // 5.2.5.2).
        self.backend
            .set_writeback(features & (1 << VIRTIO_BLK_F_FLUSH) != 0);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), Error> {
        match (offset, data) {
            (WRITEBACK, [value @ 0..=1]) => {
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
        let begun = Instant::now();
        let mut moved = 0;
        while let Some(ring) = cx.ring(queue) {
            if moved >= BATCH {
                ring.process_again();
                break;
            }
            let Some(chain) = ring.pop(memory) else { break };
            let head = chain.head;
            let Some(request) = BlockRequest::parse(chain, &geometry) else {
                if ring.may_log_error() {
                    tracing::warn!(queue, request = head, "request has no status byte");
                }
                ring.add_used(head, 0);
                continue;
            };
            moved += request.bytes;
            let active = InFlightRequest::new(queue, head, begun, &request);
            let id = self.requests.add(active);
            if let Some(recorder) = self.backend.recorders.get(queue) {
                recorder.begun(1);
            }
            let result = match request.operation {
                Ok(operation) => self.begin(id, operation),
                Err(RequestError::Unsupported) => Err(io::ErrorKind::Unsupported.into()),
                Err(RequestError::Invalid(why)) => Err(io::Error::other(format!("refused: {why}"))),
            };
            // The request's own part: all that was done at once.
            self.part_ended(id, result);
            if self.completed.len() >= TOGETHER {
                self.push(cx);
            }
        }
        self.submit(cx);
        self.reap(cx);
    }

    fn handle_event(&mut self, _token: u64, cx: &mut DeviceContext<'_>) {
        self.reap(cx);
    }

    fn poll(&mut self, cx: &mut DeviceContext<'_>) -> bool {
        self.reap(cx)
    }

    fn drain_queue(&mut self, queue: usize, cx: &mut DeviceContext<'_>) {
        self.reap(cx);
        while self.requests.of_queue(queue) > 0 {
            let Some(engine) = &mut self.engine else {
                return;
            };
            if let Err(error) = engine.wait() {
                tracing::error!("io_uring: {error}");
                std::thread::sleep(PAUSE);
            }
            self.reap(cx);
        }
    }
}

/// The status byte for how a request ended.
pub fn status(result: &io::Result<()>) -> u8 {
    let status = match result {
        Ok(()) => VIRTIO_BLK_S_OK,
        Err(error) if error.kind() == io::ErrorKind::Unsupported => VIRTIO_BLK_S_UNSUPP,
        Err(_) => VIRTIO_BLK_S_IOERR,
    };
    status as u8
}

//! The I/O engine of one queue: transfers between the image's file and guest memory that
//! run on an io_uring while the queue's thread does something else.
//!
//! seccomp does not see what an io_uring does. So the ring is restricted before the process
//! is sealed: it may only read, write and flush files that are open.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use io_uring::register::Restriction;
use io_uring::squeue::Entry;
use io_uring::{EnterFlags, IoUring, cqueue, opcode, types};

use crate::bounce_buffer::BounceBuffer;
use crate::guest_iovec::GuestIovec;

/// Entries of the submission queue.
const SUBMISSION_ENTRIES: u32 = 256;
/// The most transfers in flight, which bounds their memory. The completion queue has as many
/// entries, so the kernel never holds a completion back.
const MAX_TRANSFERS: u32 = 1024;
/// The most bytes in bounce buffers, for the same reason.
const MAX_BOUNCED: usize = 16 << 20;
/// The most iovecs of one transfer (readv(2)).
const MAX_IOVECS: usize = libc::UIO_MAXIOV as usize;

/// IORING_RESTRICTION_REGISTER_OP for IORING_REGISTER_FILES_UPDATE (linux/io_uring.h).
pub const REGISTER_FILES_UPDATE: u8 = 6;

/// Which of the image's two descriptors a transfer uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoPath {
    /// Through the page cache.
    Cached,
    /// Past the page cache (O_DIRECT).
    Direct,
}

/// The kind of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOp {
    /// From the file to memory.
    Read,
    /// From memory to the file.
    Write {
        /// Complete only when the data are on the disk (RWF_DSYNC).
        durable: bool,
    },
    /// Puts everything that was written before onto the disk (fdatasync(2)).
    Flush,
}

/// A transfer: all of a request, or a part of it.
pub struct IoTransfer {
    /// ID of the request that the transfer belongs to.
    pub request: usize,
    /// What to do.
    pub op: IoOp,
    /// Which descriptor to use.
    pub path: IoPath,
    /// Offset in the file.
    pub offset: u64,
    /// Guest memory, which stays mapped until the transfer has ended.
    pub memory: Vec<GuestIovec>,
    /// Used in place of `memory` if that is not aligned as direct I/O needs it.
    pub bounce: Option<BounceBuffer>,
}

impl IoTransfer {
    fn bounced_len(&self) -> usize {
        self.bounce.as_ref().map_or(0, BounceBuffer::len)
    }
}

/// A transfer in flight.
struct InFlightTransfer {
    transfer: IoTransfer,
    /// Number of iovecs that are transferred completely.
    done: usize,
}

/// An io_uring and its transfers in flight.
pub struct IoEngine {
    ring: IoUring,
    /// The image's descriptors. They are not registered with the ring, which outlives the
    /// process for a moment, and the image's lock would with it.
    cached: RawFd,
    direct: RawFd,
    in_flight: Vec<Option<InFlightTransfer>>,
    free: Vec<usize>,
    completed: Vec<(usize, io::Result<()>)>,
    /// Bytes of all bounce buffers.
    bounced: usize,
}

impl IoEngine {
    /// An engine for the descriptors `cached` and `direct`, which its owner keeps open.
    ///
    /// # Errors
    /// The host has no io_uring, or does not allow it.
    pub fn new(cached: BorrowedFd<'_>, direct: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let build = |coop_taskrun: bool| {
            let mut builder = IoUring::builder();
            builder.setup_r_disabled().setup_cqsize(MAX_TRANSFERS);
            if coop_taskrun {
                // Completions do not interrupt the thread: it finds them at its next system
                // call, or in `collect` (Linux 5.19).
                builder.setup_coop_taskrun().setup_taskrun_flag();
            }
            builder.build(SUBMISSION_ENTRIES)
        };
        let ring = build(true).or_else(|_| build(false))?;
        let submitter = ring.submitter();
        // An empty entry, for `hold_socket`.
        submitter.register_files(&[-1])?;
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::register_op(REGISTER_FILES_UPDATE),
        ])?;
        submitter.register_enable_rings()?;
        Ok(IoEngine {
            ring,
            cached: cached.as_raw_fd(),
            direct: direct.map_or(-1, |fd| fd.as_raw_fd()),
            in_flight: Vec::new(),
            free: Vec::new(),
            completed: Vec::new(),
            bounced: 0,
        })
    }

    /// Keeps `socket` open until all transfers have ended, even after the death of the
    /// process: direct I/O may write to guest memory until then, and a front end assumes
    /// that nothing does once the socket is closed.
    ///
    /// # Errors
    /// io_uring_register(2) fails.
    pub fn hold_socket(&self, socket: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let fd = socket.map_or(-1, |socket| socket.as_raw_fd());
        self.ring.submitter().register_files_update(0, &[fd])?;
        Ok(())
    }

    /// Whether a transfer must end before another one can be queued.
    pub fn is_full(&self) -> bool {
        self.in_flight.len() - self.free.len() >= MAX_TRANSFERS as usize
            || self.bounced >= MAX_BOUNCED
    }

    /// Whether transfers are in flight.
    pub fn is_busy(&self) -> bool {
        self.in_flight.len() > self.free.len()
    }

    /// Queues `transfer`. The next [`IoEngine::step`] submits it to the kernel, or an earlier
    /// call if the submission queue is full.
    ///
    /// # Errors
    /// The engine is full, or io_uring_enter(2) fails. The transfer is not queued then.
    pub fn queue(&mut self, transfer: IoTransfer) -> io::Result<()> {
        if self.is_full() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let bounced = transfer.bounced_len();
        let index = self.free.pop().unwrap_or_else(|| {
            self.in_flight.push(None);
            self.in_flight.len() - 1
        });
        self.in_flight[index] = Some(InFlightTransfer { transfer, done: 0 });
        self.push_entry(index).inspect_err(|_| {
            self.in_flight[index] = None;
            self.free.push(index);
        })?;
        self.bounced += bounced;
        Ok(())
    }

    fn push_entry(&mut self, index: usize) -> io::Result<()> {
        if self.ring.submission().is_full() {
            self.submit()?;
        }
        let Some(Some(in_flight)) = self.in_flight.get(index) else {
            return Ok(());
        };
        let file = types::Fd(match in_flight.transfer.path {
            IoPath::Cached => self.cached,
            IoPath::Direct => self.direct,
        });
        let entry = in_flight.entry(file).user_data(index as u64);
        // SAFETY: the iovecs and the bounce buffer are owned by `in_flight`, which keeps them
        // until the transfer has ended; guest memory stays mapped as long (`IoTransfer`).
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|_| io::Error::other("the submission queue is full"))?;
        Ok(())
    }

    /// Submits what is queued, collects what has ended, and submits again what must
    /// continue. Without work for the kernel this makes no system call.
    ///
    /// # Errors
    /// io_uring_enter(2) fails. What has ended is collected all the same.
    pub fn step(&mut self) -> io::Result<()> {
        let submitted = self.submit();
        self.collect();
        submitted?;
        self.submit()
    }

    /// As [`IoEngine::step`], but waits until at least one transfer has ended, if there are
    /// any.
    ///
    /// # Errors
    /// As [`IoEngine::step`].
    pub fn wait(&mut self) -> io::Result<()> {
        let before = self.completed.len();
        self.step()?;
        while self.completed.len() == before && self.is_busy() {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
            self.collect();
            self.submit()?;
        }
        Ok(())
    }

    /// The next transfer that [`IoEngine::step`] found to have ended: the ID of its request,
    /// and its result.
    pub fn next_completed(&mut self) -> Option<(usize, io::Result<()>)> {
        self.completed.pop()
    }

    fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn collect(&mut self) {
        let mut entered = false;
        loop {
            // One by one, for `advance` may need the ring.
            let entry = self.ring.completion().next();
            if let Some(entry) = entry {
                self.advance(&entry);
                continue;
            }
            if entered || !self.ring.submission().taskrun() {
                return;
            }
            // With COOP_TASKRUN, a thread that polls must enter the kernel to get these.
            entered = true;
            let flags = EnterFlags::GETEVENTS.bits();
            // SAFETY: the call has no argument. If it fails, it still was a system call.
            let _ = unsafe {
                self.ring
                    .submitter()
                    .enter::<libc::sigset_t>(0, 0, flags, None)
            };
        }
    }

    fn advance(&mut self, entry: &cqueue::Entry) {
        let index = entry.user_data() as usize;
        let Some(Some(in_flight)) = self.in_flight.get_mut(index) else {
            return;
        };
        match in_flight.advance(entry.result()) {
            None => {
                if let Err(error) = self.push_entry(index) {
                    self.complete(index, Err(error));
                }
            }
            Some(result) => self.complete(index, result),
        }
    }

    fn complete(&mut self, index: usize, result: io::Result<()>) {
        if let Some(InFlightTransfer { transfer, .. }) = self.in_flight[index].take() {
            self.free.push(index);
            self.bounced -= transfer.bounced_len();
            self.completed.push((transfer.request, result));
        }
    }
}

impl InFlightTransfer {
    fn entry(&self, file: types::Fd) -> Entry {
        let IoTransfer {
            op,
            offset,
            memory,
            bounce,
            ..
        } = &self.transfer;
        let iovecs = match bounce {
            Some(bounce) => bounce.remaining(),
            None => &memory[self.done..],
        };
        let count = iovecs.len().min(MAX_IOVECS) as u32;
        match op {
            IoOp::Read => opcode::Readv::new(file, GuestIovec::as_ptr(iovecs), count)
                .offset(*offset)
                .build(),
            IoOp::Write { durable } => opcode::Writev::new(file, GuestIovec::as_ptr(iovecs), count)
                .offset(*offset)
                .rw_flags(if *durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            IoOp::Flush => opcode::Fsync::new(file)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        }
    }

    /// Handles a result of the kernel: returns how the transfer ended, or `None` if it must
    /// continue.
    fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        let transfer = &mut self.transfer;
        let count = match result {
            _ if -result == libc::EINTR => return None,
            ..0 => return Some(Err(io::Error::from_raw_os_error(-result))),
            _ if matches!(transfer.op, IoOp::Flush) => return Some(Ok(())),
            // The file has become shorter.
            0 => return Some(Err(io::ErrorKind::UnexpectedEof.into())),
            count => count as usize,
        };
        transfer.offset += count as u64;
        let finished = match &mut transfer.bounce {
            Some(bounce) => {
                if matches!(transfer.op, IoOp::Read) {
                    // SAFETY: guest memory stays mapped until the transfer has ended.
                    unsafe { bounce.copy_to_guest(count, &mut transfer.memory) };
                }
                bounce.advance(count)
            }
            None => {
                let left = GuestIovec::advance(&mut transfer.memory[self.done..], count).len();
                self.done = transfer.memory.len() - left;
                left == 0
            }
        };
        finished.then_some(Ok(()))
    }
}

impl Drop for IoEngine {
    /// Waits for the transfers in flight, whose iovecs and bounce buffers `self` owns.
    fn drop(&mut self) {
        while self.is_busy() {
            if self.wait().is_err() {
                // The kernel may still use them, so they must not be freed.
                std::mem::forget(std::mem::take(&mut self.in_flight));
                return;
            }
        }
    }
}

impl AsFd for IoEngine {
    /// Readable when transfers may have ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring keeps the descriptor open for as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests;

//! The engine of one queue: transfers between the image's file and guest memory that
//! go on while the queue's thread does something else, on an io_uring of its own.
//!
//! What such a ring may do is restricted before the process is sealed, for seccomp does
//! not see it: to move data and to flush, on what is open.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use io_uring::register::Restriction;
use io_uring::squeue::Entry;
use io_uring::{EnterFlags, IoUring, cqueue, opcode, types};

use crate::bounce::Bounce;
use crate::transfer::skip;

/// Transfers that are handed to the kernel at a time; more wait for room.
const ENTRIES: u32 = 256;
/// Transfers under way at a time, so that what they take is bounded whatever a guest asks.
/// As many completions have room, so none of them waits in the kernel for a call that
/// nobody makes.
const MAX_PARTS: u32 = 1024;
/// Bytes of [`Bounce`] under way at a time, for the same reason.
const MAX_BOUNCED: usize = 16 << 20;
/// Most pieces of memory in one transfer (readv(2)).
const MAX_PIECES: usize = libc::UIO_MAXIOV as usize;

/// IORING_RESTRICTION_REGISTER_OP for IORING_REGISTER_FILES_UPDATE (linux/io_uring.h).
pub const REGISTER_FILES_UPDATE: u8 = 6;

/// Which of the image's two descriptors a transfer takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoPath {
    /// Through the page cache.
    Cached,
    /// Past it (O_DIRECT).
    Direct,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOp {
    /// Fill memory.
    Read,
    /// Write memory; `durable`: onto the medium (RWF_DSYNC).
    Write {
        /// Not completed before the medium has it.
        durable: bool,
    },
    /// Put all that was written before onto the medium.
    Flush,
}

/// IoTransfer of a request, as one transfer.
pub struct IoTransfer {
    /// Number of the request that it belongs to.
    pub request: usize,
    /// What to do.
    pub task: IoOp,
    /// By which descriptor.
    pub path: IoPath,
    /// Offset in the file.
    pub offset: u64,
    /// The memory, which outlives the transfer.
    pub memory: Vec<libc::iovec>,
    /// Stands in for `memory`, whose alignment the medium does not take.
    pub bounce: Option<Bounce>,
}

impl IoTransfer {
    fn bounced(&self) -> usize {
        self.bounce.as_ref().map_or(0, Bounce::len)
    }
}

/// A [`IoTransfer`] in progress.
struct InFlightTransfer {
    part: IoTransfer,
    /// Pieces of `memory` that are done with.
    done: usize,
}

// SAFETY: the pointers in it are to memory that all threads share, and whoever made the
// part sees to it that the memory stays.
unsafe impl Send for InFlightTransfer {}

/// An io_uring and what is under way on it.
pub struct IoEngine {
    ring: IoUring,
    /// Not registered with the ring: that outlives the process for a moment, and so would
    /// the image's lock.
    cached: RawFd,
    direct: RawFd,
    running: Vec<Option<InFlightTransfer>>,
    free: Vec<usize>,
    ended: Vec<(usize, io::Result<()>)>,
    /// Bytes of all bounces.
    bounced: usize,
}

impl IoEngine {
    /// An engine for `cached`, and for `direct` if there is such a way. Whoever has it
    /// keeps them open.
    ///
    /// # Errors
    /// The kernel's, which may have no io_uring, or not for everybody.
    pub fn new(cached: BorrowedFd<'_>, direct: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let build = |coop: bool| {
            let mut builder = IoUring::builder();
            builder.setup_r_disabled().setup_cqsize(MAX_PARTS);
            if coop {
                // No interrupt of a processor for what its thread finds by itself: at its
                // next system call, or where `collect` looks (Linux 5.19).
                builder.setup_coop_taskrun().setup_taskrun_flag();
            }
            builder.build(ENTRIES)
        };
        let ring = build(true).or_else(|_| build(false))?;
        let submitter = ring.submitter();
        // A place for what `hold` is given.
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
            running: Vec::new(),
            free: Vec::new(),
            ended: Vec::new(),
            bounced: 0,
        })
    }

    /// Keeps `socket` open until all transfers have ended, also those that go on after the
    /// process's death (what a medium does by itself, past the page cache): a front end
    /// takes a closed socket for a sign that nobody touches its memory any more.
    ///
    /// # Errors
    /// The kernel's.
    pub fn hold(&self, socket: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let fd = socket.map_or(-1, |socket| socket.as_raw_fd());
        self.ring.submitter().register_files_update(0, &[fd])?;
        Ok(())
    }

    /// Readable when something may have ended.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring keeps it open for as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Whether no other part may begin before one has ended.
    pub fn is_full(&self) -> bool {
        self.running.len() - self.free.len() >= MAX_PARTS as usize || self.bounced >= MAX_BOUNCED
    }

    /// Begins `part`; [`IoEngine::submit`] hands it to the kernel at the latest.
    ///
    /// # Errors
    /// The kernel's, and when the engine is full; the part is not begun then.
    pub fn begin(&mut self, part: IoTransfer) -> io::Result<()> {
        if self.is_full() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let bounced = part.bounced();
        let index = self.free.pop().unwrap_or_else(|| {
            self.running.push(None);
            self.running.len() - 1
        });
        self.running[index] = Some(InFlightTransfer { part, done: 0 });
        self.enqueue(index).inspect_err(|_| {
            self.running[index] = None;
            self.free.push(index);
        })?;
        self.bounced += bounced;
        Ok(())
    }

    fn enqueue(&mut self, index: usize) -> io::Result<()> {
        if self.ring.submission().is_full() {
            self.submit()?;
        }
        let Some(Some(running)) = self.running.get(index) else {
            return Ok(());
        };
        let file = types::Fd(match running.part.path {
            IoPath::Cached => self.cached,
            IoPath::Direct => self.direct,
        });
        let entry = running.entry(file).user_data(index as u64);
        // SAFETY: the part's memory and its list of pieces stay until it has ended: `part`
        // lies in `running`, and whoever made it sees to the memory.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|_| io::Error::other("the io_uring takes nothing more"))?;
        Ok(())
    }

    /// Hands everything that was begun to the kernel, which may end some of it at once.
    ///
    /// # Errors
    /// The kernel's.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits until at least one transfer has ended, if there is any.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        let before = self.ended.len();
        self.collect();
        while self.ended.len() == before && self.is_busy() {
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

    /// Whether anything is under way.
    pub fn is_busy(&self) -> bool {
        self.running.len() > self.free.len()
    }

    /// The next of those that have ended: the number of its request, and how it went.
    /// Makes no system call unless the kernel has something that only one delivers.
    /// [`IoEngine::submit`] afterwards, for what must go on.
    pub fn ended(&mut self) -> Option<(usize, io::Result<()>)> {
        if self.ended.is_empty() {
            self.collect();
        }
        self.ended.pop()
    }

    fn collect(&mut self) {
        let mut entered = false;
        loop {
            // One by one: going on with one that was short needs the ring.
            let entry = self.ring.completion().next();
            if let Some(entry) = entry {
                self.advance(&entry);
                continue;
            }
            if entered || !self.ring.submission().taskrun() {
                return;
            }
            // A thread that looks without system calls would not get it otherwise.
            entered = true;
            let flags = EnterFlags::GETEVENTS.bits();
            // SAFETY: without an argument. A failure is no harm: it was a system call.
            let _ = unsafe {
                self.ring
                    .submitter()
                    .enter::<libc::sigset_t>(0, 0, flags, None)
            };
        }
    }

    fn advance(&mut self, entry: &cqueue::Entry) {
        let index = entry.user_data() as usize;
        let Some(Some(running)) = self.running.get_mut(index) else {
            return;
        };
        match running.advance(entry.result()) {
            None => {
                if let Err(error) = self.enqueue(index) {
                    self.end(index, Err(error));
                }
            }
            Some(result) => self.end(index, result),
        }
    }

    fn end(&mut self, index: usize, result: io::Result<()>) {
        if let Some(InFlightTransfer { part, .. }) = self.running[index].take() {
            self.free.push(index);
            self.bounced -= part.bounced();
            self.ended.push((part.request, result));
        }
    }
}

impl InFlightTransfer {
    fn entry(&self, file: types::Fd) -> Entry {
        let IoTransfer {
            task,
            offset,
            memory,
            bounce,
            ..
        } = &self.part;
        let pieces = match bounce {
            Some(bounce) => bounce.pieces(),
            None => &memory[self.done..],
        };
        let count = pieces.len().min(MAX_PIECES) as u32;
        match task {
            IoOp::Read => opcode::Readv::new(file, pieces.as_ptr(), count)
                .offset(*offset)
                .build(),
            IoOp::Write { durable } => opcode::Writev::new(file, pieces.as_ptr(), count)
                .offset(*offset)
                .rw_flags(if *durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            IoOp::Flush => opcode::Fsync::new(file)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        }
    }

    /// The kernel has done something of it: how it ended, or `None` if it must go on.
    fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        let part = &mut self.part;
        let count = match result {
            _ if -result == libc::EINTR => return None,
            ..0 => return Some(Err(io::Error::from_raw_os_error(-result))),
            _ if matches!(part.task, IoOp::Flush) => return Some(Ok(())),
            // The file has become shorter.
            0 => return Some(Err(io::ErrorKind::UnexpectedEof.into())),
            count => count as usize,
        };
        part.offset += count as u64;
        let finished = match &mut part.bounce {
            Some(bounce) => {
                if matches!(part.task, IoOp::Read) {
                    // SAFETY: the part's memory is there as long as it runs.
                    unsafe { bounce.deliver(count, &mut part.memory) };
                }
                bounce.advance(count)
            }
            None => {
                let left = skip(&mut part.memory[self.done..], count).len();
                self.done = part.memory.len() - left;
                left == 0
            }
        };
        finished.then_some(Ok(()))
    }
}

impl Drop for IoEngine {
    /// What is under way uses memory that goes with `self`.
    fn drop(&mut self) {
        while self.is_busy() {
            if self.wait().is_err() {
                // Never seen; the memory must stay then.
                std::mem::forget(std::mem::take(&mut self.running));
                return;
            }
        }
    }
}

impl AsFd for IoEngine {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor()
    }
}

#[cfg(test)]
mod tests;

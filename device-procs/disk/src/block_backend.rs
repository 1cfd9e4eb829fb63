//! The disk as all its queues share it: the image, how it is cached, and what the driver
//! has set.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use clap::ValueEnum;
use device_vhost_user::ConfigSpace;
use rustix::fs::{AtFlags, OFlags, StatxFlags};

use crate::config;
use crate::image::{Geometry, Image};
use crate::stats::StatsRecorder;

/// How writes get to the medium.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CacheMode {
    /// Through the host's page cache; a flush puts them onto the medium
    #[default]
    Writeback,
    /// Past the page cache (O_DIRECT)
    None,
    /// Through the page cache; a flush does nothing, and a crash of the host may lose all
    Unsafe,
}

/// What all queues share.
pub struct BlockBackend {
    /// Where things are.
    pub image: Box<dyn Image>,
    /// The way past the page cache, if that is taken.
    pub direct: Option<Direct>,
    /// How writes get to the medium.
    pub cache: CacheMode,
    /// The file is memory: reading it never waits for a medium.
    pub is_memory: bool,
    /// Block size that the guest sees, in bytes.
    block: u32,
    /// Answer to GET_ID.
    pub serial: String,
    /// What the driver reads.
    pub config: ConfigSpace,
    /// One for each queue.
    pub recorders: Vec<StatsRecorder>,
    /// Writes may stay in a cache until the next flush (virtio 1.2 section 5.2.6.2).
    writeback: AtomicBool,
    /// Queues that run.
    running: Mutex<usize>,
}

/// The file once more, past the page cache.
pub struct Direct {
    file: File,
    /// What offsets and lengths must be multiples of, in bytes.
    pub align: u64,
    /// What addresses must be multiples of.
    pub memory_align: usize,
}

impl Direct {
    /// Opens `file` again.
    ///
    /// # Errors
    /// When the file system has no such thing.
    pub fn new(file: BorrowedFd<'_>) -> io::Result<Self> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let access = rustix::fs::fcntl_getfl(file)? & OFlags::ACCMODE;
        let flags = access | OFlags::DIRECT | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?);
        // A file system that does not say takes what a block device takes.
        let said = rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
        let (memory, offset) = said
            .filter(|it| it.stx_mask & StatxFlags::DIOALIGN.bits() != 0)
            .map_or((0, 0), |it| (it.stx_dio_mem_align, it.stx_dio_offset_align));
        let or_page = |align: u32| if align == 0 { 4096 } else { align };
        Ok(Direct {
            file,
            align: or_page(offset).into(),
            memory_align: or_page(memory) as usize,
        })
    }

    /// Whether a transfer can go this way.
    pub fn takes(&self, offset: u64, len: u64) -> bool {
        (offset | len).is_multiple_of(self.align)
    }

    /// Whether `memory` must be copied for it.
    pub fn must_bounce(&self, memory: &[libc::iovec]) -> bool {
        let mut pieces = memory.iter();
        pieces.any(|it| {
            !(it.iov_base as usize | it.iov_len).is_multiple_of(self.memory_align)
                || !(it.iov_len as u64).is_multiple_of(self.align)
        })
    }
}

impl AsFd for Direct {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl BlockBackend {
    /// A disk before any driver, which sees blocks of `block` bytes or of the medium's
    /// size, and has `queues` queues.
    ///
    /// # Errors
    /// One line that says why the image cannot be served like this.
    pub fn new(
        image: Box<dyn Image>,
        cache: CacheMode,
        block: Option<u32>,
        serial: String,
        queues: u16,
    ) -> io::Result<Self> {
        let file = image.file();
        // A descriptor that must not wait is one that an io_uring cannot work with; one that
        // was inherited may go past the page cache, where only `Direct` knows what to heed.
        let flags = rustix::fs::fcntl_getfl(file)?;
        rustix::fs::fcntl_setfl(file, flags - OFlags::NONBLOCK - OFlags::DIRECT)?;
        let direct = match cache {
            CacheMode::None => Some(Direct::new(file).map_err(|error| {
                let why = format!("there is no way past the page cache (--cache none): {error}");
                io::Error::new(error.kind(), why)
            })?),
            CacheMode::Writeback | CacheMode::Unsafe => None,
        };
        let geometry = image.geometry();
        let least = direct.as_ref().map_or(0, |direct| direct.align as u32);
        let least = least.max(geometry.logical_block);
        let block = block.unwrap_or(least);
        if block < least {
            let why = format!("the medium has blocks of {least} bytes, --block-size says {block}");
            return Err(io::Error::other(why));
        }
        if !geometry.capacity.is_multiple_of(block.into()) {
            let why = format!("its size is no multiple of its block size, {block} bytes");
            return Err(io::Error::other(why));
        }
        let backend = BlockBackend {
            is_memory: is_memory(file),
            image,
            direct,
            cache,
            block,
            serial,
            config: ConfigSpace::new(Vec::new()),
            recorders: (0..queues).map(|_| StatsRecorder::default()).collect(),
            writeback: AtomicBool::new(true),
            running: Mutex::new(0),
        };
        backend.announce();
        Ok(backend)
    }

    /// The driver has a cache to reckon with, or not.
    pub fn set_writeback(&self, on: bool) {
        let _alone = self.alone();
        if self.writeback.swap(on, Ordering::AcqRel) != on {
            let what = if on { "write-back" } else { "write-through" };
            tracing::debug!("the driver has set the disk to {what}");
        }
        self.announce();
    }

    /// Whether a write must be on the medium when it is completed.
    pub fn is_write_through(&self) -> bool {
        self.cache != CacheMode::Unsafe && !self.writeback.load(Ordering::Acquire)
    }

    /// Size and limits.
    pub fn geometry(&self) -> Geometry {
        let geometry = self.image.geometry();
        Geometry {
            // What a medium that has grown has beyond its last whole block is no use.
            capacity: geometry.capacity - geometry.capacity % u64::from(self.block),
            logical_block: self.block,
            ..geometry
        }
    }

    /// Makes the disk larger, or finds that it is, and tells the driver; returns its size
    /// in bytes.
    ///
    /// # Errors
    /// One line that says why not.
    pub fn grow(&self, capacity: Option<u64>) -> io::Result<u64> {
        let block = self.block;
        if capacity.is_some_and(|wanted| !wanted.is_multiple_of(block.into())) {
            let why = format!("the size is no multiple of the block size, {block} bytes");
            return Err(io::Error::other(why));
        }
        let _alone = self.alone();
        let now = self.geometry().capacity;
        self.image.grow(capacity.unwrap_or(now))?;
        self.announce();
        Ok(self.geometry().capacity)
    }

    /// Puts everything onto the medium.
    ///
    /// # Errors
    /// The medium's.
    pub fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(self.image.file())?)
    }

    /// A queue starts.
    ///
    /// # Errors
    /// When the image cannot be looked at again, which another process may have worked
    /// on meanwhile.
    pub fn start_queue(&self) -> io::Result<()> {
        let mut running = self.alone();
        if *running == 0 {
            self.image.reload()?;
            self.announce();
        }
        *running += 1;
        Ok(())
    }

    /// A queue has stopped.
    pub fn stop_queue(&self) {
        let mut running = self.alone();
        *running = running.saturating_sub(1);
    }

    /// Nobody else changes what the driver is told of, nor looks at the image again: the
    /// last one to announce it must be the last one to have changed it.
    fn alone(&self) -> MutexGuard<'_, usize> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver is told of what has changed, if anything has.
    fn announce(&self) {
        let queues = self.recorders.len() as u16;
        let writeback = self.writeback.load(Ordering::Acquire);
        let space = config::space(&self.geometry(), queues, writeback);
        self.config.update(space);
    }
}

/// Whether `file` lies in memory. Such file systems do not take RWF_NOWAIT, which asks
/// for what needs no wait; they never need one.
fn is_memory(file: BorrowedFd<'_>) -> bool {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    rustix::fs::fstatfs(file).is_ok_and(|it| [TMPFS, RAMFS].contains(&(it.f_type as u64)))
}

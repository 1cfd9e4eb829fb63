//! The block back end that all queues share: the image, how it is cached, and what the
//! driver has set.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use device_vhost_user::ConfigSpace;
pub use outrigger_cli::CacheMode;
use rustix::fs::{AtFlags, OFlags, StatxFlags};

use crate::config;
use crate::guest_iovec::GuestIovec;
use crate::image::{Geometry, Image};
use crate::io_engine::IoOp;
use crate::stats::StatsRecorder;
use crate::transfer::{VectoredIo, transfer};

/// The block back end.
pub struct BlockBackend {
    /// The image.
    pub image: Box<dyn Image>,
    /// The image's file for direct I/O (`--cache none`).
    pub direct: Option<DirectFile>,
    /// How writes get to the disk.
    pub cache: CacheMode,
    /// The image's file is in memory (tmpfs), so reading it never waits.
    is_memory: bool,
    /// Logical block size that the guest sees, in bytes.
    block_size: u32,
    /// Serial number, the answer to GET_ID.
    pub serial: String,
    /// The configuration space.
    pub config: ConfigSpace,
    /// The statistics of each queue.
    pub recorders: Vec<StatsRecorder>,
    /// Writes may stay in a volatile cache until a flush (virtio 1.2 section 5.2.6.2).
    writeback: AtomicBool,
    /// Number of queues that run. The lock also serialises changes of the geometry and of
    /// the configuration space, so that the last announcement tells of the last change.
    running_queues: Mutex<usize>,
}

/// The image's file, open for direct I/O.
pub struct DirectFile {
    file: File,
    /// Offsets and lengths must be multiples of this, in bytes.
    pub align: u64,
    /// Addresses must be multiples of this.
    pub memory_align: usize,
}

impl DirectFile {
    /// Opens `file` again with O_DIRECT.
    ///
    /// # Errors
    /// The file system does not support O_DIRECT, or /proc is not there.
    pub fn new(file: BorrowedFd<'_>) -> io::Result<Self> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let access = rustix::fs::fcntl_getfl(file)? & OFlags::ACCMODE;
        let flags = access | OFlags::DIRECT | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?);
        // A page is enough for a file system that does not report its alignment.
        let stat = rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
        let (memory, offset) = stat
            .filter(|it| it.stx_mask & StatxFlags::DIOALIGN.bits() != 0)
            .map_or((0, 0), |it| (it.stx_dio_mem_align, it.stx_dio_offset_align));
        let or_page = |align: u32| if align == 0 { 4096 } else { align };
        Ok(DirectFile {
            file,
            align: or_page(offset).into(),
            memory_align: or_page(memory) as usize,
        })
    }

    /// Whether a transfer can use direct I/O.
    pub fn takes(&self, offset: u64, len: u64) -> bool {
        (offset | len).is_multiple_of(self.align)
    }

    /// Whether `memory` is not aligned for direct I/O.
    pub fn needs_bounce_buffer(&self, memory: &[GuestIovec]) -> bool {
        memory.iter().any(|it| {
            !(it.base() as usize | it.len()).is_multiple_of(self.memory_align)
                || !(it.len() as u64).is_multiple_of(self.align)
        })
    }
}

impl AsFd for DirectFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl BlockBackend {
    /// A back end with `queues` queues. The guest sees blocks of `block_size` bytes, by
    /// default the smallest that the medium allows.
    ///
    /// # Errors
    /// The image cannot be served with these options.
    pub fn new(
        image: Box<dyn Image>,
        cache: CacheMode,
        block_size: Option<u32>,
        serial: String,
        queues: u16,
    ) -> io::Result<Self> {
        let file = image.file();
        // An io_uring does not wait for a file with O_NONBLOCK. An inherited file may have
        // O_DIRECT, for which only `DirectFile` checks the alignment.
        let flags = rustix::fs::fcntl_getfl(file)?;
        rustix::fs::fcntl_setfl(file, flags - OFlags::NONBLOCK - OFlags::DIRECT)?;
        let direct = match cache {
            CacheMode::None => Some(DirectFile::new(file).map_err(|error| {
                let why = format!("it does not support direct I/O (--cache none): {error}");
                io::Error::new(error.kind(), why)
            })?),
            CacheMode::Writeback | CacheMode::Unsafe => None,
        };
        let geometry = image.geometry();
        let smallest = direct.as_ref().map_or(0, |direct| direct.align as u32);
        let smallest = smallest.max(geometry.logical_block);
        let block_size = block_size.unwrap_or(smallest);
        if block_size < smallest {
            let why =
                format!("--block-size {block_size} is smaller than its blocks of {smallest} bytes");
            return Err(io::Error::other(why));
        }
        if !geometry.capacity.is_multiple_of(block_size.into()) {
            let why = format!("its size is not a multiple of its block size, {block_size} bytes");
            return Err(io::Error::other(why));
        }
        let backend = BlockBackend {
            is_memory: is_memory(file),
            image,
            direct,
            cache,
            block_size,
            serial,
            config: ConfigSpace::new(Vec::new()),
            recorders: (0..queues).map(|_| StatsRecorder::default()).collect(),
            writeback: AtomicBool::new(true),
            running_queues: Mutex::new(0),
        };
        backend.update_config();
        Ok(backend)
    }

    /// Sets whether completed writes may stay in a volatile cache.
    pub fn set_writeback(&self, on: bool) {
        let _lock = self.lock();
        if self.writeback.swap(on, Ordering::AcqRel) != on {
            let mode = if on { "write-back" } else { "write-through" };
            tracing::debug!(mode, "the driver has set the cache mode");
        }
        self.update_config();
    }

    /// Whether a write must be on the disk when it is completed.
    pub fn is_write_through(&self) -> bool {
        self.cache != CacheMode::Unsafe && !self.writeback.load(Ordering::Acquire)
    }

    /// Size and limits.
    pub fn geometry(&self) -> Geometry {
        let geometry = self.image.geometry();
        Geometry {
            // An image that has grown may end with a part of a block, which is not used.
            capacity: geometry.capacity - geometry.capacity % u64::from(self.block_size),
            logical_block: self.block_size,
            ..geometry
        }
    }

    /// Makes the disk larger and tells the driver. Without a size, checks whether the file
    /// or block device has grown. Returns the size in bytes.
    ///
    /// # Errors
    /// The disk cannot have this size.
    pub fn grow(&self, capacity: Option<u64>) -> io::Result<u64> {
        let block = self.block_size;
        if let Some(capacity) = capacity
            && !capacity.is_multiple_of(block.into())
        {
            return Err(io::Error::other(format!(
                "{capacity} bytes is not a multiple of the block size, {block} bytes"
            )));
        }
        let _lock = self.lock();
        let current = self.geometry().capacity;
        self.image.grow(capacity.unwrap_or(current))?;
        self.update_config();
        Ok(self.geometry().capacity)
    }

    /// Puts all completed writes onto the disk.
    ///
    /// # Errors
    /// fdatasync(2) fails.
    pub fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(self.image.file())?)
    }

    /// Transfers what does not have to wait; returns how many bytes that are. `memory` is
    /// what is left. A write that replaces whole pages goes to the page cache at once. Any
    /// other write may have to read from the disk first, and a durable one waits for it.
    ///
    /// # Errors
    /// preadv2(2) or pwritev2(2) fails.
    ///
    /// # Safety
    /// `memory` is mapped.
    pub unsafe fn transfer_without_waiting(
        &self,
        op: IoOp,
        offset: u64,
        memory: &mut [GuestIovec],
        whole_pages: bool,
    ) -> io::Result<u64> {
        let (call, flags): (VectoredIo, _) = match op {
            IoOp::Read if self.is_memory => (libc::preadv2, 0),
            IoOp::Read => (libc::preadv2, libc::RWF_NOWAIT),
            IoOp::Write { .. } if self.is_memory => (libc::pwritev2, 0),
            IoOp::Write { durable: false } if whole_pages => (libc::pwritev2, 0),
            IoOp::Write { .. } | IoOp::Flush => return Ok(0),
        };
        let total = GuestIovec::total_len(memory);
        // SAFETY: the memory is mapped, as the caller promises.
        match unsafe { transfer(call, self.image.file(), offset, memory, flags) } {
            Ok(()) => Ok(total as u64),
            Err(error) if flags == libc::RWF_NOWAIT && would_wait(&error) => {
                Ok((total - GuestIovec::total_len(memory)) as u64)
            }
            Err(error) => Err(error),
        }
    }

    /// Transfers all of `memory`, and waits for it.
    ///
    /// # Errors
    /// preadv2(2), pwritev2(2) or fdatasync(2) fails.
    ///
    /// # Safety
    /// `memory` is mapped.
    pub unsafe fn transfer(
        &self,
        op: IoOp,
        offset: u64,
        memory: &mut [GuestIovec],
    ) -> io::Result<()> {
        let (call, flags): (VectoredIo, _) = match op {
            IoOp::Read => (libc::preadv2, 0),
            IoOp::Write { durable: true } => (libc::pwritev2, libc::RWF_DSYNC),
            IoOp::Write { durable: false } => (libc::pwritev2, 0),
            IoOp::Flush => return self.flush(),
        };
        // SAFETY: the memory is mapped, as the caller promises.
        unsafe { transfer(call, self.image.file(), offset, memory, flags) }
    }

    /// A queue starts. The first one loads the image's metadata again, which another process
    /// may have changed while no queue ran.
    ///
    /// # Errors
    /// The metadata cannot be loaded.
    pub fn start_queue(&self) -> io::Result<()> {
        let mut running = self.lock();
        if *running == 0 {
            self.image.reload()?;
            self.update_config();
        }
        *running += 1;
        Ok(())
    }

    /// A queue has stopped.
    pub fn stop_queue(&self) {
        let mut running = self.lock();
        *running = running.saturating_sub(1);
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.running_queues
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Updates the configuration space, which tells the driver if it has changed.
    fn update_config(&self) {
        let queues = self.recorders.len() as u16;
        let writeback = self.writeback.load(Ordering::Acquire);
        let space = config::space(&self.geometry(), queues, writeback);
        self.config.update(space);
    }
}

/// Whether preadv2(2) with RWF_NOWAIT failed because it would wait, or because the file
/// does not support the flag.
fn would_wait(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EOPNOTSUPP))
}

/// Whether `file` is in memory. Such file systems do not support RWF_NOWAIT, and never wait.
fn is_memory(file: BorrowedFd<'_>) -> bool {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    const RAMFS_MAGIC: u64 = 0x8584_58f6;
    rustix::fs::fstatfs(file)
        .is_ok_and(|it| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&(it.f_type as u64)))
}

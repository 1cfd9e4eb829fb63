//! Image formats: where in a file the bytes of a disk are.
//!
//! The modules of the formats use each other in a circle: a format opens its backing file
//! through `backing`, which opens that in any format. `lock` also needs [`SECTOR`] from here.

mod backing;
pub mod create;
mod inflate;
mod metadata_file;
mod qcow;
mod qcow2;
mod raw;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use device_vhost_user::Buffers;

pub use outrigger_cli::{BackingPolicy, ImageFormat};
pub use raw::BLKGETSIZE64;

/// Size of a sector of virtio-blk in bytes (virtio 1.2 section 5.2.4).
pub const SECTOR: u64 = 512;

/// Size and limits of a disk, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the disk, a multiple of [`SECTOR`].
    pub capacity: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Logical block size: the unit of a write.
    pub logical_block: u32,
    /// Physical block size: what the medium can write without a read first.
    pub physical_block: u32,
    /// Preferred size of a request; 0 when there is none.
    pub optimal_io: u32,
    /// Granularity of discards; `None` if they are not supported.
    pub discard: Option<u32>,
}

impl Geometry {
    /// Size of the disk in sectors.
    pub fn sectors(&self) -> u64 {
        self.capacity / SECTOR
    }
}

/// Where an image comes from, and how its backing files are opened.
#[derive(Clone, Copy, Debug)]
pub struct ImageOrigin<'a> {
    /// The image's name in messages.
    pub name: &'a str,
    /// The directory of the image, if it is known: its backing file is relative to it.
    pub directory: Option<&'a Path>,
    /// Whether backing files are opened.
    pub backing: BackingPolicy,
    /// Whether backing files are locked.
    pub lock: bool,
    /// Number of images on top of this one.
    pub depth: u32,
}

/// Opens the image in `file`, which [`open_file`] or [`adopt`] returned. Without a format it
/// is raw, unless the file begins like another format. Then it is refused: the guest of a
/// raw disk may have written that.
///
/// # Errors
/// The image is invalid or not supported. The error says what to do.
pub fn open(
    file: File,
    format: Option<ImageFormat>,
    read_only: bool,
    origin: &ImageOrigin<'_>,
) -> io::Result<Box<dyn Image>> {
    let format = match format {
        Some(format) => format,
        None => match looks_like(&file) {
            None => ImageFormat::Raw,
            Some(other) => {
                return Err(io::Error::other(format!(
                    "it begins like an image of format {other}: use --format {other} if it is \
                     one, or --format raw if its guest wrote that to a raw disk"
                )));
            }
        },
    };
    Ok(match format {
        ImageFormat::Raw => {
            let image = raw::RawImage::new(file, read_only)?;
            if image.padding() > 0 {
                tracing::warn!(
                    "{}: the last sector is incomplete: the guest sees {} zero bytes more, \
                     which are added to the file when it writes to that sector",
                    origin.name,
                    image.padding()
                );
            }
            Box::new(image)
        }
        ImageFormat::Qcow2 => Box::new(qcow2::Qcow2Image::open(file, origin, read_only)?),
        ImageFormat::Qcow => Box::new(qcow::QcowImage::open(file, origin, read_only)?),
    })
}

/// The format that a file begins like, if that is not raw.
fn looks_like(file: &File) -> Option<&'static str> {
    let mut start = [0; 8];
    // A file that is shorter or cannot be read fails later.
    file.read_exact_at(&mut start, 0).ok()?;
    (start[..4] == qcow2::header::MAGIC).then_some(match start[4..] {
        [0, 0, 0, 1] => "qcow",
        _ => "qcow2",
    })
}

/// Checks that a disk of `now` bytes can be resized to `capacity` bytes.
fn check_growth(now: u64, capacity: u64) -> io::Result<()> {
    if !capacity.is_multiple_of(SECTOR) {
        return Err(io::Error::other(format!(
            "{capacity} bytes is not a multiple of the sector size, 512 bytes"
        )));
    }
    if capacity < now {
        return Err(io::Error::other(format!(
            "it has {now} bytes and cannot shrink to {capacity}"
        )));
    }
    Ok(())
}

/// Opens the file or block device of an image.
///
/// # Errors
/// open(2) fails. If the file can be read but not written, the error says so.
pub fn open_file(path: &Path, read_only: bool) -> io::Result<File> {
    let open = |write| {
        // With O_NONBLOCK, opening a FIFO without a writer does not wait.
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
    };
    open(!read_only).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            if !read_only && open(false).is_ok() =>
        {
            let why =
                format!("it cannot be written: {error} (use --read-only to serve it read-only)");
            io::Error::new(error.kind(), why)
        }
        io::ErrorKind::IsADirectory => not_a_disk(),
        _ => error,
    })
}

/// Takes over the inherited file or block device of an image.
///
/// # Errors
/// The descriptor is not open, or not open for reading and, unless `read_only`, writing.
pub fn adopt(fd: RawFd, read_only: bool) -> io::Result<File> {
    let file = device_core::fd::inherit_open_for(fd, true, !read_only)?;
    Ok(File::from(file))
}

fn not_a_disk() -> io::Error {
    io::Error::other("neither a regular file nor a block device")
}

/// Where a range of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// In the file at this offset, for this many bytes.
    Data {
        /// Offset in the file.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Not in the file: the range reads as zeros.
    Zero {
        /// Length in bytes.
        len: u64,
    },
    /// In a form that only the image can read or write (compressed, in a backing file, not
    /// allocated yet), with [`Image::read`] and [`Image::write`].
    Special {
        /// Length in bytes.
        len: u64,
    },
}

impl Extent {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        let (Extent::Data { len, .. } | Extent::Zero { len } | Extent::Special { len }) = *self;
        len
    }
}

/// An image. It maps ranges of the disk to ranges of its file; the device transfers the
/// data. All ranges are within the disk's capacity. Several threads use it at a time.
///
/// A range of the file keeps belonging to the range of the disk that it was mapped to as
/// long as queues run, for a transfer may still be in flight there.
///
/// The process may be killed at any time, and another process continues with the image. So
/// the changes of [`Image::write`] and the like are in the file (write(2), not fsync(2))
/// when they return, and at every moment another process can continue from what is in the
/// file.
pub trait Image: Send + Sync {
    /// Size, which may grow, and limits.
    fn geometry(&self) -> Geometry;

    /// The file that [`Extent::Data`] refers to.
    fn file(&self) -> BorrowedFd<'_>;

    /// Whether the image has tables that map its data. Then a write is durable only after a
    /// flush, which puts the tables onto the disk.
    fn has_metadata(&self) -> bool {
        true
    }

    /// Where the bytes from `offset` on are read: `len` of them or fewer, at least one.
    ///
    /// # Errors
    /// The image's tables cannot be read.
    fn map_read(&self, offset: u64, len: u64) -> io::Result<Extent>;

    /// Where the bytes from `offset` on are written: `len` of them or fewer, at least one.
    /// `Special` for what [`Image::write`] must write.
    ///
    /// # Errors
    /// The image cannot be written.
    fn map_write(&self, offset: u64, len: u64) -> io::Result<Extent>;

    /// Reads a range for which [`Image::map_read`] returned `Special`.
    ///
    /// # Errors
    /// The file cannot be read, or the image is damaged.
    fn read(&self, _offset: u64, _buffers: &Buffers<'_>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Writes a range for which [`Image::map_write`] returned `Special`, and allocates it.
    ///
    /// # Errors
    /// The file cannot be written; it may have no room. Then the range reads as before, as
    /// far as it was not overwritten in place.
    fn write(&self, _offset: u64, _buffers: &Buffers<'_>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Deallocates the range. What it then reads as is undefined.
    ///
    /// # Errors
    /// `Unsupported`, or the file cannot be written.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the range read as zeros. With `unmap` it may be deallocated.
    ///
    /// # Errors
    /// The file cannot be written.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// Makes the disk larger. If `capacity` is its current size, checks whether the file or
    /// block device has grown.
    ///
    /// # Errors
    /// The disk cannot have this size. Then nothing has changed.
    fn grow(&self, capacity: u64) -> io::Result<()>;

    /// The file whose faults tests inject.
    #[cfg(test)]
    fn metadata_file(&self) -> Option<&metadata_file::MetadataFile> {
        None
    }

    /// Drops all cached metadata, for another process may have changed the file. No request
    /// is in flight meanwhile.
    ///
    /// # Errors
    /// The image's tables cannot be read.
    fn reload(&self) -> io::Result<()> {
        Ok(())
    }
}

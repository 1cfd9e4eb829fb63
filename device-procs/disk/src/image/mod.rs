//! Image formats: where in a file a disk's bytes lie.

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
use std::str::FromStr;

use clap::ValueEnum;

use device_vhost_user::Buffers;

pub use raw::BLKGETSIZE64;

/// Bytes of a sector as virtio-blk counts (virtio 1.2 section 5.2.4).
pub const SECTOR: u64 = 512;

/// Size and limits of a disk, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the disk, whole sectors.
    pub capacity: u64,
    /// No writes.
    pub read_only: bool,
    /// Logical block size: what a write replaces as a whole.
    pub logical_block: u32,
    /// Physical block size: what the medium writes without reading first.
    pub physical_block: u32,
    /// Preferred size of a request; 0 when there is none.
    pub optimal_io: u32,
    /// Whether unused ranges can be given back, and in what granularity.
    pub discard: Option<u32>,
}

impl Geometry {
    /// Size of the disk in sectors.
    pub fn sectors(&self) -> u64 {
        self.capacity / SECTOR
    }
}

/// How a disk lies in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// The file is the disk
    Raw,
    /// QEMU's, versions 2 and 3
    Qcow2,
    /// QEMU's first, version 1
    Qcow,
}

impl FromStr for ImageFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        ValueEnum::from_str(name, false)
    }
}

/// What is done with files that an image names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackingPolicy {
    /// They are not opened, and the image is refused
    Deny,
    /// They are read, wherever they are
    Allow,
}

/// Where an image comes from, and what may be done for it.
#[derive(Clone, Copy, Debug)]
pub struct ImageOrigin<'a> {
    /// What users call it.
    pub name: &'a str,
    /// What the names of other files in it are relative to, if that is known.
    pub directory: Option<&'a Path>,
    /// Whether those are opened.
    pub backing: BackingPolicy,
    /// Whether they are locked.
    pub lock: bool,
    /// Images on top of this one.
    pub depth: u32,
}

/// Makes an image of what [`open_file`] or [`adopt`] has opened. Without a format it is
/// raw; but a file that looks like another one is not taken for that, nor for raw: its
/// guest may have made it look so.
///
/// # Errors
/// One line that says what is wrong with it and what to do.
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
                    "it begins like an image of format {other}: --format {other} if it is one, \
                     --format raw if its guest wrote that to a raw disk"
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
                     which are added to the file once it writes to that sector",
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

/// The format that a file begins like, other than raw.
fn looks_like(file: &File) -> Option<&'static str> {
    let mut start = [0; 8];
    // What is shorter, or cannot be read, is found out later.
    file.read_exact_at(&mut start, 0).ok()?;
    (start[..4] == qcow2::header::MAGIC).then_some(match start[4..] {
        [0, 0, 0, 1] => "qcow",
        _ => "qcow2",
    })
}

/// Whether a disk of `now` bytes can become one of `capacity`.
fn check_growth(now: u64, capacity: u64) -> io::Result<()> {
    if !capacity.is_multiple_of(SECTOR) {
        return Err(io::Error::other("a disk has whole sectors of 512 bytes"));
    }
    if capacity < now {
        return Err(io::Error::other(format!(
            "it has {now} bytes, and a disk does not shrink"
        )));
    }
    Ok(())
}

/// Opens what an image lies in.
///
/// # Errors
/// open(2)'s own; of a medium that could be read and not written, one that says so.
pub fn open_file(path: &Path, read_only: bool) -> io::Result<File> {
    let open = |write| {
        // O_NONBLOCK: a FIFO without a writer must not hang us.
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
            let why = format!("it cannot be written: {error} (--read-only serves it as it is)");
            io::Error::new(error.kind(), why)
        }
        io::ErrorKind::IsADirectory => not_a_disk(),
        _ => error,
    })
}

/// Takes over what an image lies in from whoever opened it.
///
/// # Errors
/// When there is no such descriptor, or it is not open for what is to be done.
pub fn adopt(fd: RawFd, read_only: bool) -> io::Result<File> {
    let file = device_core::fd::inherit_open_for(fd, true, !read_only)?;
    Ok(File::from(file))
}

fn not_a_disk() -> io::Error {
    io::Error::other("neither a regular file nor a block device")
}

/// Where a piece of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// In the file at this offset, for this many bytes.
    Data {
        /// Offset in the file.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Nowhere: this many bytes read as zeros.
    Zero {
        /// Length in bytes.
        len: u64,
    },
    /// In a form that only the image understands (compressed, in a backing file, not yet
    /// allocated): [`Image::read`] and [`Image::write`] do it.
    Special {
        /// Length in bytes.
        len: u64,
    },
}

/// An image format: it maps, and others move data to and from where it says. Ranges given
/// to it lie within the disk's capacity. Several threads call it at a time.
///
/// What a place in the file was mapped to once stays the place of that piece of the disk
/// for as long as queues run: a transfer may still be under way there.
///
/// The process may be killed at any time, and another one that opened the image long ago
/// goes on with it: so what [`Image::write`] and the like have done is in the file
/// (write(2), not fsync(2)) when they return, and at no moment is the file in a state
/// from which another one could not go on.
pub trait Image: Send + Sync {
    /// Size, which may grow, and limits.
    fn geometry(&self) -> Geometry;

    /// The file that extents refer to.
    fn file(&self) -> BorrowedFd<'_>;

    /// Whether it takes more than the data in the file to find them again: tables, which
    /// only a flush puts onto the medium.
    fn has_tables(&self) -> bool {
        true
    }

    /// Where the bytes from `offset` on are read, `len` of them or fewer (and not none).
    ///
    /// # Errors
    /// When the image's own tables cannot be read.
    fn map(&self, offset: u64, len: u64) -> io::Result<Extent>;

    /// Where the bytes from `offset` on are written, `len` of them or fewer: `Data`, or
    /// `Special` for what [`Image::write`] must do.
    ///
    /// # Errors
    /// When the image cannot be written (any more).
    fn place(&self, offset: u64, len: u64) -> io::Result<Extent>;

    /// Reads what [`Image::map`] calls special.
    ///
    /// # Errors
    /// The medium's.
    fn read(&self, _offset: u64, _buffers: &Buffers<'_>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Writes what [`Image::place`] calls special, making room for it.
    ///
    /// # Errors
    /// The medium's, which may be full. After an error the range reads as before, as far
    /// as it was not overwritten in place.
    fn write(&self, _offset: u64, _buffers: &Buffers<'_>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Gives the range back; what it then reads as is undefined.
    ///
    /// # Errors
    /// `Unsupported`, or the medium's.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes the range read as zeros, giving it back if `unmap` allows.
    ///
    /// # Errors
    /// The medium's.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// Makes the disk larger. With the size of the disk as it is: looks whether what
    /// it lies in has grown.
    ///
    /// # Errors
    /// One line that says why not; then nothing has changed.
    fn grow(&self, capacity: u64) -> io::Result<()>;

    /// What tests make fail.
    #[cfg(test)]
    fn guard_of(&self) -> Option<&metadata_file::MetadataFile> {
        None
    }

    /// Forgets what is known of the file's content: another process may have changed it.
    /// Nothing else is under way meanwhile.
    ///
    /// # Errors
    /// When the image's own tables cannot be read.
    fn reload(&self) -> io::Result<()> {
        Ok(())
    }
}

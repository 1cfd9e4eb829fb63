//! Raw images: the file, or the block device, is the disk.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::{Extent, Geometry, Image, SECTOR, not_a_disk};

// Requests of linux/fs.h that crate libc does not have.
const BLKROGET: libc::c_ulong = 0x125e;
/// Returns the size of a block device in bytes.
pub const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKPBSZGET: libc::c_ulong = 0x127b;
const BLKIOOPT: libc::c_ulong = 0x1279;

/// Where the file system cannot zero a range, this many zero bytes are written at a time.
const ZERO_BUFFER: usize = 64 * 1024;

/// A raw image.
pub struct RawImage {
    file: File,
    geometry: Geometry,
    /// Size of the disk in bytes.
    capacity: AtomicU64,
    /// Size of the file in bytes. The last sector may be incomplete.
    len: AtomicU64,
    is_device: bool,
    /// Held while the file is made longer.
    growth_lock: Mutex<()>,
}

impl RawImage {
    /// The disk in a regular file or a block device. If a file ends within a sector, the
    /// disk ends with that sector, as in QEMU.
    ///
    /// # Errors
    /// It is neither a file nor a block device, or empty, or a read-only block device.
    pub fn new(file: File, read_only: bool) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let geometry = if metadata.file_type().is_block_device() {
            block_device(&file, read_only)?
        } else if metadata.is_file() {
            let block = u32::try_from(metadata.blksize()).unwrap_or(4096);
            Geometry {
                capacity: metadata.len().next_multiple_of(SECTOR),
                read_only,
                logical_block: 512,
                physical_block: block.clamp(512, 1 << 16),
                optimal_io: 0,
                discard: (!read_only && can_punch(&file, metadata.len())).then_some(block),
            }
        } else {
            return Err(not_a_disk());
        };
        if geometry.capacity == 0 {
            return Err(io::Error::other(
                "it is empty: a disk has at least one sector",
            ));
        }
        let len = match metadata.is_file() {
            true => metadata.len(),
            false => geometry.capacity,
        };
        Ok(RawImage {
            file,
            geometry,
            capacity: AtomicU64::new(geometry.capacity),
            len: AtomicU64::new(len),
            is_device: !metadata.is_file(),
            growth_lock: Mutex::new(()),
        })
    }

    /// Bytes of the disk that are not in the file: the end of the last sector.
    pub fn padding(&self) -> u64 {
        let capacity = self.capacity.load(Ordering::Acquire);
        capacity.saturating_sub(self.len.load(Ordering::Acquire))
    }

    /// The current size of the file or block device.
    fn measure(&self) -> io::Result<u64> {
        if self.is_device {
            return ioctl_number::<u64>(&self.file, BLKGETSIZE64);
        }
        // fstat(2), not statx(2), which the sandbox does not allow.
        let len = rustix::fs::fstat(&self.file)?.st_size;
        Ok(u64::try_from(len).unwrap_or(0))
    }

    /// Makes the file at least `len` bytes long.
    fn lengthen(&self, len: u64) -> io::Result<()> {
        let _lock = self
            .growth_lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.measure()? < len {
            rustix::fs::ftruncate(&self.file, len)?;
        }
        self.len.fetch_max(len, Ordering::AcqRel);
        Ok(())
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
        loop {
            match rustix::fs::fallocate(&self.file, mode, offset, len) {
                Err(Errno::INTR) => {}
                result => return result,
            }
        }
    }
}

fn ioctl_number<T: Default + Copy>(file: &File, request: libc::c_ulong) -> io::Result<T> {
    let mut value = T::default();
    // SAFETY: every request that is passed here writes one value of type T (linux/fs.h).
    if unsafe { libc::ioctl(file.as_raw_fd(), request, &mut value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

fn block_device(file: &File, read_only: bool) -> io::Result<Geometry> {
    if !read_only && ioctl_number::<libc::c_int>(file, BLKROGET)? != 0 {
        return Err(io::Error::other("the block device is read-only"));
    }
    let logical_block = ioctl_number::<libc::c_int>(file, BLKSSZGET)? as u32;
    Ok(Geometry {
        capacity: ioctl_number::<u64>(file, BLKGETSIZE64)?,
        read_only,
        logical_block,
        physical_block: ioctl_number::<libc::c_uint>(file, BLKPBSZGET)?,
        optimal_io: ioctl_number::<libc::c_uint>(file, BLKIOOPT)?,
        discard: (!read_only).then_some(logical_block),
    })
}

/// Whether the file system can punch holes. Tries it beyond the end of the file, where a hole
/// changes neither contents nor size.
fn can_punch(file: &File, size: u64) -> bool {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, mode, size, 4096).is_ok()
}

impl Image for RawImage {
    fn geometry(&self) -> Geometry {
        Geometry {
            capacity: self.capacity.load(Ordering::Acquire),
            ..self.geometry
        }
    }

    fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn has_metadata(&self) -> bool {
        false
    }

    fn map_read(&self, offset: u64, len: u64) -> io::Result<Extent> {
        let left = self.len.load(Ordering::Acquire).saturating_sub(offset);
        Ok(match len.min(left) {
            0 => Extent::Zero { len },
            len => Extent::Data { offset, len },
        })
    }

    fn map_write(&self, offset: u64, len: u64) -> io::Result<Extent> {
        if offset.saturating_add(len) > self.len.load(Ordering::Acquire) {
            // Before the write, so that a concurrent read does not see the end of the file.
            self.lengthen(self.capacity.load(Ordering::Acquire))?;
        }
        Ok(Extent::Data { offset, len })
    }

    fn grow(&self, capacity: u64) -> io::Result<()> {
        let now = self.capacity.load(Ordering::Acquire);
        super::check_growth(now, capacity)?;
        let available = self.measure()?;
        // The current size: the file or block device may have grown.
        let capacity = match capacity == now {
            true => (available / SECTOR * SECTOR).max(now),
            false => capacity,
        };
        if self.is_device && capacity > available {
            let why = format!("the block device has only {available} bytes");
            return Err(io::Error::other(why));
        }
        if !self.is_device && capacity > now {
            if self.geometry.read_only && available < capacity {
                return Err(io::Error::other("it is read-only"));
            }
            self.lengthen(capacity)?;
        }
        self.len
            .fetch_max(if self.is_device { capacity } else { 0 }, Ordering::AcqRel);
        self.capacity.store(capacity, Ordering::Release);
        Ok(())
    }

    fn reload(&self) -> io::Result<()> {
        // Another process may have made the file larger.
        let available = self.measure()?;
        if !self.is_device {
            self.len.fetch_max(available, Ordering::AcqRel);
        }
        self.grow(self.capacity.load(Ordering::Acquire))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(self.fallocate(mode, offset, len)?)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let mode = if unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        match self.fallocate(mode | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(Errno::OPNOTSUPP) => {}
            result => return Ok(result?),
        }
        let zeroes = vec![0; ZERO_BUFFER];
        let mut done = 0;
        while done < len {
            let count = (len - done).min(ZERO_BUFFER as u64);
            self.file
                .write_all_at(&zeroes[..count as usize], offset + done)?;
            done += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::open_file as open;
    use super::*;

    #[test]
    fn ranges_of_a_file_are_zeroed_and_its_size_stays() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![0xaa; 10_000]).unwrap();
        let image = RawImage::new(open(file.path(), false).unwrap(), false).unwrap();
        let geometry = image.geometry();
        assert_eq!((geometry.capacity, geometry.sectors()), (10_240, 20));
        image.write_zeroes(512, 1024, false).unwrap();
        image.write_zeroes(4096, 4096, true).unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(bytes.len(), 10_000);
        assert!(bytes[512..1536].iter().all(|&b| b == 0));
        assert!(bytes[4096..8192].iter().all(|&b| b == 0));
        assert_eq!((bytes[511], bytes[1536], bytes[8192]), (0xaa, 0xaa, 0xaa));
    }

    #[test]
    fn only_files_and_block_devices_with_data_are_accepted() {
        let refused = |path: &str| {
            let file = open(Path::new(path), true);
            file.and_then(|file| RawImage::new(file, true)).is_err()
        };
        for path in ["/dev/null", "/", "/nonexistent"] {
            assert!(refused(path), "{path}");
        }
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(refused(empty.path().to_str().unwrap()));
    }

    #[test]
    fn an_incomplete_last_sector_is_padded_and_completed_by_a_write() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![0xaa; 1000]).unwrap();
        let image = RawImage::new(open(file.path(), false).unwrap(), false).unwrap();
        assert_eq!(image.padding(), 24);
        let data = |offset, len| Extent::Data { offset, len };
        assert_eq!(image.map_read(0, 1024).unwrap(), data(0, 1000));
        assert_eq!(image.map_read(1000, 24).unwrap(), Extent::Zero { len: 24 });
        assert_eq!(image.map_write(0, 512).unwrap(), data(0, 512));
        assert_eq!(file.as_file().metadata().unwrap().len(), 1000);
        assert_eq!(image.map_write(512, 512).unwrap(), data(512, 512));
        assert_eq!(file.as_file().metadata().unwrap().len(), 1024);
        assert_eq!(image.map_read(0, 1024).unwrap(), data(0, 1024));
        assert_eq!(image.padding(), 0);
    }
}

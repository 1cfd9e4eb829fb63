//! The file of an image with tables. After a failed write to a table, the table in the file
//! and the one in memory may differ. So nothing is written to the file any more.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use device_vhost_user::Buffers;
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};

use crate::transfer;

/// Where the file system cannot zero a range, this many zero bytes are written at a time.
const ZERO_BUFFER: usize = 64 * 1024;

/// The file of an image with tables.
#[derive(Debug)]
pub struct MetadataFile {
    /// Its name in messages.
    name: String,
    file: File,
    /// Size of the file in bytes. If another program truncates the file, this stays: reads
    /// beyond the end fail then, and do not return zeros.
    len: AtomicU64,
    /// A table could not be written.
    broken: AtomicBool,
    #[cfg(test)]
    pub faults: faults::Faults,
}

impl MetadataFile {
    /// `name` is the name of `file` in messages.
    ///
    /// # Errors
    /// The size of the file is not known: lseek(2) fails.
    pub fn new(mut file: File, name: &str) -> io::Result<Self> {
        // fstat(2) does not tell the size of a block device.
        let len = file.seek(SeekFrom::End(0))?;
        Ok(MetadataFile {
            name: name.to_owned(),
            file,
            len: AtomicU64::new(len),
            broken: AtomicBool::new(false),
            #[cfg(test)]
            faults: faults::Faults::default(),
        })
    }

    /// The name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Size of the file in bytes, or less if another process has made it longer.
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Checks whether the file has grown; returns its size.
    ///
    /// # Errors
    /// fstat(2) fails.
    pub fn refresh_len(&self) -> io::Result<u64> {
        // fstat(2), not statx(2), which the sandbox does not allow.
        let now = rustix::fs::fstat(&self.file)?.st_size;
        let now = u64::try_from(now).unwrap_or(0);
        Ok(self.len.fetch_max(now, Ordering::AcqRel).max(now))
    }

    /// Checks that the image may still be written.
    ///
    /// # Errors
    /// A table could not be written before.
    pub fn check_writable(&self) -> io::Result<()> {
        if self.broken.load(Ordering::Acquire) {
            let why = "a write to its tables failed before, so it is read-only now";
            return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, why));
        }
        Ok(())
    }

    /// Allows no more writes: the tables in the file may be wrong.
    pub fn set_broken(&self, why: &io::Error) {
        if !self.broken.swap(true, Ordering::AcqRel) {
            tracing::error!(
                error = %why,
                "{}: writing to the image's tables failed: the disk is read-only from now on",
                self.name
            );
        }
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// preadv2(2) fails; `UnexpectedEof` beyond the end of the file.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut buffers = [IoSliceMut::new(buffer)];
        self.read_to_end(&mut buffers, offset).and_then(|rest| {
            let whole = rest.iter().all(|rest| rest.is_empty());
            whole
                .then_some(())
                .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        })
    }

    /// As [`MetadataFile::read`], with zeros beyond the end of the file, which must be longer
    /// than `offset`.
    ///
    /// # Errors
    /// preadv2(2) fails; `UnexpectedEof` if the file is shorter than it was.
    pub fn read_padded(&self, buffers: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        let mut total: u64 = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        if total > 0 && offset >= self.len() && offset >= self.refresh_len()? {
            return Err(beyond(offset));
        }
        let rest = self.read_to_end(buffers, offset)?;
        total -= rest.iter().map(|rest| rest.len() as u64).sum::<u64>();
        if rest.iter().any(|rest| !rest.is_empty()) && offset + total < self.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        rest.iter_mut().for_each(|rest| rest.fill(0));
        Ok(())
    }

    /// Reads until the end of the file; returns the buffers that are not filled.
    fn read_to_end<'a, 'b>(
        &self,
        mut buffers: &'a mut [IoSliceMut<'b>],
        mut offset: u64,
    ) -> io::Result<&'a mut [IoSliceMut<'b>]> {
        IoSliceMut::advance_slices(&mut buffers, 0);
        while !buffers.is_empty() {
            let some = buffers.len().min(libc::UIO_MAXIOV as usize);
            match preadv2(
                &self.file,
                &mut buffers[..some],
                offset,
                ReadWriteFlags::empty(),
            ) {
                Ok(0) => break,
                Ok(count) => {
                    offset += count as u64;
                    IoSliceMut::advance_slices(&mut buffers, count);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(buffers)
    }

    /// Writes where no table is and to which none points yet.
    ///
    /// # Errors
    /// The image is broken, or pwritev2(2) fails, which does not break it.
    pub fn write(&self, buffers: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.check_writable()?;
        self.write_all(buffers, offset)
    }

    /// Writes guest memory where no table is.
    ///
    /// # Errors
    /// As [`MetadataFile::write`].
    pub fn write_guest(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        self.check_writable()?;
        #[cfg(test)]
        self.faults.check(offset)?;
        transfer::write(&self.file, offset, buffers)?;
        self.extend_len(offset + buffers.len() as u64);
        Ok(())
    }

    /// Writes a part of a table.
    ///
    /// # Errors
    /// The image is broken, or pwritev2(2) fails, which breaks it.
    pub fn write_table(&self, buffers: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.check_writable()?;
        self.write_all(buffers, offset)
            .inspect_err(|error| self.set_broken(error))
    }

    fn write_all(&self, mut buffers: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        #[cfg(test)]
        self.faults.check(offset)?;
        IoSlice::advance_slices(&mut buffers, 0);
        while !buffers.is_empty() {
            let some = buffers.len().min(libc::UIO_MAXIOV as usize);
            match pwritev2(
                &self.file,
                &buffers[..some],
                offset,
                ReadWriteFlags::empty(),
            ) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    offset += count as u64;
                    IoSlice::advance_slices(&mut buffers, count);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.extend_len(offset);
        Ok(())
    }

    fn extend_len(&self, end: u64) {
        // Nearly always the file is long enough, so that no thread has to write here.
        if end > self.len() {
            self.len.fetch_max(end, Ordering::AcqRel);
        }
    }

    /// Truncates the file to `len` bytes, after it was made longer for a write that failed.
    pub fn truncate_back(&self, len: u64) {
        // If this fails, some space is lost. If the image is broken, a table may point there.
        if self.check_writable().is_ok() {
            #[cfg(test)]
            if self.faults.check(len).is_err() {
                return;
            }
            if rustix::fs::ftruncate(&self.file, len).is_ok() {
                self.len.store(len, Ordering::Release);
            }
        }
    }

    /// Makes the range read as zeros, and the file long enough to contain it. With `unmap`
    /// the range may be deallocated.
    ///
    /// # Errors
    /// The file cannot be written or has no room.
    pub fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check_writable()?;
        let end = offset.checked_add(len).ok_or_else(|| beyond(offset))?;
        let old = self.len();
        if end > old {
            // The new part of a file reads as zeros.
            #[cfg(test)]
            self.faults.check(offset)?;
            match rustix::fs::ftruncate(&self.file, end) {
                // A block device cannot grow.
                Err(Errno::INVAL) => return Err(io::ErrorKind::StorageFull.into()),
                result => result?,
            }
            self.extend_len(end);
        }
        if offset < old {
            self.zero_inside(offset, len.min(old - offset), unmap)?;
        }
        Ok(())
    }

    fn zero_inside(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        #[cfg(test)]
        self.faults.check(offset)?;
        let modes = match unmap {
            true => [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE],
            false => [FallocateFlags::ZERO_RANGE, FallocateFlags::PUNCH_HOLE],
        };
        for mode in modes {
            match self.fallocate(mode, offset, len) {
                Err(Errno::OPNOTSUPP) => {}
                result => return Ok(result?),
            }
        }
        let zeroes = vec![0; len.min(ZERO_BUFFER as u64) as usize];
        let mut done = 0;
        while done < len {
            let count = (len - done).min(ZERO_BUFFER as u64) as usize;
            self.write_all(&mut [IoSlice::new(&zeroes[..count])], offset + done)?;
            done += count as u64;
        }
        Ok(())
    }

    /// Deallocates a range, which then reads as zeros. Does nothing if the file system does
    /// not support it.
    ///
    /// # Errors
    /// fallocate(2) fails.
    pub fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        #[cfg(test)]
        self.faults.check(offset)?;
        match self.fallocate(FallocateFlags::PUNCH_HOLE, offset, len) {
            Err(Errno::OPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
        loop {
            let mode = mode | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&self.file, mode, offset, len) {
                Err(Errno::INTR) => {}
                result => return result,
            }
        }
    }
}

/// The error for a table that points beyond the end of the file.
pub fn beyond(offset: u64) -> io::Error {
    damaged(&format!(
        "offset {offset:#x} is beyond the end of the image's file"
    ))
}

/// The error for an image that contradicts itself.
pub fn damaged(why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the image is damaged: {why} (qemu-img check reports the details)"),
    )
}

/// Fault injection for tests.
#[cfg(test)]
pub mod faults {
    use std::io;
    use std::ops::Range;
    use std::sync::Mutex;

    /// Which writes fail.
    #[derive(Debug, Default)]
    pub struct Faults(Mutex<FaultState>);

    #[derive(Debug, Default)]
    struct FaultState {
        /// How many more writes succeed before all fail, as if the process was killed.
        writes_left: Option<u64>,
        /// How many more writes succeed before one fails.
        writes_until_failure: Option<u64>,
        /// Writes that begin in this range fail with this errno.
        failing: Option<(Range<u64>, i32)>,
    }

    impl Faults {
        /// After `writes` more writes, all fail.
        pub fn fail_all_after(&self, writes: u64) {
            self.0.lock().unwrap().writes_left = Some(writes);
        }

        /// After `writes` more writes, one fails; returns the old number.
        pub fn fail_once_after(&self, writes: Option<u64>) -> Option<u64> {
            std::mem::replace(&mut self.0.lock().unwrap().writes_until_failure, writes)
        }

        /// Writes that begin in `range` fail with `errno`, or succeed again if it is 0.
        pub fn fail(&self, range: Range<u64>, errno: i32) {
            self.0.lock().unwrap().failing = (errno != 0).then_some((range, errno));
        }

        pub(super) fn check(&self, offset: u64) -> io::Result<()> {
            let mut state = self.0.lock().unwrap();
            if let Some(left) = state.writes_until_failure {
                state.writes_until_failure = left.checked_sub(1);
                if left == 0 {
                    return Err(io::Error::from_raw_os_error(libc::EIO));
                }
            }
            if let Some(left) = &mut state.writes_left {
                *left = left.checked_sub(1).ok_or(io::ErrorKind::Interrupted)?;
            }
            match &state.failing {
                Some((range, errno)) if range.contains(&offset) => {
                    Err(io::Error::from_raw_os_error(*errno))
                }
                _ => Ok(()),
            }
        }
    }
}

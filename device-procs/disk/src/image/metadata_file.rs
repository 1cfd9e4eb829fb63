//! The file of an image that has tables of its own, and what keeps those whole: once
//! the file could not be written where tables are, what it says and what we know of it
//! differ, so nothing is written to it any more.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use device_vhost_user::Buffers;
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};

use crate::transfer;

/// Where the file system cannot zero a range, it is written in pieces of this many bytes.
const ZEROES: usize = 64 * 1024;

/// An image's file.
#[derive(Debug)]
pub struct MetadataFile {
    /// What users call it.
    name: String,
    file: File,
    /// Size of the file in bytes. It does not fall because somebody shortens the file: that
    /// makes errors, not zeros.
    len: AtomicU64,
    broken: AtomicBool,
    #[cfg(test)]
    pub faults: faults::Faults,
}

impl MetadataFile {
    /// Guards `file`, which users call `name`.
    ///
    /// # Errors
    /// When its size cannot be known.
    pub fn new(mut file: File, name: &str) -> io::Result<Self> {
        // Of a block device, too, which fstat(2) does not say.
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

    /// What users call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Size of the file in bytes, or less when others than we made it longer.
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Looks whether the file has grown.
    ///
    /// # Errors
    /// fstat(2)'s.
    pub fn look_again(&self) -> io::Result<u64> {
        // fstat(2), not statx(2): the sandbox knows only the former.
        let now = rustix::fs::fstat(&self.file)?.st_size;
        let now = u64::try_from(now).unwrap_or(0);
        Ok(self.len.fetch_max(now, Ordering::AcqRel).max(now))
    }

    /// Fails when the image is not written to any more.
    ///
    /// # Errors
    /// One that says so.
    pub fn usable(&self) -> io::Result<()> {
        if self.broken.load(Ordering::Acquire) {
            let why = "its tables could not be written before: it is only read";
            return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, why));
        }
        Ok(())
    }

    /// No more writes: the tables in the file are not what they should be.
    pub fn give_up(&self, why: &io::Error) {
        if !self.broken.swap(true, Ordering::AcqRel) {
            tracing::error!(
                "{}: writing the image's tables: {why}: the disk is read-only from now on",
                self.name
            );
        }
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// The medium's; `UnexpectedEof` where the file ends.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut buffers = [IoSliceMut::new(buffer)];
        self.read_to_end(&mut buffers, offset).and_then(|rest| {
            let whole = rest.iter().all(|rest| rest.is_empty());
            whole
                .then_some(())
                .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        })
    }

    /// As [`MetadataFile::read`], with zeros where the file has no more; but it must reach to
    /// `offset` at least.
    ///
    /// # Errors
    /// The medium's; `UnexpectedEof` when the file is shorter than it was.
    pub fn read_padded(&self, buffers: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        let mut total: u64 = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        if total > 0 && offset >= self.len() && offset >= self.look_again()? {
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

    /// Reads until the file ends; returns what could not be filled.
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

    /// Writes where no table is and none points to yet.
    ///
    /// # Errors
    /// The medium's; nothing is broken by it.
    pub fn write(&self, buffers: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.usable()?;
        self.write_all(buffers, offset)
    }

    /// Writes guest memory where no table is.
    ///
    /// # Errors
    /// As [`MetadataFile::write`].
    pub fn write_guest(&self, buffers: &Buffers<'_>, offset: u64) -> io::Result<()> {
        self.usable()?;
        #[cfg(test)]
        self.faults.strike(offset)?;
        transfer::write(&self.file, offset, buffers)?;
        self.reaches(offset + buffers.len() as u64);
        Ok(())
    }

    /// Writes a part of the image's tables.
    ///
    /// # Errors
    /// The medium's; the image is read-only then.
    pub fn write_table(&self, buffers: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.usable()?;
        self.write_all(buffers, offset)
            .inspect_err(|error| self.give_up(error))
    }

    fn write_all(&self, mut buffers: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        #[cfg(test)]
        self.faults.strike(offset)?;
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
        self.reaches(offset);
        Ok(())
    }

    fn reaches(&self, end: u64) {
        // A look first: nearly always the file is long enough, and all threads look.
        if end > self.len() {
            self.len.fetch_max(end, Ordering::AcqRel);
        }
    }

    /// Makes the file as long again as it was, which had been made longer for what did not
    /// come.
    pub fn take_back(&self, len: u64) {
        // A failure costs space; and a table may point there if one was not written.
        if self.usable().is_ok() {
            #[cfg(test)]
            if self.faults.strike(len).is_err() {
                return;
            }
            if rustix::fs::ftruncate(&self.file, len).is_ok() {
                self.len.store(len, Ordering::Release);
            }
        }
    }

    /// Makes the range read as zeros, and the file long enough to have it; its space is
    /// given back if `unmap` allows.
    ///
    /// # Errors
    /// The medium's.
    pub fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.usable()?;
        let end = offset.checked_add(len).ok_or_else(|| beyond(offset))?;
        let old = self.len();
        if end > old {
            // Behind the end of the file there are zeros only.
            #[cfg(test)]
            self.faults.strike(offset)?;
            match rustix::fs::ftruncate(&self.file, end) {
                // A block device ends where it ends.
                Err(Errno::INVAL) => return Err(io::ErrorKind::StorageFull.into()),
                result => result?,
            }
            self.reaches(end);
        }
        if offset < old {
            self.zero_inside(offset, len.min(old - offset), unmap)?;
        }
        Ok(())
    }

    fn zero_inside(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        #[cfg(test)]
        self.faults.strike(offset)?;
        let ways = match unmap {
            true => [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE],
            false => [FallocateFlags::ZERO_RANGE, FallocateFlags::PUNCH_HOLE],
        };
        for how in ways {
            match self.fallocate(how, offset, len) {
                Err(Errno::OPNOTSUPP) => {}
                result => return Ok(result?),
            }
        }
        let zeroes = vec![0; len.min(ZEROES as u64) as usize];
        let mut done = 0;
        while done < len {
            let count = (len - done).min(ZEROES as u64) as usize;
            self.write_all(&mut [IoSlice::new(&zeroes[..count])], offset + done)?;
            done += count as u64;
        }
        Ok(())
    }

    /// Gives the space of a range back, which then reads as zeros. Where the file system
    /// cannot, nothing happens.
    ///
    /// # Errors
    /// The medium's.
    pub fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.usable()?;
        #[cfg(test)]
        self.faults.strike(offset)?;
        match self.fallocate(FallocateFlags::PUNCH_HOLE, offset, len) {
            Err(Errno::OPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    fn fallocate(&self, how: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
        loop {
            let how = how | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&self.file, how, offset, len) {
                Err(Errno::INTR) => {}
                result => return result,
            }
        }
    }
}

/// An entry of a table, or a request, points behind the end of the file.
pub fn beyond(offset: u64) -> io::Error {
    damaged(&format!(
        "offset {offset:#x} is beyond the end of the image's file"
    ))
}

/// The image contradicts itself.
pub fn damaged(why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the image is damaged: {why} (qemu-img check tells more)"),
    )
}

/// Media that fail, for tests.
#[cfg(test)]
pub mod faults {
    use std::io;
    use std::ops::Range;
    use std::sync::Mutex;

    /// What fails.
    #[derive(Debug, Default)]
    pub struct Faults(Mutex<State>);

    #[derive(Debug, Default)]
    struct State {
        /// So many writes are done, and none after them, as if the process was killed.
        lives: Option<u64>,
        /// So many writes are done, then one is not.
        once: Option<u64>,
        /// Writes that begin here fail with this number.
        failing: Option<(Range<u64>, i32)>,
    }

    impl Faults {
        /// After `writes` more, nothing is written any more.
        pub fn die_after(&self, writes: u64) {
            self.0.lock().unwrap().lives = Some(writes);
        }

        /// After `writes` more, one fails; returns how many were still to come before that one.
        pub fn fail_once_after(&self, writes: Option<u64>) -> Option<u64> {
            std::mem::replace(&mut self.0.lock().unwrap().once, writes)
        }

        /// Writes to offsets in `range` fail with `errno`; 0 mends it.
        pub fn fail(&self, range: Range<u64>, errno: i32) {
            self.0.lock().unwrap().failing = (errno != 0).then_some((range, errno));
        }

        pub(super) fn strike(&self, offset: u64) -> io::Result<()> {
            let mut state = self.0.lock().unwrap();
            if let Some(left) = state.once {
                state.once = left.checked_sub(1);
                if left == 0 {
                    return Err(io::Error::from_raw_os_error(libc::EIO));
                }
            }
            if let Some(lives) = &mut state.lives {
                *lives = lives.checked_sub(1).ok_or(io::ErrorKind::Interrupted)?;
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

//! I/O engines: how bytes get from a file into guest memory and back.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Moves data. Every call is complete when it returns.
pub trait Engine: Send + Sync {
    /// Fills `iovecs` from `file` at `offset`.
    ///
    /// # Errors
    /// The medium's; `UnexpectedEof` when the file is shorter than it was.
    ///
    /// # Safety
    /// The iovecs describe memory that may be written for the length of the call.
    unsafe fn read(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        iovecs: &mut [libc::iovec],
    ) -> io::Result<()>;

    /// Writes `iovecs` to `file` at `offset`.
    ///
    /// # Errors
    /// The medium's.
    ///
    /// # Safety
    /// The iovecs describe memory that may be read for the length of the call.
    unsafe fn write(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        iovecs: &mut [libc::iovec],
    ) -> io::Result<()>;

    /// Puts everything written so far onto the medium.
    ///
    /// # Errors
    /// The medium's.
    fn flush(&self, file: BorrowedFd<'_>) -> io::Result<()>;
}

/// preadv(2) and pwritev(2) in the worker's own thread.
pub struct SyncEngine;

// SAFETY: calls are as preadv(2) and pwritev(2) want them: see `transfer`.
type Vectored = unsafe extern "C" fn(
    libc::c_int,
    *const libc::iovec,
    libc::c_int,
    libc::off_t,
) -> libc::ssize_t;

/// Goes on after short transfers until all of `iovecs` is done.
///
/// # Safety
/// As for the methods of [`Engine`].
unsafe fn transfer(
    call: Vectored,
    file: BorrowedFd<'_>,
    mut offset: u64,
    mut iovecs: &mut [libc::iovec],
) -> io::Result<()> {
    while let Some(first) = iovecs.first() {
        if first.iov_len == 0 {
            iovecs = &mut iovecs[1..];
            continue;
        }
        let count = iovecs.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the caller vouches for the memory; `count` iovecs are there.
        let done = unsafe { call(file.as_raw_fd(), iovecs.as_ptr(), count, at) };
        let mut left = match done {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            1.. => done as usize,
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => continue,
                e => return Err(e),
            },
        };
        offset += left as u64;
        while left > 0 {
            let first = &mut iovecs[0];
            let here = left.min(first.iov_len);
            // SAFETY: `here` is at most the length of this piece.
            first.iov_base = unsafe { first.iov_base.cast::<u8>().add(here) }.cast();
            first.iov_len -= here;
            left -= here;
            if first.iov_len == 0 {
                iovecs = &mut iovecs[1..];
            }
        }
    }
    Ok(())
}

impl Engine for SyncEngine {
    // SAFETY: as the trait says.
    unsafe fn read(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        iovecs: &mut [libc::iovec],
    ) -> io::Result<()> {
        // SAFETY: passed on from the caller.
        unsafe { transfer(libc::preadv, file, offset, iovecs) }
    }

    unsafe fn write(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        iovecs: &mut [libc::iovec],
    ) -> io::Result<()> {
        // SAFETY: passed on from the caller.
        unsafe { transfer(libc::pwritev, file, offset, iovecs) }
    }

    fn flush(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(file)?)
    }
}

//! preadv2(2) and pwritev2(2) between a file and guest memory, in the calling thread.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use device_vhost_user::Buffers;

/// Fills `buffers` from `file` at `offset`.
///
/// # Errors
/// The medium's; `UnexpectedEof` when the file is shorter than it was.
#[cfg(test)]
pub fn read(file: impl AsFd, offset: u64, buffers: &Buffers<'_>) -> io::Result<()> {
    // SAFETY: the pieces are guest memory, mapped for as long as `buffers` borrows it.
    unsafe { transfer(libc::preadv2, file, offset, &mut buffers.iovecs(), 0) }
}

/// Writes `buffers` to `file` at `offset`.
///
/// # Errors
/// The medium's.
pub fn write(file: impl AsFd, offset: u64, buffers: &Buffers<'_>) -> io::Result<()> {
    // SAFETY: as in `read`.
    unsafe { transfer(libc::pwritev2, file, offset, &mut buffers.iovecs(), 0) }
}

/// preadv2(2) or pwritev2(2).
// SAFETY: whoever calls one vouches for the memory of its iovecs: see `transfer`.
pub type Vectored = unsafe extern "C" fn(
    libc::c_int,
    *const libc::iovec,
    libc::c_int,
    libc::off_t,
    libc::c_int,
) -> libc::ssize_t;

/// Calls `call` with `flags` (RWF_*), and goes on after short transfers until all of
/// `iovecs` is done. What is not done when it fails is left in `iovecs`.
///
/// # Errors
/// The medium's; `UnexpectedEof` at the end of the file.
///
/// # Safety
/// The iovecs describe memory that may be read, or written, for the length of the call.
pub unsafe fn transfer(
    call: Vectored,
    file: impl AsFd,
    mut offset: u64,
    mut iovecs: &mut [libc::iovec],
    flags: libc::c_int,
) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    while !iovecs.is_empty() {
        let count = iovecs.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the caller vouches for the memory; `count` iovecs are there.
        let done = unsafe { call(fd, iovecs.as_ptr(), count, at, flags) };
        match done {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            1.. => {
                offset += done as u64;
                iovecs = skip(iovecs, done as usize);
            }
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
    Ok(())
}

/// What is left of `iovecs` behind the first `count` bytes; never begins with an empty
/// piece.
pub fn skip(mut iovecs: &mut [libc::iovec], mut count: usize) -> &mut [libc::iovec] {
    while let Some(first) = iovecs.first_mut() {
        let here = count.min(first.iov_len);
        // SAFETY: `here` is at most the length of this piece.
        first.iov_base = unsafe { first.iov_base.cast::<u8>().add(here) }.cast();
        first.iov_len -= here;
        count -= here;
        if first.iov_len > 0 {
            break;
        }
        iovecs = &mut iovecs[1..];
    }
    iovecs
}

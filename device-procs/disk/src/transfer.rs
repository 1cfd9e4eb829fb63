//! preadv2(2) and pwritev2(2) between a file and guest memory, in the calling thread.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use device_vhost_user::Buffers;

use crate::guest_iovec::GuestIovec;

/// Fills `buffers` from `file` at `offset`.
///
/// # Errors
/// preadv2(2) fails; `UnexpectedEof` when the file is shorter.
#[cfg(test)]
pub fn read(file: impl AsFd, offset: u64, buffers: &Buffers<'_>) -> io::Result<()> {
    let mut iovecs = Vec::new();
    GuestIovec::append(&mut iovecs, buffers);
    // SAFETY: `buffers` borrows the guest memory, so it is mapped.
    unsafe { transfer(libc::preadv2, file, offset, &mut iovecs, 0) }
}

/// Writes `buffers` to `file` at `offset`.
///
/// # Errors
/// pwritev2(2) fails.
pub fn write(file: impl AsFd, offset: u64, buffers: &Buffers<'_>) -> io::Result<()> {
    let mut iovecs = Vec::new();
    GuestIovec::append(&mut iovecs, buffers);
    // SAFETY: `buffers` borrows the guest memory, so it is mapped.
    unsafe { transfer(libc::pwritev2, file, offset, &mut iovecs, 0) }
}

/// preadv2(2) or pwritev2(2).
// SAFETY: a caller must see to it that the memory of the iovecs is mapped.
pub type VectoredIo = unsafe extern "C" fn(
    libc::c_int,
    *const libc::iovec,
    libc::c_int,
    libc::off_t,
    libc::c_int,
) -> libc::ssize_t;

/// Calls `call` with `flags` (RWF_*), again after a short transfer, until all of `iovecs`
/// is transferred. After an error, `iovecs` is what is not transferred.
///
/// # Errors
/// `call` fails; `UnexpectedEof` at the end of the file.
///
/// # Safety
/// The memory of `iovecs` is mapped.
pub unsafe fn transfer(
    call: VectoredIo,
    file: impl AsFd,
    mut offset: u64,
    mut iovecs: &mut [GuestIovec],
    flags: libc::c_int,
) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    while !iovecs.is_empty() {
        let count = iovecs.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the memory is mapped, as the caller promises; there are `count` iovecs.
        let done = unsafe { call(fd, GuestIovec::as_ptr(iovecs), count, at, flags) };
        match done {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            1.. => {
                offset += done as u64;
                iovecs = GuestIovec::advance(iovecs, done as usize);
            }
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
    Ok(())
}

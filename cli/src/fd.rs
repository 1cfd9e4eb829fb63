//! Descriptors that others made.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// Takes over a descriptor that the parent left open for us; of the standard
/// three, a duplicate.
///
/// # Errors
/// `EBADF` when there is none.
pub fn inherit(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl(F_GETFD) only looks at the number.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    if fd <= libc::STDERR_FILENO {
        // Standard output and its like stay what they are for everybody else.
        // SAFETY: it is open, and stays so for the length of the borrow.
        let shared = unsafe { BorrowedFd::borrow_raw(fd) };
        return Ok(rustix::io::fcntl_dupfd_cloexec(shared, 3)?);
    }
    // SAFETY: it is open, and the command line says that it is ours.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// As [`inherit`], of a file that must be open for reading, for writing, or for both.
///
/// # Errors
/// One that says which is missing.
pub fn inherit_open_for(fd: RawFd, reading: bool, writing: bool) -> io::Result<OwnedFd> {
    let fd = inherit(fd)?;
    let mode = fcntl_getfl(&fd)? & OFlags::RWMODE;
    let why = match mode {
        OFlags::RDONLY if writing => "not open for writing",
        OFlags::WRONLY if reading => "not open for reading",
        _ => return Ok(fd),
    };
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

/// Sets O_NONBLOCK by fcntl(2); std does it by an ioctl, which the sandbox
/// forbids. The flag belongs to the open file, so whoever shares it sees it too.
///
/// # Errors
/// fcntl(2)'s.
pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = fcntl_getfl(&fd)?;
    Ok(fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
}

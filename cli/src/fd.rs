//! File descriptors that another process opened.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// Takes ownership of the descriptor `fd`, which the parent process left open for this one.
/// For one of the three standard descriptors it returns a duplicate instead.
///
/// # Errors
/// `EBADF` when `fd` is not open.
pub fn inherit(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl(F_GETFD) accepts any number and changes nothing.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    if fd <= libc::STDERR_FILENO {
        // The rest of the program goes on to use the standard descriptors.
        // SAFETY: the descriptor is open, and nothing closes a standard descriptor.
        let shared = unsafe { BorrowedFd::borrow_raw(fd) };
        return Ok(rustix::io::fcntl_dupfd_cloexec(shared, 3)?);
    }
    // SAFETY: the descriptor is open, and the command line assigns it to this caller.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// Like [`inherit`], for a descriptor that must be open for reading, for writing or for both.
///
/// # Errors
/// `EBADF` when `fd` is not open; `PermissionDenied` when it lacks an access mode, which the
/// message names.
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

/// Sets O_NONBLOCK with fcntl(2). The standard library uses an ioctl for this, which the
/// sandbox forbids. The flag belongs to the open file description, so it also takes effect
/// in every process that shares it.
///
/// # Errors
/// The error of fcntl(2).
pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = fcntl_getfl(&fd)?;
    Ok(fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
}

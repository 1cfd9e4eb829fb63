//! Operations on eventfds that other processes hold as well. O_NONBLOCK belongs to the open
//! file, so a hostile process can clear it at any time: nothing here relies on it.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::ReadWriteFlags;
use vmm_sys_util::eventfd::EventFd;

/// The descriptor, for calls that borrow one.
pub fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor stays open for as long as `fd` is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

fn is_ready(fd: &EventFd, flags: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(borrow(fd), flags)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// Whether an event is pending.
pub fn is_pending(fd: &EventFd) -> bool {
    is_ready(fd, PollFlags::IN)
}

/// Makes an event pending. A counter that is full is left unchanged: an event is pending
/// then.
pub fn signal(fd: &EventFd) {
    if is_ready(fd, PollFlags::OUT) {
        // If a process fills the counter at this moment, this blocks until the next signal
        // to the thread (EINTR).
        let _ = rustix::io::write(borrow(fd), &1u64.to_ne_bytes());
    }
}

/// Consumes a pending event; false when there was none.
pub fn take(fd: &EventFd) -> bool {
    let mut value = [0; 8];
    // -1: a file without positions (preadv2(2)).
    let position = u64::MAX;
    rustix::io::preadv2(
        borrow(fd),
        &mut [IoSliceMut::new(&mut value)],
        position,
        ReadWriteFlags::NOWAIT,
    )
    .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[test]
    fn nothing_blocks_when_another_process_clears_o_nonblock() {
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let flags = fcntl_getfl(borrow(&fd)).unwrap();
        fcntl_setfl(borrow(&fd), flags & !OFlags::NONBLOCK).unwrap();
        assert!(!take(&fd));
        signal(&fd);
        assert!(is_pending(&fd) && take(&fd) && !is_pending(&fd));
        fd.write(u64::MAX - 1).unwrap();
        signal(&fd);
        assert!(take(&fd));
    }
}

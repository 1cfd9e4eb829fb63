//! Waiting with poll(2), also for the signals that end the program.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use outrigger_cli::signals;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Whether `fd` is ready for `what` now. A pending error counts as ready.
pub fn is_ready(fd: impl AsFd, what: PollFlags) -> bool {
    wait(&mut [PollFd::new(&fd, what)], Some(Duration::ZERO)).unwrap_or(true)
}

/// Result of [`for_input`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitResult {
    /// The descriptor is readable.
    Ready,
    /// A signal that ends the program has arrived.
    Signal,
    /// The timeout is over.
    TimedOut,
}

/// Waits until `fd` is readable or one of `signals` has arrived.
///
/// # Errors
/// poll(2) fails.
pub fn for_input(
    fd: impl AsFd,
    signals: impl AsFd,
    timeout: Option<Duration>,
) -> io::Result<WaitResult> {
    let mut fds = [
        PollFd::new(&fd, PollFlags::IN),
        PollFd::new(&signals, PollFlags::IN),
    ];
    let any = wait(&mut fds, timeout)?;
    Ok(if !fds[1].revents().is_empty() {
        WaitResult::Signal
    } else if any {
        WaitResult::Ready
    } else {
        WaitResult::TimedOut
    })
}

fn wait(fds: &mut [PollFd], timeout: Option<Duration>) -> io::Result<bool> {
    let end = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        let left = end.map(|end| {
            let left = end.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        match poll(fds, left.as_ref()) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits until `fd` is writable; returns false after `timeout`.
pub fn for_output(fd: impl AsFd, timeout: Duration) -> bool {
    wait(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(timeout)).unwrap_or(false)
}

/// Blocks the signals that end the program; returns a descriptor that becomes readable
/// when one arrives (signalfd(2)).
///
/// # Errors
/// signalfd(2) fails, for example because no descriptors are left.
pub fn termination_signals() -> io::Result<OwnedFd> {
    let set = signals::termination_set();
    signals::block(&set);
    // SAFETY: the set is initialised.
    let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd has just returned it, so this is the only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

//! Waiting with poll(2), and the signals that end the program as a descriptor
//! that can be waited for.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use outrigger_cli::signals;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Whether `fd` can be read from or written to now. An error to be had there
/// counts as well.
pub fn is_ready(fd: impl AsFd, what: PollFlags) -> bool {
    wait(&mut [PollFd::new(&fd, what)], Some(Duration::ZERO)).unwrap_or(true)
}

/// How [`for_input`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The descriptor is readable.
    Ready,
    /// A signal wants the program to end.
    Signal,
    /// It has taken too long.
    Late,
}

/// Waits until `fd` is readable or one of `signals` has come.
///
/// # Errors
/// poll(2)'s.
pub fn for_input(
    fd: impl AsFd,
    signals: impl AsFd,
    timeout: Option<Duration>,
) -> io::Result<Woken> {
    let mut fds = [
        PollFd::new(&fd, PollFlags::IN),
        PollFd::new(&signals, PollFlags::IN),
    ];
    let any = wait(&mut fds, timeout)?;
    Ok(if !fds[1].revents().is_empty() {
        Woken::Signal
    } else if any {
        Woken::Ready
    } else {
        Woken::Late
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

/// Waits until `fd` takes output; false when that has taken too long.
pub fn for_output(fd: impl AsFd, timeout: Duration) -> bool {
    wait(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(timeout)).unwrap_or(false)
}

/// Blocks the signals that end the program; returns a descriptor that becomes
/// readable when one has come (signalfd(2)).
///
/// # Errors
/// The kernel's, when it is out of descriptors.
pub fn ending_signals() -> io::Result<OwnedFd> {
    let set = signals::termination_set();
    signals::block(&set);
    // SAFETY: the set is initialised.
    let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it has just been made, and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

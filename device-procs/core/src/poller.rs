//! epoll(7), edge-triggered: a source is reported once when it becomes ready, so its
//! handler continues until the source would block.
//!
//! Doorbells (kick eventfds) are never read. An unread eventfd still reports each new
//! write, and a process that takes over finds the doorbells readable that the process
//! before it did not serve.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{Timespec, epoll};

/// A set of file descriptors, each with a 64-bit token.
pub struct Poller(OwnedFd);

impl Poller {
    /// An empty set.
    ///
    /// # Errors
    /// epoll_create1(2) fails: no descriptor or memory is left.
    pub fn new() -> io::Result<Self> {
        Ok(Poller(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Reports `token` when `fd` becomes readable or writable, and when it is hung up.
    ///
    /// # Errors
    /// `AlreadyExists` when it is in the set, `PermissionDenied` for a regular file, which
    /// epoll does not support.
    pub fn add(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        let events = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP;
        self.register(fd, token, events)
    }

    /// Reports `token` when `fd` becomes readable, and only then.
    ///
    /// # Errors
    /// As [`Poller::add`].
    pub fn add_readable(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        self.register(fd, token, epoll::EventFlags::IN)
    }

    fn register(&self, fd: impl AsFd, token: u64, events: epoll::EventFlags) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token);
        Ok(epoll::add(
            &self.0,
            fd,
            data,
            events | epoll::EventFlags::ET,
        )?)
    }

    /// Removes `fd` from the set.
    ///
    /// # Errors
    /// `NotFound` when it is not in the set.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.0, fd)?)
    }

    /// Waits for events and appends their tokens. Without a timeout it waits until there
    /// are some. A signal ends the wait without tokens.
    ///
    /// # Errors
    /// epoll_wait(2) fails.
    pub fn wait(&self, tokens: &mut Vec<u64>, timeout: Option<Duration>) -> io::Result<()> {
        let mut events = [const { MaybeUninit::<epoll::Event>::uninit() }; 64];
        let timeout = timeout.map(|t| Timespec {
            tv_sec: t.as_secs() as i64,
            tv_nsec: t.subsec_nanos().into(),
        });
        match epoll::wait(&self.0, &mut events, timeout.as_ref()) {
            Ok((events, _)) => tokens.extend(events.iter().map(|e| e.data.u64())),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }
}

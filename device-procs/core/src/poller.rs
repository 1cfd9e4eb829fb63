//! epoll(7), edge-triggered throughout: a source is reported once when it
//! becomes ready, and whoever serves it goes on until it would block. Doorbells
//! are never read: an unread eventfd still reports each new ring, and a process
//! that takes over finds what its predecessor did not serve.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{Timespec, epoll};

/// A set of file descriptors with a 64-bit token each.
pub struct Poller(OwnedFd);

impl Poller {
    /// An empty set.
    ///
    /// # Errors
    /// The kernel's, when it is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Poller(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Reports `token` whenever `fd` becomes readable, writable or hung up.
    ///
    /// # Errors
    /// `AlreadyExists` when it is in the set, `PermissionDenied` for a regular
    /// file, which is always ready and cannot be polled.
    pub fn add(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        let flags = epoll::EventFlags::IN
            | epoll::EventFlags::OUT
            | epoll::EventFlags::RDHUP
            | epoll::EventFlags::ET;
        Ok(epoll::add(
            &self.0,
            fd,
            epoll::EventData::new_u64(token),
            flags,
        )?)
    }

    /// Reports `token` whenever `fd` becomes readable (and only then).
    ///
    /// # Errors
    /// As [`Poller::add`].
    pub fn add_readable(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(
            &self.0,
            fd,
            epoll::EventData::new_u64(token),
            flags,
        )?)
    }

    /// Takes `fd` out of the set.
    ///
    /// # Errors
    /// `NotFound` when it is not there.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.0, fd)?)
    }

    /// Waits for events and appends their tokens; `None` waits for ever.
    ///
    /// # Errors
    /// The kernel's; a signal is no error and returns no tokens.
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

//! A unix socket: one client at a time, and others wait for it to leave.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use device_core::Poller;
use outrigger_cli::socket::{self, BoundSocket};
use rustix::net::{SocketFlags, accept_with};

use crate::backend::{ConsoleBackend, Written};
use crate::stream::{CHUNK, Stream};

const LISTENER: u64 = 0;
const CLIENT: u64 = 1;

/// What clients that have left may have written to a guest that reads nothing, in
/// bytes. More is lost.
const LEFT_BEHIND: usize = 64 * 1024;

/// A listening socket and its client.
pub struct Unix {
    listener: OwnedFd,
    /// A driver has been there. Before, clients wait: they may be those of a process that
    /// this one is to take over from.
    served: bool,
    client: Option<SocketClient>,
    /// What clients that have left wrote before.
    left_behind: VecDeque<u8>,
}

struct SocketClient {
    stream: Stream,
    /// It has not shut its sending side down.
    sends: bool,
}

impl Unix {
    /// Listens on `path`, which is removed again unless it comes to be served.
    ///
    /// # Errors
    /// bind(2)'s own.
    pub fn bind(path: &Path) -> io::Result<(Self, BoundSocket)> {
        let (listener, unserved) = socket::bind(path)?;
        Ok((Self::new(listener.into())?, unserved))
    }

    /// Takes over a socket that listens.
    ///
    /// # Errors
    /// When there is none.
    pub fn adopt(fd: RawFd) -> io::Result<Self> {
        match device_core::listen::inherit(fd)? {
            (listener, true) => Self::new(listener),
            (_, false) => Err(io::Error::other("a socket that does not listen")),
        }
    }

    fn new(listener: OwnedFd) -> io::Result<Self> {
        device_core::fd::set_nonblocking(&listener)?;
        Ok(Unix {
            listener,
            served: false,
            client: None,
            left_behind: VecDeque::new(),
        })
    }

    /// Takes the next client, if there is none and one waits.
    fn next_client(&mut self, poller: &Poller) {
        while self.served && self.client.is_none() {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let accepted = match accept_with(&self.listener, flags) {
                Ok(fd) => Stream::own(fd),
                Err(rustix::io::Errno::AGAIN) => return,
                Err(error) => Err(error.into()),
            };
            match accepted.and_then(|stream| poller.add(&stream, CLIENT).map(|()| stream)) {
                Ok(stream) => {
                    self.client = Some(SocketClient {
                        stream,
                        sends: true,
                    })
                }
                // Tried again when the next one comes.
                Err(error) => return tracing::warn!("accepting a client: {error}"),
            }
        }
    }

    /// Takes what a client that has hung up wrote before, so that the next need not
    /// wait until the guest reads it.
    fn see_off(&mut self, poller: &Poller) {
        let mut buf = [0; CHUNK];
        while let Some(Ok(len @ 1..)) = self.client.as_ref().map(|it| it.stream.read(&mut buf)) {
            let room = LEFT_BEHIND.saturating_sub(self.left_behind.len());
            self.left_behind.extend(&buf[..len.min(room)]);
        }
        self.drop_client(poller);
    }

    /// Lets the client go; closing it also takes it out of the poller.
    fn drop_client(&mut self, poller: &Poller) {
        self.client = None;
        self.next_client(poller);
    }
}

impl ConsoleBackend for Unix {
    fn attach(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add_readable(&self.listener, LISTENER)
    }

    fn ready(&mut self, token: u64, poller: &Poller) {
        match (token, &self.client) {
            (LISTENER, _) => self.next_client(poller),
            (CLIENT, Some(client)) if client.stream.is_hung_up() => self.see_off(poller),
            _ => {}
        }
    }

    fn opened(&mut self) {
        self.served = true;
    }

    fn closed(&mut self) {
        self.left_behind.clear();
    }

    fn read(&mut self, buf: &mut [u8], poller: &Poller) -> usize {
        self.next_client(poller);
        if !self.left_behind.is_empty() {
            // Reading from memory cannot fail.
            return self.left_behind.read(buf).unwrap_or(0);
        }
        while let Some(client) = self.client.as_mut().filter(|client| client.sends) {
            match client.stream.read(buf) {
                Ok(0) if !client.stream.is_hung_up() => client.sends = false,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return 0,
                Ok(0) | Err(_) => self.drop_client(poller),
                Ok(len) => return len,
            }
        }
        0
    }

    fn write(&mut self, bytes: &[u8], poller: &Poller) -> Written {
        self.next_client(poller);
        while let Some(client) = &self.client {
            match client.stream.write(bytes) {
                Ok(len) => return Written::Some(len),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Written::Full,
                Err(_) => self.see_off(poller),
            }
        }
        Written::Absent
    }
}

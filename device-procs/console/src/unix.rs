//! A unix socket as console. It serves one client at a time; others wait.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use device_core::Poller;
use outrigger_cli::socket::{self, BoundSocket};
use rustix::net::{SocketFlags, accept_with};

use crate::backend::{ConsoleBackend, Written};
use crate::stream::{CHUNK, Stream};

// Event tokens.
const LISTENER: u64 = 0;
const CLIENT: u64 = 1;

/// Most input in bytes that is kept of clients that have disconnected, for a guest that
/// does not read. More is lost.
const MAX_PENDING_INPUT: usize = 64 * 1024;

/// A listening socket and its client.
pub struct Unix {
    listener: OwnedFd,
    /// A driver has used this process. Before, clients wait, because they may belong to the
    /// previous process.
    served: bool,
    client: Option<SocketClient>,
    /// Input of clients that have disconnected.
    pending_input: VecDeque<u8>,
}

struct SocketClient {
    stream: Stream,
    /// It has not shut down its sending side.
    sends: bool,
}

impl Unix {
    /// Listens on `path`. The socket is removed if the start of this process fails.
    ///
    /// # Errors
    /// bind(2) fails.
    pub fn bind(path: &Path) -> io::Result<(Self, BoundSocket)> {
        let (listener, bound) = socket::bind(path)?;
        Ok((Self::new(listener.into())?, bound))
    }

    /// Uses an inherited listening socket.
    ///
    /// # Errors
    /// It is not a listening socket.
    pub fn adopt(fd: RawFd) -> io::Result<Self> {
        match device_core::listener::inherit_socket(fd)? {
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
            pending_input: VecDeque::new(),
        })
    }

    /// Accepts the next client if there is none.
    fn accept_client(&mut self, poller: &Poller) {
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
                // It is tried again when another client connects.
                Err(error) => return tracing::warn!(%error, "accepting a client failed"),
            }
        }
    }

    /// Reads the remaining input of a client that has disconnected, so that the next client
    /// need not wait until the guest reads it, and drops the client.
    fn drain_client(&mut self, poller: &Poller) {
        let mut buf = [0; CHUNK];
        while let Some(Ok(len @ 1..)) = self.client.as_ref().map(|it| it.stream.read(&mut buf)) {
            let room = MAX_PENDING_INPUT.saturating_sub(self.pending_input.len());
            self.pending_input.extend(&buf[..len.min(room)]);
        }
        self.drop_client(poller);
    }

    /// Drops the client. Closing its descriptor also removes it from the poller.
    fn drop_client(&mut self, poller: &Poller) {
        self.client = None;
        self.accept_client(poller);
    }
}

impl ConsoleBackend for Unix {
    fn register_sources(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add_readable(&self.listener, LISTENER)
    }

    fn handle_event(&mut self, token: u64, poller: &Poller) {
        match (token, &self.client) {
            (LISTENER, _) => self.accept_client(poller),
            (CLIENT, Some(client)) if client.stream.is_hung_up() => self.drain_client(poller),
            _ => {}
        }
    }

    fn driver_connected(&mut self) {
        self.served = true;
    }

    fn driver_disconnected(&mut self) {
        self.pending_input.clear();
    }

    fn read(&mut self, buf: &mut [u8], poller: &Poller) -> usize {
        self.accept_client(poller);
        if !self.pending_input.is_empty() {
            // Reading from memory cannot fail.
            return self.pending_input.read(buf).unwrap_or(0);
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
        self.accept_client(poller);
        while let Some(client) = &self.client {
            match client.stream.write(bytes) {
                Ok(len) => return Written::Some(len),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Written::Full,
                Err(_) => self.drain_client(poller),
            }
        }
        Written::Absent
    }
}

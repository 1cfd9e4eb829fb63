//! The socket that front ends connect to. It is bound once and outlives every front end.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use outrigger_cli::Usage;
use outrigger_cli::socket::{self, BoundSocket};
use rustix::net::sockopt;

use crate::CommonOptions;

/// Takes over an inherited unix socket; true if it listens.
///
/// # Errors
/// The descriptor is not open, or is not a unix socket.
pub fn inherit_socket(fd: RawFd) -> io::Result<(OwnedFd, bool)> {
    let fd = crate::fd::inherit(fd)?;
    if sockopt::socket_domain(&fd)? != rustix::net::AddressFamily::UNIX {
        return Err(io::Error::other("not a unix socket"));
    }
    let listens = sockopt::socket_acceptconn(&fd)?;
    Ok((fd, listens))
}

/// Takes over an inherited unix socket that listens.
///
/// # Errors
/// As [`inherit_socket`], and for a socket that does not listen.
pub fn inherit_listener(fd: RawFd) -> io::Result<UnixListener> {
    match inherit_socket(fd)? {
        (fd, true) => Ok(fd.into()),
        (_, false) => Err(io::Error::other("not a socket that listens")),
    }
}

/// Where connections come from.
pub enum Listener {
    /// Any number of front ends connect here, one after the other.
    Listening {
        /// The listening socket.
        socket: UnixListener,
        /// Removes the socket's path if the start fails; `None` if another process made
        /// the socket.
        bound: Option<BoundSocket>,
    },
    /// One front end, which is already connected. The program ends when it leaves.
    Connected(Option<UnixStream>),
}

impl Listener {
    /// Takes the socket from `--socket-path`, `--fd` or systemd's socket activation
    /// (sd_listen_fds(3)), in this order.
    ///
    /// # Errors
    /// None of them is given, or the socket cannot be used. The error names the option.
    pub fn new(common: &CommonOptions) -> anyhow::Result<Self> {
        if let Some(path) = &common.socket_path {
            let (socket, bound) = socket::bind(path)
                .map_err(|e| anyhow::anyhow!("--socket-path {}: {e}", path.display()))?;
            let bound = Some(bound);
            return Ok(Listener::Listening { socket, bound });
        }
        let listening = |socket| Listener::Listening {
            socket,
            bound: None,
        };
        if let Some(fd) = common.fd {
            return match inherit_socket(fd) {
                Ok((fd, true)) => Ok(listening(fd.into())),
                Ok((fd, false)) => Ok(Listener::Connected(Some(fd.into()))),
                Err(error) => Err(anyhow::anyhow!("--fd {fd}: {error}")),
            };
        }
        if let Some(socket) = listenfd::ListenFd::from_env().take_unix_listener(0)? {
            return Ok(listening(socket));
        }
        let why = "no socket: give --socket-path or --fd, or use socket activation";
        Err(Usage(why.into()).into())
    }

    /// Keeps the socket's path when the process ends. A `Listener` that is dropped before
    /// this call removes the path that [`Listener::new`] made.
    pub fn keep(&mut self) {
        if let Listener::Listening { bound, .. } = self
            && let Some(bound) = bound.take()
        {
            bound.keep();
        }
    }

    /// Whether [`Listener::accept`] calls accept(2), which the sandbox must then allow.
    pub fn is_listening(&self) -> bool {
        matches!(self, Listener::Listening { .. })
    }

    /// Waits for the next front end; `None` when there will be none.
    ///
    /// # Errors
    /// accept(2) fails.
    pub fn accept(&mut self) -> io::Result<Option<UnixStream>> {
        match self {
            Listener::Listening { socket, .. } => socket.accept().map(|(stream, _)| Some(stream)),
            Listener::Connected(stream) => Ok(stream.take()),
        }
    }
}

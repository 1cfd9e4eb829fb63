//! Where front ends come from: bound once, accepted in a loop; the listener
//! outlives every front end.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use outrigger_cli::Usage;
use outrigger_cli::socket::{self, BoundSocket};
use rustix::net::sockopt;

use crate::cli::CommonOptions;

/// Takes over a unix socket; true if it listens.
///
/// # Errors
/// When there is none.
pub fn inherit(fd: RawFd) -> io::Result<(OwnedFd, bool)> {
    let fd = crate::fd::inherit(fd)?;
    if sockopt::socket_domain(&fd)? != rustix::net::AddressFamily::UNIX {
        return Err(io::Error::other("not a unix socket"));
    }
    let listens = sockopt::socket_acceptconn(&fd)?;
    Ok((fd, listens))
}

/// A source of connections.
pub enum Listener {
    /// Any number of front ends, one after the other.
    Listening {
        /// Where they connect.
        socket: UnixListener,
        /// Its path, if this program made it, until it is served.
        unserved: Option<BoundSocket>,
    },
    /// One front end, connected already; when it leaves, the program is done.
    Connected(Option<UnixStream>),
}

impl Listener {
    /// Takes the socket from `--socket-path`, `--fd` or systemd's socket
    /// activation (sd_listen_fds(3)), in this order.
    ///
    /// # Errors
    /// One line that names the socket and what is wrong with it.
    pub fn new(common: &CommonOptions) -> anyhow::Result<Self> {
        if let Some(path) = &common.socket_path {
            let (socket, unserved) = socket::bind(path)
                .map_err(|e| anyhow::anyhow!("--socket-path {}: {e}", path.display()))?;
            return Ok(Listener::Listening {
                socket,
                unserved: Some(unserved),
            });
        }
        if let Some(fd) = common.fd {
            return Self::inherited(fd).map_err(|e| anyhow::anyhow!("--fd {fd}: {e}"));
        }
        if let Some(listener) = listenfd::ListenFd::from_env().take_unix_listener(0)? {
            return Ok(Self::others(listener));
        }
        let why = "no socket: give --socket-path or --fd, or use socket activation";
        Err(Usage(why.into()).into())
    }

    fn inherited(fd: RawFd) -> io::Result<Self> {
        Ok(match inherit(fd)? {
            (fd, true) => Self::others(fd.into()),
            (fd, false) => Listener::Connected(Some(fd.into())),
        })
    }

    /// A socket that somebody else made.
    fn others(socket: UnixListener) -> Self {
        Listener::Listening {
            socket,
            unserved: None,
        }
    }

    /// Serving begins. Dropped before, the socket that [`Listener::new`] made is removed,
    /// unless the sandbox is closed already.
    pub fn keep(&mut self) {
        if let Listener::Listening { unserved, .. } = self
            && let Some(unserved) = unserved.take()
        {
            unserved.keep();
        }
    }

    /// Whether front ends are accepted, which the sandbox must then allow.
    pub fn is_listening(&self) -> bool {
        matches!(self, Listener::Listening { .. })
    }

    /// The next front end; `None` when there will be none.
    ///
    /// # Errors
    /// accept(2)'s own.
    pub fn accept(&mut self) -> io::Result<Option<UnixStream>> {
        match self {
            Listener::Listening { socket, .. } => socket.accept().map(|(stream, _)| Some(stream)),
            Listener::Connected(stream) => Ok(stream.take()),
        }
    }
}

//! Telling the launcher or systemd that the process serves: `--ready-fd`, sd_notify(3).

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use anyhow::Context as _;

use crate::CommonOptions;

/// Where to announce that the process is ready.
pub struct ReadyNotifier {
    ready_fd: Option<OwnedFd>,
    systemd: Option<UnixDatagram>,
}

impl ReadyNotifier {
    /// Opens the descriptors, for the sandbox would refuse it later.
    ///
    /// # Errors
    /// `--ready-fd` or NOTIFY_SOCKET names no usable descriptor or socket.
    pub fn new(common: &CommonOptions) -> anyhow::Result<Self> {
        let ready_fd = common
            .ready_fd
            .map(|fd| crate::fd::inherit(fd).map_err(|e| anyhow::anyhow!("--ready-fd {fd}: {e}")))
            .transpose()?;
        Ok(ReadyNotifier {
            ready_fd,
            systemd: connect_systemd()?,
        })
    }

    /// Announces that the process is ready.
    pub fn notify(self) {
        // A launcher that is gone is no reason to stop serving.
        if let Some(fd) = self.ready_fd {
            let _ = rustix::io::write(&fd, b"ready\n");
        }
        if let Some(socket) = self.systemd {
            let _ = rustix::io::write(&socket, b"READY=1\n");
        }
    }
}

/// Connects the socket that NOTIFY_SOCKET names (sd_notify(3)).
fn connect_systemd() -> anyhow::Result<Option<UnixDatagram>> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::SocketAddr;

    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(None);
    };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let connect = || {
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address?)?;
        io::Result::Ok(socket)
    };
    Ok(Some(connect().context("NOTIFY_SOCKET")?))
}

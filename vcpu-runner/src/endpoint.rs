//! The socket by which the runner reaches another process.

use std::os::fd::RawFd;
use std::path::PathBuf;

use outrigger_cli::socket::socket_path;

/// Where a device process or the platform process is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket to connect to, as often as needed.
    Path(PathBuf),
    /// An inherited, connected socket. Once lost, it cannot be connected again.
    Fd(RawFd),
}

/// Parses `socket=PATH|fd=N`, the value of `--platform`.
///
/// # Errors
/// Says what is wrong with the value.
pub fn parse(text: &str) -> Result<Endpoint, String> {
    match text.split_once('=') {
        Some(("socket", path)) => Ok(Endpoint::Path(socket_path(path.into())?)),
        Some(("fd", fd)) => fd
            .parse::<RawFd>()
            .ok()
            .filter(|&fd| fd >= 0)
            .map(Endpoint::Fd)
            .ok_or_else(|| format!("fd={fd} is not a file descriptor number")),
        _ => Err("it is not socket=PATH or fd=N".into()),
    }
}

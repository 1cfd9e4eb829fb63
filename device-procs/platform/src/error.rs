//! Errors of the connection to a runner.

use std::io;

/// An error of the trap channel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The runner's Hello message is missing or invalid.
    #[error("platform: greeting: {0}")]
    Hello(String),
    /// The shared region is invalid.
    #[error("platform: shared region: {0}")]
    Region(String),
    /// A message that is not allowed at this point.
    #[error("platform: unexpected message: {0}")]
    Message(String),
    /// A system call failed.
    #[error("platform: {what}: {source}")]
    Io {
        /// The operation.
        what: &'static str,
        /// The error of the kernel.
        source: io::Error,
    },
}

impl Error {
    /// Wraps a failed system call.
    pub fn io<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
        move |source| Error::Io {
            what,
            source: source.into(),
        }
    }
}

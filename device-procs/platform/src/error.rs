//! Why a runner is turned away, or lost.

use std::io;

/// What can go wrong between the runner and this process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The greeting is not one that this program understands.
    #[error("platform: greeting: {0}")]
    Greeting(String),
    /// The shared region is not what it should be.
    #[error("platform: shared region: {0}")]
    Region(String),
    /// A message that does not belong here.
    #[error("platform: unexpected message: {0}")]
    Message(String),
    /// A system call failed.
    #[error("platform: {what}: {source}")]
    Io {
        /// The operation.
        what: &'static str,
        /// The kernel's answer.
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

//! The control socket (`outrigger_protocol::control`). Its thread answers `status` and
//! `watch` itself, so that they work while the machine waits for a back end. All other
//! commands go to the machine's thread, with the means to answer them.

use std::path::Path;
use std::time::Duration;

use outrigger_cli::socket::{self, BoundSocket};
use outrigger_control_socket::{ControlServer, Responder};
use outrigger_protocol::control::{ControlCommand, ControlReply, MachineStatus};

use crate::Error;

/// Longest time that the machine may take to answer: all deadlines of a reset together.
const REPLY_LIMIT: Duration = Duration::from_secs(60);

/// A command for the machine's thread, and how to answer it.
pub struct ControlRequest {
    /// Neither status nor watch.
    pub command: ControlCommand,
    /// Takes the reply.
    pub responder: Responder,
}

/// Binds `path` and starts the thread. If `may_remove_socket`, the socket is removed when
/// the returned [`BoundSocket`] is dropped; otherwise it stays, and the next runner
/// replaces it.
///
/// # Errors
/// When the path cannot be bound or the thread cannot be created.
pub fn start(
    path: &Path,
    may_remove_socket: bool,
    status: impl Fn() -> MachineStatus + Send + 'static,
    requests: impl Fn(ControlRequest) + Send + 'static,
) -> Result<(Option<BoundSocket>, ControlServer), Error> {
    let what = format!("--control {}", path.display());
    let (listener, bound) = socket::bind(path).map_err(Error::io(what.clone()))?;
    let handle = move |command, responder: Responder| match command {
        ControlCommand::Status {} => responder.reply(&ControlReply {
            status: Some(status()),
            ..ControlReply::ok()
        }),
        ControlCommand::Watch {} => responder.reply_and_watch(&ControlReply::ok()),
        command => requests(ControlRequest { command, responder }),
    };
    let server = outrigger_control_socket::start(listener, Some(REPLY_LIMIT), handle)
        .map_err(Error::io(what))?;
    if may_remove_socket {
        return Ok((Some(bound), server));
    }
    bound.keep();
    Ok((None, server))
}

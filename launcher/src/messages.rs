//! The messages between the control socket ([`crate::control`]) and the supervisor
//! ([`crate::supervise`]). The two are peers that run in different threads; this module is
//! all that each knows of the other.

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::mpsc::Sender;

use outrigger_protocol::ErrorCode;
use outrigger_protocol::control::{ControlReply, MachineEvent};

/// Identifies a process that the launcher started. Unlike a process id it is never reused.
pub type ProcessNumber = usize;

/// What the supervisor's thread waits for.
pub enum SupervisorEvent {
    /// A device process is ready to serve.
    Ready(ProcessNumber),
    /// The first line that a process printed to stderr; empty if it printed none.
    FirstLine(ProcessNumber, String),
    /// A process has ended.
    Exited(ProcessNumber, ExitStatus),
    /// The runner reported an event.
    Machine(MachineEvent),
    /// A command from the control socket needs the supervisor.
    Request(SupervisorRequest),
    /// The launcher got a termination signal.
    Terminate,
}

/// The process that a device is swapped to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SwapSource {
    /// A new process with the same options: a restart.
    SameProgram,
    /// A new process for this description of the device.
    Description(String),
    /// A process that another program started and that listens on this socket.
    Socket(PathBuf),
}

/// The answer to [`SupervisorRequest::StartSwap`]: the socket of the new process, once it is
/// ready. `None` if the new process listens on the socket of the old one, to which the runner
/// reconnects by itself.
pub type SwapReady = Result<Option<PathBuf>, CommandError>;

/// A request from the control socket. A swap is `StartSwap`, then `CommitSwap` or
/// `AbortSwap`; a device has one swap at a time.
pub enum SupervisorRequest {
    /// Start the process that a device is swapped to. After an error there is no swap.
    StartSwap {
        /// The device.
        id: String,
        /// The new process.
        source: SwapSource,
        /// Takes the answer when the new process is ready.
        reply: Sender<SwapReady>,
    },
    /// Kill the present process of a device.
    KillProcess {
        /// The device.
        id: String,
        /// Takes the answer when the process has ended.
        reply: Sender<()>,
    },
    /// The runner uses the new process: end the old one.
    CommitSwap {
        /// The device.
        id: String,
        /// Takes the answer.
        reply: Sender<()>,
    },
    /// The runner keeps the old process: end the new one.
    AbortSwap {
        /// The device.
        id: String,
    },
    /// Return the path of the control socket of a device process.
    ControlSocket {
        /// The device.
        id: String,
        /// Fail while a swap is in progress, because the new process would miss the command.
        exclusive: bool,
        /// Takes the answer.
        reply: Sender<Result<PathBuf, CommandError>>,
    },
}

impl SupervisorRequest {
    /// Answers with an error, where the request has an answer for it.
    pub fn refuse(self, error: CommandError) {
        // A send fails if the client's thread has given up; then no one needs the answer.
        let _ = match self {
            SupervisorRequest::StartSwap { reply, .. } => reply.send(Err(error)).is_ok(),
            SupervisorRequest::ControlSocket { reply, .. } => reply.send(Err(error)).is_ok(),
            SupervisorRequest::KillProcess { .. }
            | SupervisorRequest::CommitSwap { .. }
            | SupervisorRequest::AbortSwap { .. } => false,
        };
    }
}

/// Why a command failed.
#[derive(Debug)]
pub struct CommandError {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
}

impl CommandError {
    /// An error with `code`.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        CommandError {
            code,
            message: message.into(),
        }
    }

    /// An error without a code of its own. The alternate form makes anyhow print all causes.
    pub fn failed(error: impl Display) -> Self {
        Self::new(ErrorCode::Failed, format!("{error:#}"))
    }
}

impl From<CommandError> for ControlReply {
    fn from(error: CommandError) -> Self {
        ControlReply::error(error.code, error.message)
    }
}

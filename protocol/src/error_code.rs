//! Why a control command failed, for programs: the field `code` of a reply, beside the
//! sentence for people in `error`.

use serde::{Deserialize, Serialize};

/// Why a command failed. In JSON a word such as `"device-lost"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The line is not a command: bad JSON, an unknown command or an unknown key.
    InvalidCommand,
    /// The line is longer than the server accepts. The server closes the connection.
    LineTooLong,
    /// All places are taken by clients that wait for an answer or watch events. The
    /// server closes the connection.
    TooManyClients,
    /// No device has the given name.
    NoSuchDevice,
    /// This program, or this device, does not have the command.
    NotSupported,
    /// The device has no process at the moment, or its process does not answer.
    DeviceLost,
    /// The new process does not offer what the guest's driver already uses.
    Incompatible,
    /// Another command for the same device is still being carried out.
    Busy,
    /// No answer came before the deadline.
    Timeout,
    /// The virtual machine has ended, or ends now.
    Ended,
    /// Any other reason.
    Failed,
}

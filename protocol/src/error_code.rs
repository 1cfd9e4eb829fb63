//! Why a control command failed, for programs: the field `code` of a reply, beside the
//! sentence for people in `error`.

use serde::de::IntoDeserializer;
use serde::de::value::Error as ValueError;
use serde::{Deserialize, Deserializer, Serialize};

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

/// Reads the field `code` of a reply. A word that this program does not know, of a newer
/// program, is [`ErrorCode::Failed`].
///
/// # Errors
/// The field is not a string.
pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<ErrorCode>, D::Error> {
    let word = Option::<String>::deserialize(from)?;
    Ok(word.map(|word| {
        let known: Result<ErrorCode, ValueError> = ErrorCode::deserialize(word.into_deserializer());
        known.unwrap_or(ErrorCode::Failed)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceReply;

    #[test]
    fn an_unknown_code_is_read_as_failed() {
        for (word, code) in [
            ("device-lost", ErrorCode::DeviceLost),
            ("of-a-newer-program", ErrorCode::Failed),
        ] {
            let text = format!(r#"{{"ok":false,"error":"x","code":"{word}"}}"#);
            let reply: DeviceReply = serde_json::from_str(&text).unwrap();
            assert_eq!(reply.code, Some(code));
        }
        let reply: DeviceReply = serde_json::from_str(r#"{"ok":true}"#).unwrap();
        assert_eq!(reply.code, None);
    }
}

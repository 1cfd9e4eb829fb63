//! The control socket of a device process: one JSON object a line. A client sends a
//! [`DeviceCommand`] and gets one [`DeviceReply`].

use serde::{Deserialize, Serialize};

use crate::ErrorCode;

/// A command, for example `{"command":"resize","size":1073741824}`. Variants without fields
/// have braces because serde refuses unknown keys only in struct variants.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(
    tag = "command",
    rename_all = "kebab-case",
    deny_unknown_fields,
    expecting = "an object with a key \"command\""
)]
pub enum DeviceCommand {
    /// Returns the statistics of all queues.
    Stats {},
    /// Writes everything that is held in caches to the medium.
    Flush {},
    /// Grows the medium, or reads its size again, and tells the guest.
    Resize {
        /// The new size in bytes. Without it, the process reads the size of the medium.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        size: Option<u64>,
    },
}

/// The reply to a command: `{"ok":true}`, with the result of the command if it has one, or
/// `{"ok":false,"error":"…","code":"…"}`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct DeviceReply {
    /// Whether the command was carried out.
    pub ok: bool,
    /// Why not, as a sentence.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// Why not, for programs.
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "crate::error_code::deserialize",
        default
    )]
    pub code: Option<ErrorCode>,
    /// The result of [`DeviceCommand::Resize`]: the size in bytes that the guest sees.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub capacity: Option<u64>,
    /// The result of [`DeviceCommand::Stats`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stats: Option<DeviceStats>,
}

impl DeviceReply {
    /// The command was carried out.
    pub fn ok() -> Self {
        DeviceReply {
            ok: true,
            ..DeviceReply::default()
        }
    }

    /// The command failed.
    pub fn error(code: ErrorCode, text: impl Into<String>) -> Self {
        DeviceReply {
            error: Some(text.into()),
            code: Some(code),
            ..DeviceReply::default()
        }
    }
}

/// The statistics of a device process since it started.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct DeviceStats {
    /// One entry for each queue, in queue order.
    pub queues: Vec<QueueStats>,
}

/// The statistics of one queue.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct QueueStats {
    /// Completed requests by type.
    pub requests: RequestStats,
    /// Requests that are in flight now.
    pub in_flight: u64,
    /// The most requests that were in flight at the same time.
    pub in_flight_max: u64,
    /// Time from when a request was popped from the queue to its completion.
    pub latency: LatencyStats,
    /// CPU time of the queue's thread in microseconds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cpu_us: Option<u64>,
}

/// Completed block requests by type (virtio 1.2 section 5.2.6).
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct RequestStats {
    /// VIRTIO_BLK_T_IN.
    pub read: OperationStats,
    /// VIRTIO_BLK_T_OUT.
    pub write: OperationStats,
    /// VIRTIO_BLK_T_FLUSH.
    pub flush: OperationStats,
    /// VIRTIO_BLK_T_DISCARD.
    pub discard: OperationStats,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    pub write_zeroes: OperationStats,
    /// All other types, and malformed requests.
    pub other: OperationStats,
}

impl RequestStats {
    /// All types with their names in JSON.
    pub fn by_type(&self) -> [(&'static str, &OperationStats); 6] {
        [
            ("read", &self.read),
            ("write", &self.write),
            ("flush", &self.flush),
            ("discard", &self.discard),
            ("write_zeroes", &self.write_zeroes),
            ("other", &self.other),
        ]
    }
}

/// Completed requests of one type.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct OperationStats {
    /// Number of requests.
    pub count: u64,
    /// Bytes read, written, discarded or zeroed by the requests that succeeded.
    pub bytes: u64,
    /// Number of requests that failed.
    pub errors: u64,
}

/// The distribution of latencies in microseconds. A percentile is an upper bound, less than
/// 1 % too high.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct LatencyStats {
    /// Number of requests measured.
    pub samples: u64,
    /// 50th percentile.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_documented_json_form() {
        for (text, command) in [
            (r#"{"command":"stats"}"#, DeviceCommand::Stats {}),
            (r#"{"command":"flush"}"#, DeviceCommand::Flush {}),
            (
                r#"{"command":"resize"}"#,
                DeviceCommand::Resize { size: None },
            ),
            (
                r#"{"command":"resize","size":1024}"#,
                DeviceCommand::Resize { size: Some(1024) },
            ),
        ] {
            assert_eq!(
                serde_json::from_str::<DeviceCommand>(text).unwrap(),
                command
            );
            assert_eq!(serde_json::to_string(&command).unwrap(), text);
        }
        for text in [
            r#"{"command":"resize","size":-1}"#,
            r#"{"command":"resize","size":1.5}"#,
            r#"{"command":"flush","x":1}"#,
            r#"{"command":"explode"}"#,
            "{}",
        ] {
            assert!(
                serde_json::from_str::<DeviceCommand>(text).is_err(),
                "{text}"
            );
        }
    }

    #[test]
    fn a_reply_has_only_the_fields_of_its_command() {
        let text = |reply: &DeviceReply| serde_json::to_string(reply).unwrap();
        assert_eq!(text(&DeviceReply::ok()), r#"{"ok":true}"#);
        assert_eq!(
            text(&DeviceReply::error(ErrorCode::Failed, "no")),
            r#"{"ok":false,"error":"no","code":"failed"}"#
        );
    }
}

//! The control socket of a device process: JSON, one object a line. A client sends a
//! [`DeviceCommand`] and gets one [`DeviceReply`].

use serde::{Deserialize, Serialize};

/// The longest command line in bytes that the socket accepts.
pub const MAX_LINE: usize = 4096;

/// What a client may ask, for example `{"command":"resize","size":1073741824}`. (The
/// braces make serde refuse unknown keys.)
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum DeviceCommand {
    /// What has been done so far.
    Stats {},
    /// Puts everything that was written onto the medium.
    Flush {},
    /// Makes the medium larger, or looks whether it has grown, and tells the guest.
    Resize {
        /// The new size in bytes; without, the medium is looked at.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        size: Option<u64>,
    },
}

/// Answer to a command: `{"ok":true}`, with what was asked for, or
/// `{"ok":false,"error":"…"}`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct DeviceReply {
    /// Whether the command was carried out.
    pub ok: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// Answer to [`DeviceCommand::Resize`]: the size in bytes that the guest sees now.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub capacity: Option<u64>,
    /// Answer to [`DeviceCommand::Stats`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stats: Option<DeviceStats>,
}

impl DeviceReply {
    /// Done.
    pub fn ok() -> Self {
        DeviceReply {
            ok: true,
            ..DeviceReply::default()
        }
    }

    /// Not done, and why.
    pub fn error(text: impl Into<String>) -> Self {
        DeviceReply {
            error: Some(text.into()),
            ..DeviceReply::default()
        }
    }
}

/// What a process has done since it started.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct DeviceStats {
    /// The queues, in the order of their numbers.
    pub queues: Vec<QueueStats>,
}

/// One queue.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct QueueStats {
    /// Requests that are complete, by what they asked for.
    pub requests: RequestStats,
    /// Requests that were taken and are not complete yet.
    pub in_flight: u64,
    /// The most that there were at a time.
    pub in_flight_max: u64,
    /// How long requests took, from when they were taken until they were complete.
    pub latency: LatencyStats,
    /// Processor time of the queue's worker thread in microseconds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cpu_us: Option<u64>,
}

/// Requests by kind (virtio 1.2 section 5.2.6).
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
    /// All else, and what makes no sense.
    pub other: OperationStats,
}

impl RequestStats {
    /// Each kind and its name here.
    pub fn kinds(&self) -> [(&'static str, &OperationStats); 6] {
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

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct OperationStats {
    /// How many.
    pub count: u64,
    /// Bytes that they moved, gave back or zeroed; of those that succeeded.
    pub bytes: u64,
    /// How many of them failed.
    pub errors: u64,
}

/// Times in microseconds. Percentiles are upper bounds, less than 1 % too high.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct LatencyStats {
    /// How many were measured.
    pub samples: u64,
    /// Half of them took no longer.
    pub p50_us: f64,
    /// 99 of 100.
    pub p99_us: f64,
    /// 999 of 1000.
    pub p999_us: f64,
    /// None took longer.
    pub max_us: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_what_the_documentation_says() {
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
    fn answers_say_no_more_than_was_asked() {
        let text = |reply: &DeviceReply| serde_json::to_string(reply).unwrap();
        assert_eq!(text(&DeviceReply::ok()), r#"{"ok":true}"#);
        assert_eq!(
            text(&DeviceReply::error("no")),
            r#"{"ok":false,"error":"no"}"#
        );
    }
}

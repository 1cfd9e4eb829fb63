//! The control socket and the event stream of `vcpu-runner` and `outrigger`: one JSON
//! object a line. A client sends a [`ControlCommand`] and gets one [`ControlReply`];
//! [`MachineEvent`]s go to the file descriptor or file given with `--events`, and to every
//! client that sent `watch`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{ErrorCode, device};

/// A command, for example `{"command":"pause"}`. Variants without fields have braces
/// because serde refuses unknown keys only in struct variants.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(
    tag = "command",
    rename_all = "kebab-case",
    deny_unknown_fields,
    expecting = "an object with a key \"command\""
)]
pub enum ControlCommand {
    /// Returns the state of the machine and its devices.
    Status {},
    /// Stops the vCPUs and the devices' queues. The reply comes when all have stopped.
    Pause {},
    /// Resumes a paused machine.
    Resume {},
    /// Ends the machine; the runner exits with [`crate::exit::POWERED_OFF`].
    Stop {},
    /// Resets the machine, as a reset button does.
    Reset {},
    /// Subscribes this connection to events. They arrive between the replies.
    Watch {},
    /// Connects a device to another process while the guest runs. If any step fails, the
    /// device keeps its process.
    Swap {
        /// The device.
        id: String,
        /// The socket on which the new process listens.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        socket: Option<PathBuf>,
        /// The description of the new device process, in the launcher's `key=value`
        /// form. Only the launcher supports it, because only the launcher starts
        /// processes.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        device: Option<String>,
    },
    /// Swaps a device's process for a new one with the same options, so that a program
    /// that was updated on disk takes effect. Only the launcher supports it.
    Restart {
        /// The device.
        id: String,
    },
    /// Grows a disk while the guest runs. The launcher supports this and the next two
    /// commands: it forwards them to the device process as a
    /// [`device::DeviceCommand`].
    Resize {
        /// The device.
        id: String,
        /// The new size in bytes. Without it, the device process reads the size of its
        /// image again.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        size: Option<u64>,
    },
    /// Writes everything that a disk holds in caches to its medium.
    Flush {
        /// The device.
        id: String,
    },
    /// Returns the statistics of a disk's queues since its process started.
    Stats {
        /// The device.
        id: String,
    },
}

/// The state of the machine.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    /// The vCPUs run.
    Running,
    /// The vCPUs and all queues are stopped.
    Paused,
    /// The machine has ended.
    Stopped,
}

/// The state of a device, as the runner sees it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// No process has connected yet.
    Absent,
    /// A process is connected and the vhost-user set-up is in progress.
    Connecting,
    /// The process serves the device.
    Running,
    /// The device's queues are stopped.
    Paused,
    /// The process completes its in-flight requests before a swap.
    Draining,
    /// The process has ended or does not answer.
    Lost,
}

/// One device in [`MachineStatus`].
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct DeviceStatus {
    /// The name given on the command line.
    pub id: String,
    /// The virtio device ID (virtio 1.2 section 5).
    pub virtio_id: u16,
    /// The state of the connection to its process.
    pub state: DeviceState,
    /// Whether the guest's driver has set DRIVER_OK.
    pub driver_ok: bool,
    /// Number of queues that are running.
    pub active_queues: usize,
    /// Whether the process records its in-flight requests (INFLIGHT_SHMFD), so that its
    /// successor can complete them.
    pub tracked: bool,
    /// How often the connection to a process was lost.
    pub losses: u64,
    /// How often the device was swapped to another process.
    pub swaps: u64,
}

/// The result of [`ControlCommand::Status`].
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct MachineStatus {
    /// The machine's state.
    pub state: MachineState,
    /// Number of vCPUs.
    pub vcpus: usize,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// Resets since the start.
    pub resets: u64,
    /// All devices, in the order of their PCI slots.
    pub devices: Vec<DeviceStatus>,
    /// The state of the platform process, if there is one: running or lost.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub platform: Option<DeviceState>,
}

/// The reply to a command: `{"ok":true}`, with the result of the command if it has one, or
/// `{"ok":false,"error":"…","code":"…"}`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct ControlReply {
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
    /// The result of [`ControlCommand::Status`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub status: Option<MachineStatus>,
    /// The result of [`ControlCommand::Swap`] and [`ControlCommand::Restart`]: for how
    /// many microseconds no process served the device's queues.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub outage_us: Option<u64>,
    /// The result of [`ControlCommand::Resize`]: the size in bytes that the guest sees.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub capacity: Option<u64>,
    /// The result of [`ControlCommand::Stats`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stats: Option<device::DeviceStats>,
}

impl ControlReply {
    /// The command was carried out.
    pub fn ok() -> Self {
        ControlReply {
            ok: true,
            ..ControlReply::default()
        }
    }

    /// The command failed.
    pub fn error(code: ErrorCode, text: impl Into<String>) -> Self {
        ControlReply {
            error: Some(text.into()),
            code: Some(code),
            ..ControlReply::default()
        }
    }
}

/// An event, for example `{"event":"device-lost","id":"disk0","reason":"…"}`.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum MachineEvent {
    /// All devices are connected and the vCPUs start.
    Started {
        /// Number of vCPUs.
        vcpus: usize,
    },
    /// A device process completed the vhost-user set-up.
    DeviceConnected {
        /// The device.
        id: String,
    },
    /// The guest's driver set DRIVER_OK.
    DriverOk {
        /// The device.
        id: String,
        /// Number of queues that were started.
        queues: usize,
    },
    /// A device process ended, closed its connection or missed a deadline.
    DeviceLost {
        /// The device.
        id: String,
        /// What happened.
        reason: String,
        /// Whether the process recorded its in-flight requests. If not, these may be lost
        /// or executed twice.
        tracked: bool,
    },
    /// A process accepted the connection for a lost device; the set-up follows.
    DeviceReconnecting {
        /// The device.
        id: String,
    },
    /// A process accepted the connection for a lost device, but it is not compatible.
    DeviceRefused {
        /// The device.
        id: String,
        /// What is incompatible.
        reason: String,
    },
    /// A lost device works again.
    DeviceRunning {
        /// The device.
        id: String,
        /// Microseconds since the device was lost.
        outage_us: u64,
        /// Requests that were in flight in the lost process and are executed again.
        replayed: u64,
    },
    /// A swap succeeded.
    DeviceSwapped {
        /// The device.
        id: String,
        /// For how many microseconds no process served the device's queues.
        outage_us: u64,
    },
    /// A swap failed; the device keeps its process.
    DeviceSwapRefused {
        /// The device.
        id: String,
        /// Why the swap failed.
        reason: String,
    },
    /// The machine was paused.
    Paused,
    /// The machine was resumed.
    Resumed,
    /// The machine was reset.
    Reset {
        /// What asked for the reset: `guest` or `control`.
        by: String,
    },
    /// The guest wrote to the exit port.
    GuestExit {
        /// The value written; 0 means success.
        code: u8,
    },
    /// The machine has ended; the runner exits with `code`.
    Stopped {
        /// See [`crate::exit`].
        code: u8,
        /// Why the machine ended.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_documented_json_form() {
        let command: ControlCommand = serde_json::from_str(r#"{"command":"pause"}"#).unwrap();
        assert_eq!(command, ControlCommand::Pause {});
        assert!(serde_json::from_str::<ControlCommand>(r#"{"command":"pause","x":1}"#).is_err());
        assert!(serde_json::from_str::<ControlCommand>(r#"{"command":"explode"}"#).is_err());
    }

    #[test]
    fn an_error_reply_has_a_sentence_and_a_code() {
        let reply = ControlReply::error(ErrorCode::DeviceLost, "disk0: lost");
        assert_eq!(
            serde_json::to_string(&reply).unwrap(),
            r#"{"ok":false,"error":"disk0: lost","code":"device-lost"}"#
        );
    }

    #[test]
    fn an_event_carries_its_name() {
        let event = MachineEvent::GuestExit { code: 3 };
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"event":"guest-exit","code":3}"#
        );
    }
}

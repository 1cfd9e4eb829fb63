//! The control socket and the event stream of `vcpu-runner`: JSON, one object a
//! line. A client sends a [`ControlCommand`] and gets one [`ControlReply`]; events go to the
//! file descriptor or file given with `--events`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::device;

/// The longest command line in bytes that the control socket accepts.
pub const MAX_LINE: usize = 64 * 1024;

/// What a client may ask, for example `{"command":"pause"}`. (The braces make
/// serde refuse unknown keys.)
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ControlCommand {
    /// What the machine is doing.
    Status {},
    /// Stops the vCPUs and the devices' rings; answered when all stand still.
    Pause {},
    /// Goes on after a pause.
    Resume {},
    /// Ends the machine; the runner exits with [`crate::exit::POWERED_OFF`].
    Stop {},
    /// Resets the machine as its reset button would.
    Reset {},
    /// From now on events come over this connection as well, a line each, between
    /// the answers.
    Watch {},
    /// Puts another process behind a device, under the running guest. On any
    /// failure the old one goes on.
    Swap {
        /// The device.
        id: String,
        /// Where the new process listens.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        socket: Option<PathBuf>,
        /// What the new process is to be started with, in the launcher's
        /// `key=value` form. Only the launcher can start one.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        device: Option<String>,
    },
    /// Puts a new process of the same kind behind a device: the program that is on
    /// disk now. Only the launcher can.
    Restart {
        /// The device.
        id: String,
    },
    /// Makes a disk larger under the running guest. As the next two, the launcher's: it
    /// hands it on to the device's process ([`device::DeviceCommand`]).
    Resize {
        /// The device.
        id: String,
        /// The new size in bytes; without, the medium is looked at.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        size: Option<u64>,
    },
    /// Puts what was written to a disk onto its medium.
    Flush {
        /// The device.
        id: String,
    },
    /// What a disk's queues have done since its process started.
    Stats {
        /// The device.
        id: String,
    },
}

/// States of the machine.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    /// vCPUs run.
    Running,
    /// vCPUs and rings stand still.
    Paused,
    /// Over.
    Stopped,
}

/// States of a device slot.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// No process yet.
    Absent,
    /// Shaking hands.
    Connecting,
    /// Serving.
    Running,
    /// Its rings stand still.
    Paused,
    /// Its process finishes what it has begun, before another takes its place.
    Draining,
    /// The process is gone or does not answer.
    Lost,
}

/// One device in [`MachineStatus`].
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct DeviceStatus {
    /// The name given on the command line.
    pub id: String,
    /// The virtio device number (virtio 1.2 section 5).
    pub virtio_id: u16,
    /// Where the slot stands.
    pub state: DeviceState,
    /// Whether the guest's driver has said DRIVER_OK.
    pub driver_ok: bool,
    /// Rings that are running.
    pub active_queues: usize,
    /// Whether the process tracks what it has in work (INFLIGHT_SHMFD), so that its
    /// successor can finish it.
    pub tracked: bool,
    /// How often a process was lost.
    pub losses: u64,
    /// How often a process was swapped for another.
    pub swaps: u64,
}

/// Answer to [`ControlCommand::Status`].
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
    /// All devices in slot order.
    pub devices: Vec<DeviceStatus>,
    /// The platform process, if there is one: running or lost.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub platform: Option<DeviceState>,
}

/// Answer to a command: `{"ok":true}`, with `status` where asked for, or
/// `{"ok":false,"error":"…"}`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct ControlReply {
    /// Whether the command was carried out.
    pub ok: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// Answer to [`ControlCommand::Status`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub status: Option<MachineStatus>,
    /// Answer to [`ControlCommand::Swap`] and [`ControlCommand::Restart`]: for how many
    /// microseconds no process worked on the device's rings.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub outage_us: Option<u64>,
    /// Answer to [`ControlCommand::Resize`]: the size in bytes that the guest sees now.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub capacity: Option<u64>,
    /// Answer to [`ControlCommand::Stats`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stats: Option<device::DeviceStats>,
}

impl ControlReply {
    /// Done.
    pub fn ok() -> Self {
        ControlReply {
            ok: true,
            ..ControlReply::default()
        }
    }

    /// Not done, and why.
    pub fn error(text: impl Into<String>) -> Self {
        ControlReply {
            error: Some(text.into()),
            ..ControlReply::default()
        }
    }
}

/// What happened, for example `{"event":"device-lost","id":"disk0","reason":"…"}`.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum MachineEvent {
    /// All devices are connected and the vCPUs start.
    Started {
        /// Number of vCPUs.
        vcpus: usize,
    },
    /// A device process shook hands.
    DeviceConnected {
        /// Its name.
        id: String,
    },
    /// The guest's driver took a device into use.
    DriverOk {
        /// Its name.
        id: String,
        /// Rings started.
        queues: usize,
    },
    /// A device process is gone, or did not keep its deadline.
    DeviceLost {
        /// Its name.
        id: String,
        /// What happened.
        reason: String,
        /// Whether it tracked what it had in work. If not, that may be lost, or done
        /// twice.
        tracked: bool,
    },
    /// A process came for a lost device; now hands are shaken.
    DeviceReconnecting {
        /// Its name.
        id: String,
    },
    /// A process came for a lost device, and does not suit.
    DeviceRefused {
        /// The device's name.
        id: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A lost device works again.
    DeviceRunning {
        /// Its name.
        id: String,
        /// Microseconds since it was lost.
        outage_us: u64,
        /// Requests that the lost process had in work and its successor does again.
        replayed: u64,
    },
    /// Another process works for a device now.
    DeviceSwapped {
        /// Its name.
        id: String,
        /// For how many microseconds no process worked on its rings.
        outage_us: u64,
    },
    /// A device keeps its process.
    DeviceSwapRefused {
        /// Its name.
        id: String,
        /// Why.
        reason: String,
    },
    /// The vCPUs stand still.
    Paused,
    /// The vCPUs go on.
    Resumed,
    /// The machine was reset.
    Reset {
        /// `guest` or `control`.
        by: String,
    },
    /// The guest wrote to the exit port.
    GuestExit {
        /// 0 is a pass.
        code: u8,
    },
    /// The machine is over; the runner exits with this code.
    Stopped {
        /// See [`crate::exit`].
        code: u8,
        /// Why, in words.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_what_the_documentation_says() {
        let command: ControlCommand = serde_json::from_str(r#"{"command":"pause"}"#).unwrap();
        assert_eq!(command, ControlCommand::Pause {});
        assert!(serde_json::from_str::<ControlCommand>(r#"{"command":"pause","x":1}"#).is_err());
        assert!(serde_json::from_str::<ControlCommand>(r#"{"command":"explode"}"#).is_err());
    }

    #[test]
    fn events_carry_their_name() {
        let event = MachineEvent::GuestExit { code: 3 };
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"event":"guest-exit","code":3}"#
        );
    }
}

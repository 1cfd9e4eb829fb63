//! Formats the status and the events of a machine.

use std::fmt::Write;

use anyhow::Context;
use outrigger_protocol::control::{ControlReply, DeviceState, MachineStatus};
use serde_json::Value;

/// Formats the status in `reply` as a table or as JSON.
///
/// # Errors
/// `reply` has no status.
pub fn status(reply: &ControlReply, json: bool) -> anyhow::Result<String> {
    let status = reply.status.as_ref().context("the reply has no status")?;
    Ok(if json {
        serde_json::to_string(status)? + "\n"
    } else {
        table(status)
    })
}

/// Returns the ids of the disks in the status of `reply`.
///
/// # Errors
/// `reply` has no status, or the machine has no disks.
pub fn disks(reply: &ControlReply) -> anyhow::Result<Vec<String>> {
    let status = reply.status.as_ref().context("the reply has no status")?;
    let disks = status.devices.iter().filter(|it| it.virtio_id == BLOCK);
    let ids: Vec<String> = disks.map(|it| it.id.clone()).collect();
    anyhow::ensure!(!ids.is_empty(), "the machine has no disks");
    Ok(ids)
}

fn table(status: &MachineStatus) -> String {
    let mut text = format!(
        "{}, {} vCPU{}, {} MiB, {} reset{}\n",
        state_name(&status.state),
        status.vcpus,
        plural(status.vcpus as u64),
        status.memory >> 20,
        status.resets,
        plural(status.resets),
    );
    let mut row = |cells: [&str; 8]| {
        let line = cells.map(|cell| format!("{cell:<11}")).concat();
        text += line.trim_end();
        text.push('\n');
    };
    row([
        "DEVICE", "TYPE", "STATE", "DRIVER", "QUEUES", "TRACKED", "LOSSES", "SWAPS",
    ]);
    for device in &status.devices {
        let yes = |flag| if flag { "yes" } else { "no" };
        row([
            &device.id,
            &device_type(device.virtio_id),
            &state_name(&device.state),
            yes(device.driver_ok),
            &device.active_queues.to_string(),
            yes(device.tracked),
            &device.losses.to_string(),
            &device.swaps.to_string(),
        ]);
    }
    if let Some(platform) = status.platform {
        row([
            "platform",
            "",
            &state_name::<DeviceState>(&platform),
            "",
            "",
            "",
            "",
            "",
        ]);
    }
    text
}

fn plural(count: u64) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// Returns the name of a state in the protocol.
fn state_name<T: serde::Serialize>(state: &T) -> String {
    match serde_json::to_value(state) {
        Ok(Value::String(name)) => name,
        _ => "?".into(),
    }
}

/// The virtio device ID of a block device (virtio 1.2 section 5).
const BLOCK: u16 = 2;

/// Returns the name of a device type, or its number.
fn device_type(virtio_id: u16) -> String {
    match virtio_id {
        1 => "net".into(),
        BLOCK => "block".into(),
        3 => "console".into(),
        other => other.to_string(),
    }
}

/// Formats an event in JSON as one line: its name, the device, and all other fields. This
/// works for events of a newer runner as well.
pub fn event(json: &str) -> String {
    let Ok(Value::Object(mut fields)) = serde_json::from_str(json) else {
        return format!("{json}\n");
    };
    let text_of = |value: Value| match value {
        Value::String(text) => text.escape_debug().to_string(),
        other => other.to_string(),
    };
    let mut text = String::new();
    for first in ["event", "id"] {
        if let Some(value) = fields.remove(first) {
            let _ = write!(text, "{:<20}", text_of(value));
        }
    }
    let reason = fields.remove("reason");
    for (name, value) in fields {
        let _ = write!(text, " {name}={}", text_of(value));
    }
    if let Some(reason) = reason {
        let _ = write!(text, " {}", text_of(reason));
    }
    text.trim_end().to_owned() + "\n"
}

#[cfg(test)]
mod tests {
    use outrigger_protocol::control::{DeviceStatus, MachineState};

    use super::*;

    #[test]
    fn a_status_is_formatted_as_a_table() {
        let mut reply = ControlReply::ok();
        assert!(status(&reply, false).is_err());
        reply.status = Some(MachineStatus {
            state: MachineState::Running,
            vcpus: 1,
            memory: 64 << 20,
            resets: 0,
            devices: vec![DeviceStatus {
                id: "disk0".into(),
                virtio_id: 2,
                state: DeviceState::Lost,
                driver_ok: true,
                active_queues: 4,
                tracked: true,
                losses: 3,
                swaps: 1,
            }],
            platform: Some(DeviceState::Running),
        });
        let text = status(&reply, false).unwrap();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|l| l.split_whitespace().collect())
            .collect();
        assert_eq!(
            text.lines().next(),
            Some("running, 1 vCPU, 64 MiB, 0 resets")
        );
        assert_eq!(
            lines[2],
            ["disk0", "block", "lost", "yes", "4", "yes", "3", "1"]
        );
        assert_eq!(lines[3], ["platform", "running"]);
        let json = status(&reply, true).unwrap();
        let back: MachineStatus = serde_json::from_str(&json).unwrap();
        assert_eq!(Some(back), reply.status);
    }

    #[test]
    fn an_event_is_formatted_as_a_line() {
        let line = event(r#"{"event":"device-lost","id":"disk0","tracked":true,"reason":"gone"}"#);
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words, ["device-lost", "disk0", "tracked=true", "gone"]);
        assert_eq!(event(r#"{"event":"paused"}"#), "paused\n");
    }
}

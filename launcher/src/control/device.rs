//! What a device's process does itself: it is asked at the control socket that it was
//! given.

use std::time::{Duration, Instant};

use outrigger_protocol::control::ControlReply;
use outrigger_protocol::device::{DeviceCommand, DeviceReply};

use super::Link;
use super::lines::Lines;
use crate::supervise::Ask;

/// How long the process may take to make room for a client.
const ROOM: Duration = Duration::from_secs(5);

/// How long it may take to answer.
fn time(command: &DeviceCommand) -> Duration {
    match command {
        DeviceCommand::Stats {} => Duration::from_secs(10),
        // What is in the page cache may be much, and its medium slow.
        DeviceCommand::Flush {} | DeviceCommand::Resize { .. } => Duration::from_secs(60),
    }
}

/// Asks the process of the device `id`.
pub fn ask(link: &Link, id: &str, command: &DeviceCommand) -> ControlReply {
    try_ask(link, id, command)
        .unwrap_or_else(|why| ControlReply::error(outrigger_protocol::ErrorCode::Failed, why))
}

fn try_ask(link: &Link, id: &str, command: &DeviceCommand) -> Result<ControlReply, String> {
    let alone = matches!(command, DeviceCommand::Resize { .. });
    let name = id.to_owned();
    let path = link.ask(|reply| Ask::Control {
        id: name,
        alone,
        reply,
    })??;
    let answer: DeviceReply = Lines::connect(&path, Some(Instant::now() + ROOM))
        .and_then(|mut lines| lines.ask(command, time(command)))
        .map_err(|error| format!("{id}: its process: {error}"))?;
    let DeviceReply {
        ok,
        error,
        code,
        capacity,
        stats,
    } = answer;
    Ok(ControlReply {
        ok,
        error: error.map(|why| format!("{id}: {why}")),
        code,
        capacity,
        stats,
        ..ControlReply::default()
    })
}

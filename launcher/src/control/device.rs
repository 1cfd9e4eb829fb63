//! What a device's process does itself: it is asked at the control socket that it was
//! given.

use std::time::{Duration, Instant};

use outrigger_protocol::control::Reply;
use outrigger_protocol::device::{self, Command};

use super::Link;
use super::lines::Lines;
use crate::supervise::Ask;

/// How long the process may take to make room for a client.
const ROOM: Duration = Duration::from_secs(5);

/// How long it may take to answer.
fn time(command: &Command) -> Duration {
    match command {
        Command::Stats {} => Duration::from_secs(10),
        // What is in the page cache may be much, and its medium slow.
        Command::Flush {} | Command::Resize { .. } => Duration::from_secs(60),
    }
}

/// Asks the process of the device `id`.
pub fn ask(link: &Link, id: &str, command: &Command) -> Reply {
    try_ask(link, id, command).unwrap_or_else(Reply::error)
}

fn try_ask(link: &Link, id: &str, command: &Command) -> Result<Reply, String> {
    let alone = matches!(command, Command::Resize { .. });
    let name = id.to_owned();
    let path = link.ask(|reply| Ask::Control {
        id: name,
        alone,
        reply,
    })??;
    let answer: device::Reply = Lines::connect(&path, Some(Instant::now() + ROOM))
        .and_then(|mut lines| lines.ask(command, time(command)))
        .map_err(|error| format!("{id}: its process: {error}"))?;
    let device::Reply {
        ok,
        error,
        capacity,
        stats,
    } = answer;
    Ok(Reply {
        ok,
        error: error.map(|why| format!("{id}: {why}")),
        capacity,
        stats,
        ..Reply::default()
    })
}

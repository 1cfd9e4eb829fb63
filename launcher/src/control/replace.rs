//! Swap and restart: the new process starts, the runner changes over, the old process
//! ends. When the runner refuses, it is the new one that ends.

use outrigger_protocol::control::{ControlCommand, ControlReply, DeviceState};

use super::Link;
use crate::supervise::{Ask, Event, With};

/// A replacement that was begun; unless it is [`Begun::commit`]ted, it is undone.
struct Begun<'a> {
    link: &'a Link,
    id: &'a str,
    done: bool,
}

impl Begun<'_> {
    fn commit(mut self) -> Result<(), String> {
        self.done = true;
        let id = self.id.to_owned();
        self.link.ask(|reply| Ask::Commit { id, reply })
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        if !self.done {
            let id = self.id.to_owned();
            self.link.tell(Event::Ask(Ask::Abort { id }));
        }
    }
}

/// Puts another process behind the device `id`.
pub fn replace(link: &Link, id: &str, with: With) -> ControlReply {
    try_replace(link, id, with)
        .unwrap_or_else(|why| ControlReply::error(outrigger_protocol::ErrorCode::Failed, why))
}

fn try_replace(link: &Link, id: &str, with: With) -> Result<ControlReply, String> {
    let name = id.to_owned();
    let path = link.ask(|reply| Ask::Begin {
        id: name,
        with,
        reply,
    })??;
    let begun = Begun {
        link,
        id,
        done: false,
    };
    let Some(path) = path else {
        begun.commit()?;
        return Ok(ControlReply::ok());
    };
    let swap = ControlCommand::Swap {
        id: id.to_owned(),
        socket: Some(path),
        device: None,
    };
    let mut reply = link.forward(&swap);
    if !reply.ok && is_lost(link, id) {
        // Its process may be there still and not answer, and could wake up behind the
        // back of another.
        let name = id.to_owned();
        link.ask(|reply| Ask::Clear { id: name, reply })?;
        reply = link.forward(&swap);
    }
    if reply.ok {
        begun.commit()?;
    }
    Ok(reply)
}

/// Whether the runner has given up the device's process.
fn is_lost(link: &Link, id: &str) -> bool {
    let status = link.forward(&ControlCommand::Status {}).status;
    let devices = status.into_iter().flat_map(|status| status.devices);
    let gone = |state| matches!(state, DeviceState::Lost | DeviceState::Connecting);
    devices
        .into_iter()
        .any(|device| device.id == id && gone(device.state))
}

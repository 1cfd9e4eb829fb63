//! Swap and restart: the new process starts, the runner changes over, the old process
//! ends. When the runner refuses, it is the new one that ends.

use outrigger_protocol::control::{Command, Reply, SlotState};

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
pub fn replace(link: &Link, id: &str, with: With) -> Reply {
    try_replace(link, id, with).unwrap_or_else(Reply::error)
}

fn try_replace(link: &Link, id: &str, with: With) -> Result<Reply, String> {
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
        return Ok(Reply::ok());
    };
    let swap = Command::Swap {
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
    let status = link.forward(&Command::Status {}).status;
    let devices = status.into_iter().flat_map(|status| status.devices);
    let gone = |state| matches!(state, SlotState::Lost | SlotState::Connecting);
    devices
        .into_iter()
        .any(|device| device.id == id && gone(device.state))
}

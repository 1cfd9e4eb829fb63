//! The runner's events: one connection brings them, and all who watch get them. One who
//! does not read is left out, and the connection to it ends.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use outrigger_protocol::control::{ControlCommand, ControlReply};

use super::client::Client;
use super::lines::Lines;
use super::{ANSWER, Link, SERVED, lock};
use crate::supervise::Event;

/// Events that may wait for one who watches.
const BACKLOG: usize = 256;

/// A line that several are told.
type Line = Arc<Vec<u8>>;

/// Those who watch; `None`: there will be no more events.
pub struct Watchers(Mutex<Option<Vec<SyncSender<Line>>>>);

impl Default for Watchers {
    fn default() -> Self {
        Watchers(Mutex::new(Some(Vec::new())))
    }
}

impl Watchers {
    fn add(&self) -> Option<Receiver<Line>> {
        let (sender, receiver) = sync_channel(BACKLOG);
        lock(&self.0).as_mut()?.push(sender);
        Some(receiver)
    }

    fn tell(&self, line: Vec<u8>) {
        let line = Arc::new(line);
        if let Some(watchers) = &mut *lock(&self.0) {
            watchers.retain(|watcher| watcher.try_send(Arc::clone(&line)).is_ok());
        }
    }

    fn end(&self) {
        *lock(&self.0) = None;
    }
}

/// From now on `client` is told of events.
pub fn subscribe(link: &Arc<Link>, client: Arc<Client>) {
    let Some(lines) = link.watchers.add() else {
        return;
    };
    let link = Arc::clone(link);
    std::thread::spawn(move || {
        let _doing = link.busy.with();
        while let Ok(line) = lines.recv() {
            if !client.send(&line) {
                break;
            }
        }
        client.leave();
    });
}

/// Passes the runner's events on until it ends.
pub fn relay(link: &Link) {
    let _doing = link.busy.with();
    if let Ok(mut lines) = Lines::connect(&link.runner, Some(Instant::now() + SERVED))
        && let Ok(reply) = lines.ask::<ControlReply>(&ControlCommand::Watch {}, ANSWER)
        && reply.ok
    {
        while let Ok(Some(line)) = lines.next(None) {
            if let Ok(event) = serde_json::from_slice(&line) {
                link.tell(Event::Told(event));
            }
            link.watchers.tell(line);
        }
    }
    link.watchers.end();
}

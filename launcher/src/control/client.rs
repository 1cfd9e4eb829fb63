//! Clients of the control socket, each with a thread of its own.

use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use outrigger_protocol::control::{ControlCommand, ControlReply};
use outrigger_protocol::device::DeviceCommand;

use super::lines::{Lines, send};
use super::{Link, device, lock, replace, watch};
use crate::supervise::With;

/// Clients at a time. Each may have a connection to the runner, which takes 16.
const MAX: usize = 12;
/// After a failure of accept(2), for lack of descriptors for example.
const PAUSE: Duration = Duration::from_millis(100);

/// A client.
pub struct Client {
    /// What it is told goes here: a line at a time, from two threads.
    output: Mutex<UnixStream>,
    /// Since when nothing is done for it.
    idle: Mutex<Option<Instant>>,
}

/// All clients.
#[derive(Default)]
pub struct Clients(Arc<Mutex<Vec<Arc<Client>>>>);

impl Clients {
    /// Accepts clients for ever.
    pub fn serve(&self, listener: &UnixListener, link: &Arc<Link>) {
        loop {
            match listener.accept() {
                Ok((stream, _)) => self.welcome(stream, link),
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }

    fn welcome(&self, stream: UnixStream, link: &Arc<Link>) {
        let Ok(output) = stream.try_clone() else {
            return;
        };
        let Ok(mut lines) = Lines::new(stream) else {
            return;
        };
        let client = Arc::new(Client {
            output: Mutex::new(output),
            idle: Mutex::new(Some(Instant::now())),
        });
        if !self.make_room() {
            client.tell(&ControlReply::error(
                outrigger_protocol::ErrorCode::Failed,
                "there are too many clients",
            ));
            return;
        }
        lock(&self.0).push(Arc::clone(&client));
        let (all, link) = (Arc::clone(&self.0), Arc::clone(link));
        std::thread::spawn(move || {
            client.serve(&mut lines, &link);
            lock(&all).retain(|other| !Arc::ptr_eq(other, &client));
        });
    }

    /// Whether there is room for one more: the client that has asked nothing for the
    /// longest time has to go.
    fn make_room(&self) -> bool {
        let mut all = lock(&self.0);
        if all.len() < MAX {
            return true;
        }
        let idle = all.iter().enumerate().filter_map(|(index, client)| {
            let since = *lock(&client.idle);
            since.map(|since| (since, index))
        });
        let Some((_, index)) = idle.min() else {
            return false;
        };
        all.swap_remove(index).leave();
        true
    }
}

impl Client {
    fn serve(self: &Arc<Self>, lines: &mut Lines, link: &Arc<Link>) {
        let mut watching = false;
        loop {
            let reply = match lines.next(None) {
                Ok(None) => break,
                Ok(Some(line)) => {
                    let _doing = link.busy.with();
                    *lock(&self.idle) = None;
                    let reply = match serde_json::from_slice(&line) {
                        Err(error) => ControlReply::error(
                            outrigger_protocol::ErrorCode::Failed,
                            error.to_string(),
                        ),
                        Ok(ControlCommand::Watch {}) => {
                            if !std::mem::replace(&mut watching, true) {
                                watch::subscribe(link, Arc::clone(self));
                            }
                            ControlReply::ok()
                        }
                        Ok(command) => carry_out(command, link),
                    };
                    if !self.tell(&reply) {
                        break;
                    }
                    *lock(&self.idle) = (!watching).then(Instant::now);
                    continue;
                }
                Err(error) => {
                    ControlReply::error(outrigger_protocol::ErrorCode::Failed, error.to_string())
                }
            };
            self.tell(&reply);
            break;
        }
        self.leave();
    }

    /// Sends an answer; false when it does not take it.
    fn tell(&self, reply: &ControlReply) -> bool {
        serde_json::to_vec(reply).is_ok_and(|line| self.send(&line))
    }

    /// Sends a line; false when it does not take it.
    pub fn send(&self, line: &[u8]) -> bool {
        send(&lock(&self.output), line).is_ok()
    }

    /// Ends the connection.
    pub fn leave(&self) {
        // It may be over already.
        let _ = lock(&self.output).shutdown(Shutdown::Both);
    }
}

fn carry_out(command: ControlCommand, link: &Link) -> ControlReply {
    match command {
        ControlCommand::Swap {
            id,
            socket: Some(path),
            device: None,
        } => replace::replace(link, &id, With::Foreign(path)),
        ControlCommand::Swap {
            id,
            socket: None,
            device: Some(text),
        } => replace::replace(link, &id, With::Described(text)),
        ControlCommand::Swap { id, .. } => ControlReply::error(
            outrigger_protocol::ErrorCode::Failed,
            format!("{id}: swap takes either socket or device"),
        ),
        ControlCommand::Restart { id } => replace::replace(link, &id, With::Same),
        ControlCommand::Resize { id, size } => {
            device::ask(link, &id, &DeviceCommand::Resize { size })
        }
        ControlCommand::Flush { id } => device::ask(link, &id, &DeviceCommand::Flush {}),
        ControlCommand::Stats { id } => device::ask(link, &id, &DeviceCommand::Stats {}),
        command => link.forward(&command),
    }
}

//! The event stream: one JSON object per line (`outrigger_protocol::control`).

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::fd::RawFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use outrigger_cli::fd;
use outrigger_control_socket::ControlServer;
use outrigger_protocol::control::MachineEvent;

use crate::Error;

/// Sends events to the target of `--events` and to the clients of the control socket that
/// watch.
#[derive(Default)]
pub struct EventStream {
    file: Mutex<Option<File>>,
    control: Option<ControlServer>,
}

impl EventStream {
    /// Opens `target`: the number of an inherited descriptor, or a path to append to.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(target: Option<&str>) -> Result<Self, Error> {
        let Some(target) = target else {
            return Ok(EventStream::default());
        };
        let error = Error::io(format!("--events {target}"));
        let descriptor = target.parse::<RawFd>();
        let file = match descriptor {
            Ok(fd) => File::from(fd::inherit(fd).map_err(error)?),
            Err(_) => OpenOptions::new()
                .create(true)
                .append(true)
                .open(target)
                .map_err(error)?,
        };
        // A reader that does not read must not block the machine. Standard descriptors are
        // shared with other processes, which expect them to block.
        if !matches!(descriptor, Ok(0..=2)) {
            fd::set_nonblocking(&file).map_err(Error::io("--events"))?;
        }
        Ok(EventStream {
            file: Mutex::new(Some(file)),
            control: None,
        })
    }

    /// Sends events to the clients of `control` that watch, too.
    pub fn set_control_server(&mut self, control: ControlServer) {
        self.control = Some(control);
    }

    /// Waits, at most for `limit`, until all replies and events are sent to clients.
    pub fn finish(&self, limit: Duration) {
        if let Some(control) = &self.control {
            control.finish(limit);
        }
    }

    /// Sends `event`.
    pub fn emit(&self, event: &MachineEvent) {
        tracing::debug!(?event, "machine event");
        if let Some(control) = &self.control {
            control.broadcast(event);
        }
        let mut target = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = &mut *target else { return };
        let Ok(mut line) = serde_json::to_vec(event) else {
            return;
        };
        line.push(b'\n');
        match file.write_all(&line) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                tracing::warn!("--events: an event was lost because its reader is too slow");
            }
            Err(error) => {
                tracing::warn!(%error, "--events: no more events are written");
                *target = None;
            }
        }
    }
}

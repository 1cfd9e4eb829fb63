//! The event stream: one JSON object a line (`outrigger_protocol::control`).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::RawFd;
use std::sync::{Mutex, PoisonError};

use outrigger_cli::fd;
use outrigger_protocol::control::MachineEvent;

use crate::Error;
use crate::control::Watchers;

/// Where events go: nowhere unless `--events` was given or somebody watches.
#[derive(Default)]
pub struct Events {
    file: Mutex<Option<File>>,
    watchers: Option<Watchers>,
}

impl Events {
    /// Opens `target`: the number of an inherited descriptor, or a path to
    /// append to.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(target: Option<&str>) -> Result<Self, Error> {
        let Some(target) = target else {
            return Ok(Events::default());
        };
        let error = Error::io(format!("--events {target}"));
        let file = match target.parse::<RawFd>() {
            Ok(fd) => File::from(fd::inherit(fd).map_err(error)?),
            Err(_) => OpenOptions::new()
                .create(true)
                .append(true)
                .open(target)
                .map_err(error)?,
        };
        // A reader that sleeps must not hold the machine up. Standard output and
        // its like belong to others as well.
        let own = !matches!(target.parse::<RawFd>(), Ok(0..=2));
        if own {
            fd::set_nonblocking(&file).map_err(Error::io("--events"))?;
        }
        Ok(Events {
            file: Mutex::new(Some(file)),
            watchers: None,
        })
    }

    /// From now on clients of the control socket may watch.
    pub fn watched_by(&mut self, watchers: Watchers) {
        self.watchers = Some(watchers);
    }

    /// Waits, at most for `limit`, until all who watch have been sent all of it.
    pub fn flush(&self, limit: std::time::Duration) {
        if let Some(watchers) = &self.watchers {
            watchers.flush(limit);
        }
    }

    /// Reports `event`, here and in the log.
    pub fn emit(&self, event: &MachineEvent) {
        tracing::debug!("{event:?}");
        let Ok(mut line) = serde_json::to_vec(event) else {
            return;
        };
        line.push(b'\n');
        if let Some(watchers) = &self.watchers {
            watchers.tell(&line);
        }
        let mut target = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = &mut *target else { return };
        match file.write_all(&line) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                tracing::warn!("an event was lost: its reader is too slow");
            }
            Err(e) => {
                tracing::warn!("no more events: {e}");
                *target = None;
            }
        }
    }
}

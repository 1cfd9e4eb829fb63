//! Replaces a back end by another one under the running guest. The handshake with the
//! new one happens while the old one serves the vrings, so I/O is paused only from the
//! stop of the first vring to the start of the last one. If anything fails, the old back
//! end continues.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use outrigger_protocol::ErrorCode;
use outrigger_protocol::control::MachineEvent;

use super::recovery::microseconds;
use super::{DeviceTask, Link};
use crate::Error;
use crate::endpoint::Endpoint;
use crate::frontend::connection::{BackendConnection, MESSAGE_DEADLINE};
use crate::frontend::inflight::InflightTableFile;
use crate::frontend::reconnect::hangs_up;
use crate::pci::virtio::DeviceInfo;

/// A back end after its handshake, with no vring started.
struct NewBackend {
    connection: BackendConnection,
    inflight: Option<InflightTableFile>,
    info: DeviceInfo,
}

impl DeviceTask {
    /// Replaces the back end by the one that listens at `path`. Returns for how long no
    /// back end served the vrings.
    ///
    /// # Errors
    /// Why the old back end stays, or why it was lost in the attempt.
    pub(super) fn swap(&mut self, path: PathBuf) -> Result<Duration, Error> {
        let outcome = match &self.link {
            Link::Connected(_) => self.swap_connected(&path),
            Link::Reconnecting(_) => self.swap_lost(&path),
        };
        self.draining = false;
        let id = self.device.id().to_owned();
        match &outcome {
            Ok(outage) => {
                self.spec.endpoint = Endpoint::Path(path);
                self.swaps += 1;
                self.report(MachineEvent::DeviceSwapped {
                    id,
                    outage_us: microseconds(*outage),
                });
            }
            Err(error) => self.report(MachineEvent::DeviceSwapRefused {
                id,
                reason: error.to_string(),
            }),
        }
        outcome
    }

    /// The code for a swap that failed by `error`.
    pub(super) fn swap_error_code(&self, error: &Error) -> ErrorCode {
        match (&self.link, error) {
            (Link::Reconnecting(_), _) => ErrorCode::DeviceLost,
            (_, Error::Incompatible { .. }) => ErrorCode::Incompatible,
            _ => ErrorCode::Failed,
        }
    }

    fn connect_for_swap(&self, path: &Path) -> Result<UnixStream, Error> {
        outrigger_cli::socket::connect(path, None)
            .map_err(|e| self.error(&format!("swap: connecting to {}", path.display()), e))
    }

    /// Connects the new back end of a device whose old one is lost.
    fn swap_lost(&mut self, path: &Path) -> Result<Duration, Error> {
        let gone = match &mut self.link {
            Link::Reconnecting(reconnect) => reconnect.wait_for_stale(MESSAGE_DEADLINE),
            Link::Connected(_) => true,
        };
        self.publish();
        self.complete_resets();
        if !gone {
            let why = "its process does not answer but is still there: end it first";
            return Err(self.error("swap", why));
        }
        let socket = self.connect_for_swap(path)?;
        self.reconnect(socket)
    }

    fn swap_connected(&mut self, path: &Path) -> Result<Duration, Error> {
        let new = self.prepare_new_backend(path)?;
        let started_at = Instant::now();
        self.draining = true;
        self.publish();
        if !self.may_complete_late() || self.paused {
            return self.replace_backend(new, started_at, false);
        }
        let outcome = self
            .park_and_drain()
            .and_then(|()| self.replace_backend(new, started_at, true));
        self.resume_vcpus();
        outcome
    }

    /// The handshake with the back end at `path`.
    fn prepare_new_backend(&mut self, path: &Path) -> Result<NewBackend, Error> {
        let socket = self.connect_for_swap(path)?;
        let mut connection = BackendConnection::new(&self.spec, socket, &self.watchdog)?;
        self.device.set_candidate(&connection);
        let mut info = connection.handshake(&self.spec, None)?;
        self.check_compatible("swap", &info)?;
        let sent = self.vrings.send_setup(&mut connection, false)?;
        if let Some(config) = sent.config {
            info.config = config;
        }
        Ok(NewBackend {
            connection,
            inflight: sent.inflight,
            info,
        })
    }

    /// Stops the old back end and starts the new one. `completes_late`: the old one may
    /// complete requests after it has stopped.
    fn replace_backend(
        &mut self,
        mut new: NewBackend,
        started_at: Instant,
        completes_late: bool,
    ) -> Result<Duration, Error> {
        let Link::Connected(old) = &mut self.link else {
            return Err(self.error("swap", "the old back end is lost"));
        };
        if let Err(error) = self.vrings.stop_all(old) {
            self.lose(&error);
            return Err(self.error("swap", format!("the old back end is lost: {error}")));
        }
        if completes_late && !self.vrings.wait_for_used_index(MESSAGE_DEADLINE) {
            self.resume_old_backend(None);
            let why = format!("requests are still in flight after {MESSAGE_DEADLINE:?}");
            return Err(self.error("swap", why));
        }
        new.connection.set_overall_deadline();
        if !self.paused
            && let Err(error) = self.vrings.start_all(&mut new.connection)
        {
            self.resume_old_backend(Some(new));
            return Err(error);
        }
        let outage = started_at.elapsed();
        self.vrings.set_inflight(new.inflight);
        self.use_backend(&mut new.connection, new.info);
        // This closes the connection to the old back end.
        self.link = Link::Connected(Box::new(new.connection));
        self.vrings.kick_all();
        Ok(outage)
    }

    /// Starts the old back end again, behind the requests that the new one may have
    /// completed. If that fails, the old one is lost.
    fn resume_old_backend(&mut self, new: Option<NewBackend>) {
        if let Err(error) = self.try_resume_old_backend(new) {
            self.lose(&error);
        }
    }

    fn try_resume_old_backend(&mut self, new: Option<NewBackend>) -> Result<(), Error> {
        if let Some(new) = new {
            self.stop_new_backend(new)?;
        }
        let Link::Connected(old) = &mut self.link else {
            return Ok(());
        };
        old.end_handshake();
        self.device.set_current(old);
        let result = match self.paused {
            true => Ok(()),
            false => self.vrings.start_all(old),
        };
        self.vrings.kick_all();
        result
    }

    /// Stops a new back end that could not start all vrings.
    fn stop_new_backend(&mut self, mut new: NewBackend) -> Result<(), Error> {
        new.connection.set_overall_deadline();
        if self.vrings.stop_all(&mut new.connection).is_ok() {
            if self.spec.completes_all() && !new.connection.is_tracked() {
                self.vrings.wait_for_used_index(MESSAGE_DEADLINE);
            }
            return Ok(());
        }
        // Some vrings may be started: from here on the new back end is treated as if it
        // had been the device's own and died.
        let socket = new.connection.abandon();
        let has_inflight = new.inflight.is_some();
        if has_inflight {
            self.vrings.set_inflight(new.inflight);
        }
        if !hangs_up(&socket, MESSAGE_DEADLINE) {
            let why = "the new back end may have started, and neither answers nor ends";
            self.lose(&self.error("swap", why));
            self.add_stale(socket);
            return Ok(());
        }
        self.vrings.resume_from_used_index();
        if has_inflight && let Link::Connected(old) = &mut self.link {
            self.vrings.send_inflight(old)?;
        }
        Ok(())
    }
}

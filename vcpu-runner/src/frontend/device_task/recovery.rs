//! The loss of a back end, and the connection of another one. Connecting is one
//! transaction: whatever fails, the next attempt starts from the beginning. What it
//! starts from, the used rings and the in-flight table, is in shared memory.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use outrigger_protocol::control::MachineEvent;

use super::{DeviceTask, Link};
use crate::Error;
use crate::frontend::compat;
use crate::frontend::connection::BackendConnection;
use crate::frontend::device::DeviceEvent;
use crate::frontend::on_loss::OnLoss;
use crate::frontend::reconnect::{Reconnect, ReconnectEvent};
use crate::pci::virtio::DeviceInfo;

/// Microseconds, for an event.
pub(super) fn microseconds(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}

impl DeviceTask {
    /// The back end is lost. What the driver set up waits for another one.
    pub(super) fn lose(&mut self, error: &Error) {
        let Link::Connected(connection) = &self.link else {
            return;
        };
        let reason = error.to_string();
        let tracked = connection.is_tracked();
        let reconnect = Reconnect::new(reason.clone(), tracked, self.on_loss().limit());
        let link = std::mem::replace(&mut self.link, Link::Reconnecting(reconnect));
        if let Link::Connected(connection) = link {
            self.give_up(*connection);
        }
        self.draining = false;
        self.losses += 1;
        self.report(MachineEvent::DeviceLost {
            id: self.device.id().to_owned(),
            reason,
            tracked,
        });
        // An error ends the loop over the mailbox, and there may be more messages in it.
        self.device.wake();
    }

    /// Closes a connection. A back end that knows guest memory becomes a stale one.
    fn give_up(&mut self, connection: BackendConnection) {
        if connection.has_memory() {
            self.add_stale(connection.abandon());
        }
    }

    /// The back end behind `connection` has to be gone before another one is connected.
    pub(super) fn add_stale(&mut self, connection: UnixStream) {
        if let Link::Reconnecting(reconnect) = &mut self.link {
            reconnect.add_stale(connection);
        }
        self.publish();
    }

    /// A driver starts with a device that is lost already: the time limit counts again.
    pub(super) fn renew_loss_limit(&mut self) {
        let limit = self.on_loss().limit();
        if let Link::Reconnecting(reconnect) = &mut self.link {
            reconnect.renew_limit(limit);
        }
    }

    /// What happens when no back end comes. The default depends on the endpoint, which a
    /// swap changes.
    fn on_loss(&self) -> OnLoss {
        self.on_loss
            .unwrap_or(OnLoss::default_for(&self.spec.endpoint))
    }

    /// Goes on waiting for a back end; `ready`: what [`Reconnect`] polls is ready.
    pub(super) fn advance_reconnect(&mut self, ready: bool) {
        let Link::Reconnecting(reconnect) = &mut self.link else {
            return;
        };
        match reconnect.advance(&self.spec.endpoint, ready) {
            None => {}
            Some(ReconnectEvent::StaleBackendGone) => self.complete_resets(),
            // If it fails, that is reported, and there will be another attempt.
            Some(ReconnectEvent::BackendReady(socket)) => drop(self.reconnect(socket)),
            Some(ReconnectEvent::LimitReached) => {
                let id = self.device.id();
                let message = format!("device {id} is lost: {}", reconnect.reason());
                match self.on_loss() {
                    OnLoss::Wait => {}
                    OnLoss::Error(_) => self.transport.set_needs_reset(),
                    OnLoss::Stop(_) => (self.events)(DeviceEvent::EndMachine(message)),
                }
            }
        }
    }

    /// Connects the back end behind `socket`, completely or not at all. Returns for how
    /// long no back end served the vrings.
    ///
    /// # Errors
    /// Why the back end cannot be used. The task is still reconnecting then.
    pub(super) fn reconnect(&mut self, socket: UnixStream) -> Result<Duration, Error> {
        let id = self.device.id().to_owned();
        let Link::Reconnecting(reconnect) = &mut self.link else {
            return Err(self.error("reconnecting", "a back end is connected already"));
        };
        if reconnect.begin_handshake() {
            self.report(MachineEvent::DeviceReconnecting { id: id.clone() });
        }
        self.publish();
        let result = BackendConnection::new(&self.spec, socket, &self.watchdog).and_then(
            |mut connection| match self.set_up_backend(&mut connection) {
                Ok(resubmitted) => Ok((connection, resubmitted)),
                Err(error) => {
                    self.give_up(connection);
                    Err(error)
                }
            },
        );
        let Link::Reconnecting(reconnect) = &mut self.link else {
            return Err(self.error("reconnecting", "a back end is connected already"));
        };
        match result {
            Ok((connection, resubmitted)) => {
                let outage = reconnect.outage();
                self.link = Link::Connected(Box::new(connection));
                self.report(MachineEvent::DeviceRunning {
                    id,
                    outage_us: microseconds(outage),
                    replayed: resubmitted,
                });
                Ok(outage)
            }
            Err(error) => {
                let reason = error.to_string();
                if reconnect.handshake_failed(&reason) {
                    self.report(MachineEvent::DeviceRefused { id, reason });
                }
                Err(error)
            }
        }
    }

    /// Performs the handshake and starts the vrings; returns how many requests the back
    /// end resubmits.
    fn set_up_backend(&mut self, connection: &mut BackendConnection) -> Result<u64, Error> {
        self.device.set_candidate(connection);
        let mut info = connection.handshake(&self.spec, self.transport.config_length())?;
        self.check_compatible("reconnecting", &info)?;
        let resubmitted = self.vrings.count_inflight();
        if resubmitted > 0 && !connection.is_tracked() {
            let why = format!(
                "the back end cannot resubmit the {resubmitted} requests in flight: it has no \
                 INFLIGHT_SHMFD"
            );
            return Err(self.error("reconnecting", why));
        }
        let sent = self.vrings.send_setup(connection, true)?;
        // It uses the table from its first request on, even if it fails later.
        self.vrings.set_inflight(sent.inflight);
        self.vrings.resume_from_used_index();
        if !self.paused {
            self.vrings.start_all(connection)?;
        }
        if let Some(config) = sent.config {
            info.config = config;
        }
        self.use_backend(connection, info);
        self.vrings.kick_all();
        Ok(resubmitted)
    }

    /// Whether the driver could continue with the back end that `info` describes.
    pub(super) fn check_compatible(&self, operation: &str, info: &DeviceInfo) -> Result<(), Error> {
        let accepted = self.transport.accepted_features();
        compat::check(&self.transport.info(), accepted, info).map_err(|why| Error::Incompatible {
            id: self.device.id().to_owned(),
            operation: operation.to_owned(),
            why,
        })
    }

    /// The vrings are started: `connection` is the current one, and its back end
    /// determines what the driver sees. New features are offered after the next reset.
    pub(super) fn use_backend(&self, connection: &mut BackendConnection, info: DeviceInfo) {
        connection.end_handshake();
        self.device.set_current(connection);
        self.transport.offer_features(info.features);
        self.transport.set_config(info.config);
    }
}

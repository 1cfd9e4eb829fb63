//! The thread that works for one device. It takes the requests of the driver and the
//! commands of the machine from its mailbox, and talks to the back end. Every wait has a deadline.
//!
//! The state is *connected or reconnecting* ([`Link`]) and *paused or not*. Everything
//! that `status` shows is derived from these: see [`DeviceTask::publish`]. The task is
//! one type in three files, which therefore use each other: this one is the loop and the
//! requests, `recovery` is the loss of a back end and the connection of another one,
//! `swap` is the replacement of a back end that works.

mod recovery;
mod swap;

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use outrigger_cli::logging::DEVICE_SPAN;
use outrigger_protocol::control::MachineEvent;
use rustix::event::{PollFd, PollFlags, poll};

use super::connection::{BackendConnection, MESSAGE_DEADLINE};
use super::device::{DeviceEvent, SwapFailure, TaskMessage, TaskStatus, VhostUserDevice};
use super::on_loss::OnLoss;
use super::reconnect::Reconnect;
use super::spec::DeviceSpec;
use super::state::{LinkState, displayed_state};
use super::vhost_workarounds::watchdog::Watchdog;
use super::vrings::Vrings;
use crate::pci::virtio::VirtioPci;
use crate::pci::virtio::request::{QueueSetup, TransportRequest};
use crate::vm::memory::GuestRam;
use crate::{Error, clock, eventfd};

/// How long a back end may take to complete its requests before it is stopped.
const DRAIN_DEADLINE: Duration = Duration::from_secs(3);

/// Whether there is a back end.
enum Link {
    Connected(Box<BackendConnection>),
    Reconnecting(Reconnect),
}

impl Link {
    fn connection(&mut self) -> Option<&mut BackendConnection> {
        match self {
            Link::Connected(connection) => Some(connection),
            Link::Reconnecting(_) => None,
        }
    }
}

/// What the task polls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PollSource {
    Mailbox,
    Connection,
    BackendChannel,
    Reconnect,
}

/// See the module's documentation.
pub(super) struct DeviceTask {
    device: Arc<VhostUserDevice>,
    messages: Receiver<TaskMessage>,
    watchdog: Arc<Watchdog>,
    /// The `--device` option, with the endpoint of the present back end: a swap changes it.
    spec: DeviceSpec,
    transport: Arc<VirtioPci>,
    vrings: Vrings,
    link: Link,
    /// The machine is paused, and the vrings are stopped.
    paused: bool,
    /// A swap is stopping the back end.
    draining: bool,
    on_loss: Option<OnLoss>,
    losses: u64,
    swaps: u64,
    /// Resets that the driver waits for: of the device, and of queues.
    device_reset_pending: bool,
    queue_resets_pending: Vec<usize>,
    events: Box<dyn Fn(DeviceEvent) + Send>,
}

impl DeviceTask {
    pub fn new(
        (device, messages): (Arc<VhostUserDevice>, Receiver<TaskMessage>),
        connection: BackendConnection,
        watchdog: Arc<Watchdog>,
        transport: Arc<VirtioPci>,
        ram: Arc<GuestRam>,
        on_loss: Option<OnLoss>,
        events: Box<dyn Fn(DeviceEvent) + Send>,
    ) -> Self {
        DeviceTask {
            spec: device.spec().clone(),
            device,
            messages,
            watchdog,
            vrings: Vrings::new(Arc::clone(&transport), ram),
            transport,
            link: Link::Connected(Box::new(connection)),
            paused: false,
            draining: false,
            on_loss,
            losses: 0,
            swaps: 0,
            device_reset_pending: false,
            queue_resets_pending: Vec::new(),
            events,
        }
    }

    pub fn run(mut self) {
        let _span =
            tracing::error_span!(target: DEVICE_SPAN, "device_task", device = self.device.id())
                .entered();
        loop {
            if let Err(error) = self.run_once() {
                if self.link.connection().is_none() {
                    // No back end is involved, so the runner itself is in trouble. Do not
                    // retry at full speed.
                    tracing::error!(error = error.detail(), "the device task failed");
                    std::thread::sleep(MESSAGE_DEADLINE);
                }
                self.lose(&error);
            }
            self.publish();
        }
    }

    /// Publishes the status that is derived from the state of the task.
    fn publish(&self) {
        let (link, tracked, stale_backends) = match &self.link {
            Link::Connected(connection) => {
                let link = match self.draining {
                    true => LinkState::Draining,
                    false => LinkState::Connected,
                };
                (link, connection.is_tracked(), 0)
            }
            Link::Reconnecting(reconnect) => {
                let link = match reconnect.in_handshake() {
                    true => LinkState::Handshake,
                    false => LinkState::Lost,
                };
                (link, reconnect.lost_was_tracked(), reconnect.stale_count())
            }
        };
        self.device.publish(TaskStatus {
            state: displayed_state(link, self.paused),
            active_queues: self.vrings.len(),
            tracked,
            losses: self.losses,
            swaps: self.swaps,
            stale_backends,
        });
    }

    /// Sends `event` to the event stream. The status that goes with it is visible first.
    fn report(&self, event: MachineEvent) {
        self.publish();
        (self.events)(DeviceEvent::Report(event));
    }

    /// Confirms to a waiting thread that a message was carried out.
    fn confirm(&self, done: &Sender<()>) {
        self.publish();
        // The other end is closed if its thread waited too long.
        let _ = done.send(());
    }

    fn error(&self, operation: &str, why: impl ToString) -> Error {
        Error::device(self.device.id(), operation, why)
    }

    /// Waits for something to happen and handles it.
    ///
    /// # Errors
    /// When the back end is lost.
    fn run_once(&mut self) -> Result<(), Error> {
        let ready = self.wait()?;
        // What was polled comes first: a message may replace the connection.
        match &mut self.link {
            Link::Connected(connection) => {
                if ready.contains(&PollSource::Connection)
                    && let Some(error) = connection.connection_error()
                {
                    return Err(error);
                }
                if ready.contains(&PollSource::BackendChannel)
                    && connection.handle_backend_channel()?
                {
                    let config = connection.read_config()?;
                    self.transport.set_config(config);
                }
            }
            Link::Reconnecting(_) => {
                self.advance_reconnect(ready.contains(&PollSource::Reconnect));
            }
        }
        self.device.clear_wake();
        while let Ok(message) = self.messages.try_recv() {
            self.handle_message(message)?;
        }
        Ok(())
    }

    /// Waits until something is ready or a timeout of [`Reconnect`] has passed.
    fn wait(&self) -> Result<Vec<PollSource>, Error> {
        let mailbox = eventfd::borrow(self.device.wake_fd());
        let mut sources = vec![PollSource::Mailbox];
        let mut fds = vec![PollFd::from_borrowed_fd(mailbox, PollFlags::IN)];
        let mut timeout = None;
        match &self.link {
            Link::Connected(connection) => {
                sources.push(PollSource::Connection);
                fds.push(PollFd::new(connection.socket(), PollFlags::IN));
                if let Some(fd) = connection.backend_channel_fd() {
                    sources.push(PollSource::BackendChannel);
                    fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
                }
            }
            Link::Reconnecting(reconnect) => {
                if let Some(fd) = reconnect.poll_fd() {
                    sources.push(PollSource::Reconnect);
                    fds.push(fd);
                }
                timeout = reconnect.wakes_at().map(clock::until);
            }
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::io("poll")(e.into())),
        }
        let ready = sources.into_iter().zip(&fds);
        Ok(ready
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(source, _)| source)
            .collect())
    }

    fn handle_message(&mut self, message: TaskMessage) -> Result<(), Error> {
        match message {
            TaskMessage::Request(request) => return self.handle_request(request),
            TaskMessage::Pause(done) => {
                let result = self.pause();
                self.lose_on_error(result);
                self.confirm(&done);
            }
            TaskMessage::Resume(done) => {
                let result = self.resume();
                self.lose_on_error(result);
                self.confirm(&done);
            }
            TaskMessage::Reset(done) => {
                let result = self.clear_vrings();
                self.lose_on_error(result);
                // No driver waits for these any more: the whole machine is reset.
                self.device_reset_pending = false;
                self.queue_resets_pending.clear();
                self.paused = false;
                self.confirm(&done);
            }
            TaskMessage::Swap(path, callback) => {
                let outcome = self.swap(path).map_err(|error| SwapFailure {
                    code: self.swap_error_code(&error),
                    error,
                });
                self.publish();
                callback(outcome);
            }
        }
        Ok(())
    }

    fn handle_request(&mut self, request: TransportRequest) -> Result<(), Error> {
        match request {
            TransportRequest::Activate { features, queues } => {
                let result = self.activate(features, queues);
                self.fail_device_if_refused(result)
            }
            TransportRequest::StartQueue(setup) => {
                let result = self.vrings.add(setup).and_then(|()| self.start_vrings());
                self.fail_device_if_refused(result)
            }
            TransportRequest::StopQueue(index) => {
                let result = self.vrings.remove(index, self.link.connection());
                self.queue_resets_pending.push(index);
                self.lose_on_error(result);
                Ok(())
            }
            TransportRequest::Reset => {
                let result = self.clear_vrings();
                self.device_reset_pending = true;
                self.lose_on_error(result);
                Ok(())
            }
            TransportRequest::WriteConfig { offset, data } => self.write_config(offset, &data),
        }
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), Error> {
        let Link::Connected(connection) = &mut self.link else {
            self.vrings.record_config_write(offset, data);
            return Ok(());
        };
        match connection.write_config(offset, data) {
            // The next back end does not get what this one does not accept.
            Err(error @ Error::Refused { .. }) => {
                tracing::debug!(error = error.detail(), "a write of the driver was refused");
            }
            // If the back end is gone, the next message fails.
            _ => self.vrings.record_config_write(offset, data),
        }
        let config = connection.read_config()?;
        self.transport.set_config(config);
        Ok(())
    }

    /// Gives up a back end that failed at a message. After a reset, the driver is told
    /// only when the back end is gone: until then its memory may still be written to.
    fn lose_on_error(&mut self, result: Result<(), Error>) {
        if let Err(error) = result {
            self.lose(&error);
        }
        self.complete_resets();
    }

    /// Completes the resets that the driver waits for, unless a stale back end may still
    /// write to its memory.
    fn complete_resets(&mut self) {
        if matches!(&self.link, Link::Reconnecting(reconnect) if reconnect.stale_count() > 0) {
            return;
        }
        for index in self.queue_resets_pending.drain(..) {
            self.transport.complete_queue_reset(index);
        }
        if std::mem::take(&mut self.device_reset_pending) {
            self.transport.complete_reset();
        }
    }

    /// If what the driver set up was refused, the device needs a reset by its driver
    /// (virtio 1.2 section 2.1.2), and the back end stays.
    fn fail_device_if_refused(&mut self, result: Result<(), Error>) -> Result<(), Error> {
        let Err(error @ Error::Refused { .. }) = result else {
            return result;
        };
        tracing::warn!(
            error = error.detail(),
            "the device needs a reset by its driver"
        );
        self.transport.set_needs_reset();
        self.clear_vrings()
    }

    fn activate(&mut self, features: u64, queues: Vec<QueueSetup>) -> Result<(), Error> {
        // A swap may have changed the features since the driver read them.
        let missing = features & !self.transport.offered_features();
        if missing != 0 {
            return Err(Error::Refused {
                id: self.device.id().to_owned(),
                operation: "DRIVER_OK".into(),
                why: format!("features {missing:#x} are not offered any more"),
            });
        }
        self.vrings.activate(features, queues)?;
        if let Link::Connected(connection) = &mut self.link {
            let sent = self.vrings.send_setup(connection, false)?;
            self.vrings.set_inflight(sent.inflight);
            if let Some(config) = sent.config {
                self.transport.set_config(config);
            }
        }
        self.start_vrings()?;
        self.renew_loss_limit();
        self.report(MachineEvent::DriverOk {
            id: self.device.id().to_owned(),
            queues: self.vrings.len(),
        });
        Ok(())
    }

    /// Starts the vrings that are stopped, unless the machine is paused or there is no
    /// back end: then they are started later.
    fn start_vrings(&mut self) -> Result<(), Error> {
        match &mut self.link {
            Link::Connected(connection) if !self.paused => self.vrings.start_all(connection),
            _ => Ok(()),
        }
    }

    /// The driver is gone: stops its vrings and forgets them.
    fn clear_vrings(&mut self) -> Result<(), Error> {
        let result = self.stop_vrings();
        self.vrings.clear();
        result
    }

    /// Stops the vrings; afterwards no request is in flight. Meanwhile the driver waits,
    /// or its vCPUs are parked.
    fn stop_vrings(&mut self) -> Result<(), Error> {
        let drains_late = self.may_complete_late();
        if drains_late {
            // See `DeviceTask::park_and_drain`. A back end that is slow is stopped anyway.
            self.vrings.drain(DRAIN_DEADLINE);
        }
        let Link::Connected(connection) = &mut self.link else {
            return Ok(());
        };
        self.vrings.stop_all(connection)?;
        if drains_late && !self.vrings.wait_for_used_index(MESSAGE_DEADLINE) {
            tracing::warn!("the back end has stopped with requests in flight");
        }
        Ok(())
    }

    /// Parks the vCPUs and waits until the back end has completed all requests, so that
    /// it can be stopped before [`DeviceTask::resume_vcpus`]. A back end that does not
    /// track its requests leaves no other way: qemu-storage-daemon completes requests
    /// after it has stopped, and fails for good when it then signals the driver.
    ///
    /// # Errors
    /// When the vCPUs or the back end take too long.
    fn park_and_drain(&self) -> Result<(), Error> {
        let (parked, confirmation) = crossbeam_channel::bounded(1);
        (self.events)(DeviceEvent::ParkVcpus(parked));
        if confirmation.recv_timeout(MESSAGE_DEADLINE).is_err() {
            return Err(self.error("draining", "the vCPUs do not stop"));
        }
        if !self.vrings.drain(DRAIN_DEADLINE) {
            let why = format!("requests are still in flight after {DRAIN_DEADLINE:?}");
            return Err(self.error("draining", why));
        }
        Ok(())
    }

    /// Undoes [`DeviceTask::park_and_drain`], whatever its result was.
    fn resume_vcpus(&self) {
        (self.events)(DeviceEvent::ResumeVcpus);
    }

    /// Whether there is a back end that may complete requests after it has stopped a
    /// vring. One that tracks its requests is trusted not to.
    fn may_complete_late(&self) -> bool {
        match &self.link {
            Link::Connected(connection) => self.spec.completes_all() && !connection.is_tracked(),
            Link::Reconnecting(_) => false,
        }
    }

    fn pause(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.paused, true) {
            return Ok(());
        }
        self.publish();
        self.stop_vrings()
    }

    fn resume(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.paused) {
            return Ok(());
        }
        self.publish();
        self.start_vrings()
    }
}

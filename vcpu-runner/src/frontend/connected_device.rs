//! The first connection to a device's back end, before its device task starts.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use super::connection::BackendConnection;
use super::device::{DeviceEvent, TaskMessage, VhostUserDevice};
use super::device_task::DeviceTask;
use super::on_loss::OnLoss;
use super::reconnect::hangs_up;
use super::spec::DeviceSpec;
use super::vhost_workarounds::watchdog::Watchdog;
use crate::Error;
use crate::endpoint::Endpoint;
use crate::pci::virtio::{DeviceInfo, VirtioPci};
use crate::vm::memory::GuestRam;

/// How long the runner waits at its start for a process to listen at a socket path.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// For how long the handshake is tried again when the process dies in the middle of it:
/// another one may be about to start.
const HANDSHAKE_RETRIES: Duration = Duration::from_millis(300);

/// A device whose back end is connected and whose task has not started.
pub struct ConnectedDevice {
    device: Arc<VhostUserDevice>,
    connection: BackendConnection,
    messages: Receiver<TaskMessage>,
    watchdog: Arc<Watchdog>,
}

impl ConnectedDevice {
    /// Connects to the back end and performs the handshake. Returns also what the
    /// device is.
    ///
    /// # Errors
    /// Names the device and the step that failed.
    pub fn connect(
        spec: DeviceSpec,
        watchdog: &Arc<Watchdog>,
    ) -> Result<(Self, DeviceInfo), Error> {
        let (mut connection, info) = handshake(&spec, watchdog)?;
        connection.end_handshake();
        let (device, messages) = VhostUserDevice::new(spec, &connection)?;
        let connected = ConnectedDevice {
            device,
            connection,
            messages,
            watchdog: Arc::clone(watchdog),
        };
        Ok((connected, info))
    }

    /// The handle to the device.
    pub fn device(&self) -> &Arc<VhostUserDevice> {
        &self.device
    }

    /// Starts the device task, which serves the driver behind `transport`.
    ///
    /// # Errors
    /// When the thread cannot be created.
    pub fn start(
        self,
        transport: Arc<VirtioPci>,
        ram: Arc<GuestRam>,
        on_loss: Option<OnLoss>,
        events: impl Fn(DeviceEvent) + Send + 'static,
    ) -> Result<Arc<VhostUserDevice>, Error> {
        self.device.set_transport(Arc::clone(&transport));
        let device = Arc::clone(&self.device);
        let task = DeviceTask::new(
            (self.device, self.messages),
            self.connection,
            self.watchdog,
            transport,
            ram,
            on_loss,
            Box::new(events),
        );
        std::thread::Builder::new()
            .name(format!("dev-{}", device.id()))
            .spawn(move || task.run())
            .map_err(Error::io("starting the thread of a device"))?;
        Ok(device)
    }
}

/// Connects and performs the handshake; starts again if the process dies meanwhile.
fn handshake(
    spec: &DeviceSpec,
    watchdog: &Arc<Watchdog>,
) -> Result<(BackendConnection, DeviceInfo), Error> {
    let retry_deadline = Instant::now() + HANDSHAKE_RETRIES;
    let mut socket = connect(spec, Instant::now() + CONNECT_DEADLINE)?;
    // The first error says more than those that follow from it.
    let mut first_error = None;
    loop {
        let mut connection = BackendConnection::new(spec, socket, watchdog)?;
        let error = match connection.handshake(spec, None) {
            Ok(info) => return Ok((connection, info)),
            Err(error) => error,
        };
        let died = hangs_up(&connection.abandon(), Duration::ZERO);
        let is_path = matches!(spec.endpoint, Endpoint::Path(_));
        let error = first_error.take().unwrap_or(error);
        if !died || !is_path || Instant::now() >= retry_deadline {
            return Err(error);
        }
        socket = match connect(spec, retry_deadline) {
            Ok(socket) => socket,
            Err(_) => return Err(error),
        };
        first_error = Some(error);
    }
}

/// Opens the connection; waits until `deadline` for a process to listen at a path.
fn connect(spec: &DeviceSpec, deadline: Instant) -> Result<UnixStream, Error> {
    match &spec.endpoint {
        Endpoint::Fd(fd) => outrigger_cli::fd::inherit(*fd)
            .map(UnixStream::from)
            .map_err(|e| Error::device(&spec.id, format!("fd {fd}"), e)),
        Endpoint::Path(path) => outrigger_cli::socket::connect(path, Some(deadline))
            .map_err(|e| Error::device(&spec.id, format!("connecting to {}", path.display()), e)),
    }
}

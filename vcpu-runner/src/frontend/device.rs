//! The handle to a vhost-user device that the rest of the runner holds.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use outrigger_protocol::ErrorCode;
use outrigger_protocol::control::{DeviceState, DeviceStatus, MachineEvent};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::connection::{BackendConnection, CancelHandle};
use super::spec::DeviceSpec;
use crate::Error;
use crate::pci::virtio::VirtioPci;
use crate::pci::virtio::request::{TransportRequest, TransportRequestHandler};

/// What a device task tells the machine.
#[derive(Clone, Debug)]
pub enum DeviceEvent {
    /// An event for the event stream.
    Report(MachineEvent),
    /// Park the vCPUs, so that the driver adds no request, and answer when they are
    /// parked. [`DeviceEvent::ResumeVcpus`] follows.
    ParkVcpus(Sender<()>),
    /// Undo [`DeviceEvent::ParkVcpus`].
    ResumeVcpus,
    /// The device is lost, and `--on-loss` says that the machine ends.
    EndMachine(String),
}

/// Takes the outcome of a swap: for how long no back end served the vrings.
pub type SwapCallback = Box<dyn FnOnce(Result<Duration, SwapFailure>) + Send>;

/// Why a swap failed.
#[derive(Debug)]
pub struct SwapFailure {
    /// [`ErrorCode::DeviceLost`] if the device has no back end now.
    pub code: ErrorCode,
    /// What failed.
    pub error: Error,
}

/// What the mailbox of a device task takes.
pub(super) enum TaskMessage {
    /// From the virtio transport.
    Request(TransportRequest),
    /// Stop the vrings; answered when they are stopped.
    Pause(Sender<()>),
    /// Undo [`TaskMessage::Pause`].
    Resume(Sender<()>),
    /// Stop and forget the vrings for a reset of the machine.
    Reset(Sender<()>),
    /// Replace the back end by the one that listens at this path.
    Swap(PathBuf, SwapCallback),
}

/// What a device task publishes about itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct TaskStatus {
    pub state: DeviceState,
    pub active_queues: usize,
    pub tracked: bool,
    pub losses: u64,
    pub swaps: u64,
    /// Back ends that were given up and may still write to guest memory.
    pub stale_backends: usize,
}

/// A device of the machine that is served by a vhost-user back end.
pub struct VhostUserDevice {
    spec: DeviceSpec,
    mailbox: Sender<TaskMessage>,
    wake: EventFd,
    status: Mutex<TaskStatus>,
    transport: OnceLock<Arc<VirtioPci>>,
    cancel_handles: Mutex<CancelHandles>,
}

/// How other threads can end a wait of the device task for a back end.
#[derive(Default)]
struct CancelHandles {
    current: Weak<CancelHandle>,
    /// Of a connection that is to replace the current one.
    candidate: Weak<CancelHandle>,
}

/// With so many messages in the mailbox, writes to the configuration space are dropped.
/// A driver waits for the effect of each, so only a hostile one gets this far.
const MAX_QUEUED_WRITES: usize = 256;

impl TransportRequestHandler for VhostUserDevice {
    fn submit(&self, request: TransportRequest) {
        if matches!(request, TransportRequest::WriteConfig { .. })
            && self.mailbox.len() >= MAX_QUEUED_WRITES
        {
            return;
        }
        self.send(TaskMessage::Request(request));
    }
}

impl VhostUserDevice {
    /// The handle to a device that `connection` serves, and the other end of its mailbox.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub(super) fn new(
        spec: DeviceSpec,
        connection: &BackendConnection,
    ) -> Result<(Arc<Self>, Receiver<TaskMessage>), Error> {
        let (mailbox, messages) = unbounded();
        let device = VhostUserDevice {
            spec,
            mailbox,
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::io("eventfd"))?,
            status: Mutex::new(TaskStatus {
                state: DeviceState::Running,
                active_queues: 0,
                tracked: connection.is_tracked(),
                losses: 0,
                swaps: 0,
                stale_backends: 0,
            }),
            transport: OnceLock::new(),
            cancel_handles: Mutex::new(CancelHandles {
                current: connection.cancel_handle(),
                ..Default::default()
            }),
        };
        Ok((Arc::new(device), messages))
    }

    /// The device's name.
    pub fn id(&self) -> &str {
        &self.spec.id
    }

    /// The `--device` option.
    pub fn spec(&self) -> &DeviceSpec {
        &self.spec
    }

    /// For the command `status` of the control socket.
    pub fn status(&self) -> DeviceStatus {
        let status = *self.lock_status();
        DeviceStatus {
            id: self.spec.id.clone(),
            virtio_id: self.spec.virtio_id,
            state: status.state,
            driver_ok: self.transport.get().is_some_and(|t| t.is_activated()),
            active_queues: status.active_queues,
            tracked: status.tracked,
            losses: status.losses,
            swaps: status.swaps,
        }
    }

    /// Whether a back end that was given up may still write to guest memory.
    pub fn has_stale_backends(&self) -> bool {
        self.lock_status().stale_backends > 0
    }

    fn lock_status(&self) -> MutexGuard<'_, TaskStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, message: TaskMessage) {
        // Fails only when the device task has ended, at the end of the program.
        let _ = self.mailbox.send(message);
        self.wake();
    }

    fn send_and_confirm(&self, message: impl FnOnce(Sender<()>) -> TaskMessage) -> Receiver<()> {
        let (done, confirmation) = bounded(1);
        self.send(message(done));
        confirmation
    }

    /// Stops the vrings. The returned channel confirms it.
    pub fn pause(&self) -> Receiver<()> {
        self.send_and_confirm(TaskMessage::Pause)
    }

    /// Undoes [`VhostUserDevice::pause`]. The returned channel confirms it.
    pub fn resume(&self) -> Receiver<()> {
        self.send_and_confirm(TaskMessage::Resume)
    }

    /// Stops and forgets the vrings for a reset of the machine. The returned channel
    /// confirms it.
    pub fn reset(&self) -> Receiver<()> {
        self.send_and_confirm(TaskMessage::Reset)
    }

    /// Replaces the back end by the one that listens at `path`.
    pub fn swap(&self, path: PathBuf, callback: SwapCallback) {
        self.send(TaskMessage::Swap(path, callback));
    }

    fn cancel_handles(&self) -> MutexGuard<'_, CancelHandles> {
        self.cancel_handles
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the device task's wait for a back end that is to replace the current one or,
    /// if there is none, for the current one.
    pub fn cancel_wait(&self) {
        let mut handles = self.cancel_handles();
        let candidate = std::mem::take(&mut handles.candidate);
        if let Some(handle) = candidate.upgrade().or(handles.current.upgrade()) {
            handle.cancel();
        }
    }

    // For the device task.

    /// Set once, before the device task starts.
    pub(super) fn set_transport(&self, transport: Arc<VirtioPci>) {
        let _ = self.transport.set(transport);
    }

    pub(super) fn publish(&self, status: TaskStatus) {
        *self.lock_status() = status;
    }

    /// Readable when there may be messages.
    pub(super) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    pub(super) fn wake(&self) {
        let _ = self.wake.write(1);
    }

    pub(super) fn clear_wake(&self) {
        // EAGAIN: something else ended the wait.
        let _ = self.wake.read();
    }

    /// `connection` may replace the current one.
    pub(super) fn set_candidate(&self, connection: &BackendConnection) {
        self.cancel_handles().candidate = connection.cancel_handle();
    }

    /// `connection` is the current one from now on.
    pub(super) fn set_current(&self, connection: &BackendConnection) {
        *self.cancel_handles() = CancelHandles {
            current: connection.cancel_handle(),
            ..Default::default()
        };
    }
}

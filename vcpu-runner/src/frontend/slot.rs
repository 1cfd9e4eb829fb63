//! A device's slot as the rest of the runner holds it.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use outrigger_protocol::control::{DeviceStatus, MachineEvent};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::loss::hangs_up;
use super::on_loss::OnLoss;
use super::session::{Lifeline, Session};
use super::spec::{DeviceSpec, Endpoint};
use super::state::{StateCell, Step};
use super::thread::Thread;
use super::watchdog::Watchdog;
use crate::Error;
use crate::pci::virtio::backend::{Backend, Request};
use crate::pci::virtio::{DeviceInfo, VirtioPci};
use crate::vm::memory::Ram;

/// How long a socket's path may be served by nobody at the start.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// For how long it is tried again when a process dies in the first handshake.
const STUMBLE: Duration = Duration::from_millis(300);

/// What a slot tells the machine.
#[derive(Clone, Debug)]
pub enum Notice {
    /// Something to report.
    Event(MachineEvent),
    /// The device is lost, and the machine shall end.
    End(String),
    /// The vCPUs shall stand still, so that no request is added; answered when they
    /// do. [`Notice::Release`] follows.
    Hold(Sender<()>),
    /// The vCPUs may go on.
    Release,
}

/// Takes the outcome of a swap: how long no process worked on the rings.
pub type Swapped = Box<dyn FnOnce(Result<Duration, Error>) + Send>;

/// What the slot's thread is asked.
pub(super) enum Message {
    Request(Request),
    /// Stop the queues where they are; answered when they stand still.
    Pause(Sender<()>),
    /// Go on after a pause.
    Resume(Sender<()>),
    /// Stop the queues for a reset of the machine.
    Stop(Sender<()>),
    /// Put the process that listens at this path in place of the present one.
    Swap(PathBuf, Swapped),
}

/// The part of a slot that others hold.
pub struct Slot {
    pub(super) spec: DeviceSpec,
    mailbox: Sender<Message>,
    pub(super) wake: EventFd,
    pub(super) state: StateCell,
    pub(super) counts: Counts,
    device: OnceLock<Arc<VirtioPci>>,
    lifelines: Mutex<Lifelines>,
}

/// The connections of the moment.
#[derive(Default)]
struct Lifelines {
    current: Weak<Lifeline>,
    /// One that may take its place.
    candidate: Weak<Lifeline>,
}

/// What the control socket tells of a slot.
#[derive(Default)]
pub(super) struct Counts {
    pub active: AtomicUsize,
    pub tracked: AtomicBool,
    pub losses: AtomicU64,
    pub swaps: AtomicU64,
    /// Processes that are given up and may write to guest memory yet.
    pub ghosts: AtomicUsize,
}

/// Requests that may wait in a mailbox before writes to the configuration space
/// are dropped: a driver waits for the effect of one, so only a hostile one gets
/// this far.
const MAILBOX: usize = 256;

impl Backend for Slot {
    fn request(&self, request: Request) {
        if matches!(request, Request::WriteConfig { .. }) && self.mailbox.len() >= MAILBOX {
            return;
        }
        self.send(Message::Request(request));
    }
}

impl Slot {
    /// Connects to the device's process and shakes hands; the slot's thread
    /// starts with [`Pending::run`].
    ///
    /// # Errors
    /// Names the device and the step that failed.
    pub fn connect(spec: DeviceSpec, watchdog: &Arc<Watchdog>) -> Result<Pending, Error> {
        let state = StateCell::default();
        state.take(Step::Connect);
        let (session, info) = Self::shake_hands(&spec, watchdog)?;
        let (mailbox, messages) = unbounded();
        let slot = Arc::new(Slot {
            spec,
            mailbox,
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::io("eventfd"))?,
            state,
            counts: Counts::default(),
            device: OnceLock::new(),
            lifelines: Mutex::new(Lifelines {
                current: session.lifeline(),
                ..Default::default()
            }),
        });
        slot.state.take(Step::Connected);
        slot.counts
            .tracked
            .store(session.is_tracked(), Ordering::Relaxed);
        Ok(Pending {
            slot,
            session,
            info,
            messages,
            watchdog: Arc::clone(watchdog),
        })
    }

    /// A process may die in the middle of this, and another be about to come.
    fn shake_hands(
        spec: &DeviceSpec,
        watchdog: &Arc<Watchdog>,
    ) -> Result<(Session, DeviceInfo), Error> {
        let patience = Instant::now() + STUMBLE;
        let mut socket = open_endpoint(spec, Instant::now() + CONNECT_DEADLINE)?;
        // What went wrong at first says more than what followed from it.
        let mut first = None;
        loop {
            let mut session = Session::new(spec, socket, watchdog)?;
            let error = match session.shake_hands(spec) {
                Ok(info) => {
                    session.established();
                    return Ok((session, info));
                }
                Err(error) => error,
            };
            let died = hangs_up(&session.abandon(), Duration::ZERO);
            let is_path = matches!(spec.endpoint, Endpoint::Path(_));
            let error = first.take().unwrap_or(error);
            if !died || !is_path || Instant::now() >= patience {
                return Err(error);
            }
            socket = match open_endpoint(spec, patience) {
                Ok(socket) => socket,
                Err(_) => return Err(error),
            };
            first = Some(error);
        }
    }

    /// The device's name.
    pub fn id(&self) -> &str {
        &self.spec.id
    }

    /// For the control socket.
    pub fn status(&self) -> DeviceStatus {
        let Counts {
            active,
            tracked,
            losses,
            swaps,
            ghosts: _,
        } = &self.counts;
        DeviceStatus {
            id: self.spec.id.clone(),
            virtio_id: self.spec.virtio_id,
            state: self.state.get(),
            driver_ok: self.device.get().is_some_and(|device| device.is_live()),
            active_queues: active.load(Ordering::Relaxed),
            tracked: tracked.load(Ordering::Relaxed),
            losses: losses.load(Ordering::Relaxed),
            swaps: swaps.load(Ordering::Relaxed),
        }
    }

    fn send(&self, message: Message) {
        // Both fail only when the thread is gone, at the end of the program.
        let _ = self.mailbox.send(message);
        let _ = self.wake.write(1);
    }

    fn order(&self, message: impl FnOnce(Sender<()>) -> Message) -> Receiver<()> {
        let (done, wait) = bounded(1);
        self.send(message(done));
        wait
    }

    /// Stops the queues where they are. Wait on what this returns.
    pub fn pause(&self) -> Receiver<()> {
        self.order(Message::Pause)
    }

    /// Goes on after [`Slot::pause`].
    pub fn resume(&self) -> Receiver<()> {
        self.order(Message::Resume)
    }

    /// Stops the queues for a reset of the whole machine.
    pub fn stop(&self) -> Receiver<()> {
        self.order(Message::Stop)
    }

    /// Puts the process that listens at `path` in place of the present one.
    pub fn swap(&self, path: PathBuf, swapped: Swapped) {
        self.send(Message::Swap(path, swapped));
    }

    fn lifelines(&self) -> MutexGuard<'_, Lifelines> {
        self.lifelines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no process that was given up could write to guest memory yet.
    pub fn is_quiet(&self) -> bool {
        self.counts.ghosts.load(Ordering::Acquire) == 0
    }

    /// Ends every wait for the process that may come, or, if there is none, for the one
    /// that is there.
    pub fn cut_off(&self) {
        let mut lifelines = self.lifelines();
        let candidate = std::mem::take(&mut lifelines.candidate);
        if let Some(lifeline) = candidate.upgrade().or(lifelines.current.upgrade()) {
            lifeline.cut_off();
        }
    }

    /// This may become the connection.
    pub(super) fn considers(&self, session: &Session) {
        self.lifelines().candidate = session.lifeline();
    }

    /// From now on this is the connection.
    pub(super) fn connected_by(&self, session: &mut Session) {
        session.established();
        *self.lifelines() = Lifelines {
            current: session.lifeline(),
            ..Default::default()
        };
        self.counts
            .tracked
            .store(session.is_tracked(), Ordering::Relaxed);
    }
}

/// Opens the connection; a path may be served by nobody until `deadline`.
fn open_endpoint(spec: &DeviceSpec, deadline: Instant) -> Result<UnixStream, Error> {
    let error = |what: &str, e: std::io::Error| Error::device(&spec.id, what, e);
    match &spec.endpoint {
        Endpoint::Fd(fd) => outrigger_cli::fd::inherit(*fd)
            .map(UnixStream::from)
            .map_err(|e| error(&format!("fd {fd}"), e)),
        Endpoint::Path(path) => outrigger_cli::socket::connect(path, Some(deadline))
            .map_err(|e| error(&format!("connecting to {}", path.display()), e)),
    }
}

/// A connected slot whose thread has not started.
pub struct Pending {
    slot: Arc<Slot>,
    session: Session,
    info: DeviceInfo,
    messages: Receiver<Message>,
    watchdog: Arc<Watchdog>,
}

impl Pending {
    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The slot.
    pub fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    /// Starts the thread that serves `device`.
    ///
    /// # Errors
    /// When there are no threads left.
    pub fn run(
        self,
        device: Arc<VirtioPci>,
        ram: Arc<Ram>,
        on_loss: Option<OnLoss>,
        notices: impl Fn(Notice) + Send + 'static,
    ) -> Result<Arc<Slot>, Error> {
        // Set once, here.
        let _ = self.slot.device.set(Arc::clone(&device));
        let slot = Arc::clone(&self.slot);
        let thread = Thread::new(
            (self.slot, self.messages, self.watchdog),
            (self.session, self.info),
            device,
            ram,
            on_loss,
            Box::new(notices),
        );
        std::thread::Builder::new()
            .name(format!("slot-{}", slot.id()))
            .spawn(move || thread.run())
            .map_err(Error::io("starting a slot's thread"))?;
        Ok(slot)
    }
}

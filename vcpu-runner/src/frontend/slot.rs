//! A device's slot: what state it is in, and the thread that changes it.

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use outrigger_protocol::control::{DeviceStatus, SlotState};
use rustix::event::{PollFd, PollFlags, poll};
use vhost::VhostUserMemoryRegionInfo;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::session::{QueueStart, Session};
use super::spec::{DeviceSpec, Endpoint};
use super::watchdog::Watchdog;
use crate::pci::virtio::backend::{Backend, QueueSetup, Request};
use crate::pci::virtio::{DeviceInfo, VirtioPci};
use crate::{Error, eventfd};

/// How long a socket's path may be served by nobody at the start.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// What a slot tells the machine.
#[derive(Clone, Debug)]
pub enum Notice {
    /// The driver took the device into use with so many queues.
    DriverOk(String, usize),
    /// The process is gone or misbehaves.
    Lost(String, String),
}

enum Message {
    Request(Request),
    /// Stop the queues where they are; answered when they stand still.
    Pause(Sender<()>),
    /// Go on after a pause.
    Resume(Sender<()>),
    /// Stop the queues for a reset of the machine.
    Stop(Sender<()>),
}

/// The part of a slot that others hold.
pub struct Slot {
    spec: DeviceSpec,
    mailbox: Sender<Message>,
    wake: EventFd,
    state: AtomicU8,
    active: AtomicUsize,
    device: OnceLock<Arc<VirtioPci>>,
    socket: UnixStream,
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

/// Turns states into a byte and back.
const STATES: [SlotState; 5] = [
    SlotState::Absent,
    SlotState::Connecting,
    SlotState::Running,
    SlotState::Paused,
    SlotState::Lost,
];

impl Slot {
    /// Connects to the device's process and shakes hands; the slot's thread
    /// starts with [`Pending::run`].
    ///
    /// # Errors
    /// Names the device and the step that failed.
    pub fn connect(spec: DeviceSpec, watchdog: &Arc<Watchdog>) -> Result<Pending, Error> {
        let socket = open_endpoint(&spec)?;
        let (session, info) = Session::connect(&spec, socket, watchdog)?;
        let (mailbox, messages) = unbounded();
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::io("eventfd"))?;
        let slot = Arc::new(Slot {
            spec,
            mailbox,
            wake,
            state: AtomicU8::new(0),
            active: AtomicUsize::new(0),
            device: OnceLock::new(),
            socket: session
                .socket()
                .try_clone()
                .map_err(Error::io("duplicating a socket"))?,
        });
        slot.set_state(SlotState::Running);
        Ok(Pending {
            slot,
            session,
            info,
            messages,
        })
    }

    fn set_state(&self, state: SlotState) {
        let code = STATES.iter().position(|&s| s == state).unwrap_or(0);
        self.state.store(code as u8, Ordering::Release);
    }

    /// The slot's state.
    pub fn state(&self) -> SlotState {
        STATES[usize::from(self.state.load(Ordering::Acquire))]
    }

    /// The device's name.
    pub fn id(&self) -> &str {
        &self.spec.id
    }

    /// For the control socket.
    pub fn status(&self) -> DeviceStatus {
        DeviceStatus {
            id: self.spec.id.clone(),
            virtio_id: self.spec.virtio_id,
            state: self.state(),
            driver_ok: self.device.get().is_some_and(|device| device.is_live()),
            active_queues: self.active.load(Ordering::Relaxed),
            tracked: false,
            losses: 0,
            swaps: 0,
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

    /// Ends the connection, and with it whatever waits for the process.
    pub fn cut_off(&self) {
        // An error means that it is gone already.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Stops the queues for a reset of the whole machine.
    pub fn stop(&self) -> Receiver<()> {
        self.order(Message::Stop)
    }
}

/// Opens the connection; a path may take a moment to be served.
fn open_endpoint(spec: &DeviceSpec) -> Result<UnixStream, Error> {
    let error = |what: &str, e: std::io::Error| Error::device(&spec.id, what, e);
    match &spec.endpoint {
        Endpoint::Fd(fd) => outrigger_cli::fd::inherit(*fd)
            .map(UnixStream::from)
            .map_err(|e| error(&format!("fd {fd}"), e)),
        Endpoint::Path(path) => {
            let deadline = Some(Instant::now() + CONNECT_DEADLINE);
            outrigger_cli::socket::connect(path, deadline)
                .map_err(|e| error(&format!("connecting to {}", path.display()), e))
        }
    }
}

/// A connected slot whose thread has not started.
pub struct Pending {
    slot: Arc<Slot>,
    session: Session,
    info: DeviceInfo,
    messages: Receiver<Message>,
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
        memory: Vec<VhostUserMemoryRegionInfo>,
        notices: impl Fn(Notice) + Send + 'static,
    ) -> Result<Arc<Slot>, Error> {
        // Set once, here.
        let _ = self.slot.device.set(Arc::clone(&device));
        let slot = Arc::clone(&self.slot);
        let thread = Thread {
            slot: self.slot,
            session: Some(self.session),
            messages: self.messages,
            device,
            memory,
            features: 0,
            active: Vec::new(),
            paused: false,
            notices: Box::new(notices),
        };
        std::thread::Builder::new()
            .name(format!("slot-{}", slot.id()))
            .spawn(move || thread.run())
            .map_err(Error::io("starting a slot's thread"))?;
        Ok(slot)
    }
}

/// A queue that runs, or will run again after a pause.
struct Active {
    setup: QueueSetup,
    base: u16,
}

struct Thread {
    slot: Arc<Slot>,
    /// `None` once the process is lost.
    session: Option<Session>,
    messages: Receiver<Message>,
    device: Arc<VirtioPci>,
    memory: Vec<VhostUserMemoryRegionInfo>,
    features: u64,
    active: Vec<Active>,
    paused: bool,
    notices: Box<dyn Fn(Notice) + Send>,
}

impl Thread {
    fn run(mut self) {
        loop {
            if let Err(error) = self.wait_and_serve() {
                self.lose(&error);
            }
        }
    }

    /// The process is lost: its queues are no more, and whoever waits for it
    /// gets an answer.
    fn lose(&mut self, error: &Error) {
        self.session = None;
        self.active.clear();
        self.slot.active.store(0, Ordering::Relaxed);
        self.slot.set_state(SlotState::Lost);
        self.device.failed();
        // There may be more in the mailbox, and somebody waits for it.
        let _ = self.slot.wake.write(1);
        (self.notices)(Notice::Lost(self.slot.id().to_owned(), error.to_string()));
    }

    fn wait_and_serve(&mut self) -> Result<(), Error> {
        let io = |e: rustix::io::Errno| Error::io("poll")(e.into());
        let wake = eventfd::borrow(&self.slot.wake);
        let mut fds = vec![PollFd::from_borrowed_fd(wake, PollFlags::IN)];
        if let Some(session) = &self.session {
            fds.push(PollFd::new(session.socket(), PollFlags::IN));
            if let Some(channel) = session.channel() {
                // SAFETY: the channel lives as long as the session.
                let channel = unsafe { BorrowedFd::borrow_raw(channel) };
                fds.push(PollFd::from_borrowed_fd(channel, PollFlags::IN));
            }
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(io(e)),
        }
        let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        let (gone, announced) = (ready(1), ready(2));
        if gone && let Some(error) = self.session.as_ref().and_then(Session::unasked) {
            return Err(error);
        }
        // EAGAIN: woken by something else.
        let _ = self.slot.wake.read();
        while let Ok(message) = self.messages.try_recv() {
            self.handle(message)?;
        }
        if announced
            && let Some(session) = &mut self.session
            && session.handle_channel()?
        {
            let config = session.read_config()?;
            self.device.set_config(config);
        }
        Ok(())
    }

    fn handle(&mut self, message: Message) -> Result<(), Error> {
        match message {
            Message::Request(request) => self.request(request),
            Message::Pause(done) => {
                let result = self.pause();
                // Nobody waits any more if it took too long.
                let _ = done.send(());
                result
            }
            Message::Resume(done) => {
                let result = self.resume();
                let _ = done.send(());
                result
            }
            Message::Stop(done) => {
                let result = self.stop_all();
                self.paused = false;
                if self.session.is_some() {
                    self.slot.set_state(SlotState::Running);
                }
                let _ = done.send(());
                result
            }
        }
    }

    fn request(&mut self, request: Request) -> Result<(), Error> {
        match request {
            Request::Start { features, queues } => {
                let result = self.start(features, queues);
                self.fail_refused(result)
            }
            Request::StartQueue(setup) => {
                self.active.push(Active { setup, base: 0 });
                let result = self.start_from(self.active.len() - 1);
                self.fail_refused(result)
            }
            Request::StopQueue(index) => {
                let result = self.stop_queue(index);
                self.device.queue_stopped(index);
                result
            }
            Request::Stop => {
                let result = self.stop_all();
                self.device.stopped();
                result
            }
            Request::WriteConfig { offset, data } => {
                let Some(session) = &mut self.session else {
                    return Ok(());
                };
                let written = session.write_config(offset, &data);
                if let Err(error) = written {
                    // The driver wrote what the device does not take.
                    tracing::debug!("{error}");
                }
                let config = session.read_config()?;
                self.device.set_config(config);
                Ok(())
            }
        }
    }

    /// What the driver set up cannot be: that is between it and its device, which
    /// needs a reset now (virtio 1.2 section 2.1.2). The process goes on.
    fn fail_refused(&mut self, result: Result<(), Error>) -> Result<(), Error> {
        let Err(error @ Error::Refused { .. }) = result else {
            return result;
        };
        tracing::warn!("{error}");
        self.device.failed();
        self.stop_all()
    }

    /// Whether the rings of `setup` are aligned and lie in guest memory (virtio
    /// 1.2 section 2.7).
    fn is_placed(&self, setup: &QueueSetup) -> bool {
        let size = u64::from(setup.size);
        let areas = [
            (setup.descriptors, 16 * size, 16),
            (setup.driver, 6 + 2 * size, 2),
            (setup.device, 6 + 8 * size, 4),
        ];
        areas.iter().all(|&(start, length, alignment)| {
            start.is_multiple_of(alignment)
                && self.memory.iter().any(|region| {
                    let end = region.guest_phys_addr + region.memory_size;
                    start >= region.guest_phys_addr
                        && start.checked_add(length).is_some_and(|last| last <= end)
                })
        })
    }

    fn start(&mut self, features: u64, queues: Vec<QueueSetup>) -> Result<(), Error> {
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        session.prepare(features, &self.memory)?;
        self.features = features;
        self.active = queues
            .into_iter()
            .map(|setup| Active { setup, base: 0 })
            .collect();
        let count = self.active.len();
        self.start_from(0)?;
        (self.notices)(Notice::DriverOk(self.slot.id().to_owned(), count));
        Ok(())
    }

    /// Starts the queues from number `first` of the active ones on, unless the
    /// machine is paused: then they start with it.
    fn start_from(&mut self, first: usize) -> Result<(), Error> {
        self.slot.active.store(self.active.len(), Ordering::Relaxed);
        let starting = &self.active[first..];
        if let Some(bad) = starting.iter().find(|a| !self.is_placed(&a.setup)) {
            let refused = Error::Refused {
                id: self.slot.id().to_owned(),
                operation: format!("queue {}: rings outside memory", bad.setup.index),
            };
            // None of them was started.
            self.active.truncate(first);
            return Err(refused);
        }
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        if self.paused {
            return Ok(());
        }
        for active in &self.active[first..] {
            let index = active.setup.index;
            let (Some(kick), Some(call)) = (self.device.kick(index), self.device.call(index))
            else {
                continue;
            };
            session.start_queue(&QueueStart {
                setup: active.setup,
                base: active.base,
                kick,
                call,
            })?;
        }
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> Result<(), Error> {
        let Some(at) = self.active.iter().position(|a| a.setup.index == index) else {
            return Ok(());
        };
        self.active.remove(at);
        self.slot.active.store(self.active.len(), Ordering::Relaxed);
        match &mut self.session {
            Some(session) if !self.paused => session.stop_queue(index).map(|_| ()),
            _ => Ok(()),
        }
    }

    fn stop_all(&mut self) -> Result<(), Error> {
        while let Some(active) = self.active.last() {
            self.stop_queue(active.setup.index)?;
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Error> {
        if self.paused {
            return Ok(());
        }
        self.paused = true;
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        self.slot.set_state(SlotState::Paused);
        for active in &mut self.active {
            active.base = session.stop_queue(active.setup.index)?;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        if !self.paused {
            return Ok(());
        }
        self.paused = false;
        if self.session.is_some() {
            self.slot.set_state(SlotState::Running);
        }
        self.start_from(0)
    }
}

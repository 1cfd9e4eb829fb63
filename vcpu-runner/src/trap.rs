//! The runner's end of the trap channel (layout and rules in
//! `outrigger_protocol::trap`): vCPU threads put accesses into their slots and
//! wait for answers; one thread keeps the connection to the platform process and,
//! when that dies, connects to its successor. The region outlives them all.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use memfd::{FileSeal, MemfdOptions};
use outrigger_cli::socket::socket_path;
use outrigger_protocol::channel;
use outrigger_protocol::trap::{
    Access, FromPlatform, MAGIC, MAX_VCPUS, REGION_SIZE, SLOTS_OFFSET, ToPlatform, TrapHeader,
    TrapSlot, VERSION,
};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::thread::futex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::frontend::spec::Endpoint;
use crate::layout::IOAPIC_PINS;
use crate::vcpu::state::Control;
use crate::vm::irq::{Gsi, Interrupts};
use crate::{Error, eventfd};

/// How long a vCPU looks for an answer before it sleeps, if the platform is awake:
/// then it answers within microseconds, and being woken costs tens of them. If it
/// sleeps, looking would only keep its CPU busy.
const SPIN: Duration = Duration::from_micros(50);
/// How often a lost platform's socket is tried again.
const RETRY: Duration = Duration::from_millis(5);
/// How long a platform may take for its handshake and for a reset.
const DEADLINE: Duration = Duration::from_secs(5);

/// What the platform tells the machine.
#[derive(Clone, Debug)]
pub enum Notice {
    /// Connected for the first time, or again after so long.
    Connected(Option<Duration>),
    /// The connection is gone; `true`: for good.
    Lost(String, bool),
    /// The guest switched its power off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest wrote to the exit port.
    Exit(u8),
}

/// `--platform socket=PATH|fd=N`.
///
/// # Errors
/// What is wrong with the option.
pub fn parse_endpoint(text: &str) -> Result<Endpoint, String> {
    match text.split_once('=') {
        Some(("socket", path)) => Ok(Endpoint::Path(socket_path(path.into())?)),
        Some(("fd", fd)) => fd
            .parse::<RawFd>()
            .ok()
            .filter(|&fd| fd >= 0)
            .map(Endpoint::Fd)
            .ok_or_else(|| format!("fd={fd} is not a number")),
        _ => Err("socket=PATH or fd=N is missing".into()),
    }
}

/// The shared region, mapped.
struct Region {
    fd: OwnedFd,
    start: *mut u8,
}

// SAFETY: the mapping is never unmapped, and all access to it is through the
// atomics of `TrapHeader` and `TrapSlot`.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn new() -> Result<Self, Error> {
        let error = |why: String| Error::Platform {
            operation: "shared region",
            why,
        };
        let memfd = MemfdOptions::default()
            .allow_sealing(true)
            .close_on_exec(true)
            .create("outrigger-trap")
            .map_err(|e| error(e.to_string()))?;
        memfd
            .as_file()
            .set_len(REGION_SIZE as u64)
            .map_err(|e| error(e.to_string()))?;
        for seal in [FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal] {
            memfd.add_seal(seal).map_err(|e| error(e.to_string()))?;
        }
        let fd = OwnedFd::from(memfd.into_file());
        // SAFETY: a new shared mapping wherever the kernel likes.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                REGION_SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }
        .map_err(|e| error(e.to_string()))?;
        Ok(Region {
            fd,
            start: start.cast(),
        })
    }

    fn header(&self) -> &TrapHeader {
        // SAFETY: the region begins with a header, page-aligned, and stays mapped.
        unsafe { &*self.start.cast::<TrapHeader>() }
    }

    /// The slot of `vcpu`, which is less than [`MAX_VCPUS`].
    fn slot(&self, vcpu: usize) -> &TrapSlot {
        debug_assert!(vcpu < MAX_VCPUS);
        // SAFETY: the slots lie within the region and stay mapped.
        unsafe { &*self.start.add(SLOTS_OFFSET).cast::<TrapSlot>().add(vcpu) }
    }
}

/// The channel.
pub struct TrapChannel {
    region: Region,
    doorbell: EventFd,
    vcpus: usize,
    /// No platform will ever come again: accesses are answered as if there were
    /// none.
    dead: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    stream: Option<UnixStream>,
    /// Interrupt lines, made when a platform first asked for them.
    lines: BTreeMap<Gsi, EventFd>,
    /// Whoever waits for a reset to be done.
    reset: Option<Sender<()>>,
    /// A reset that the next platform must be told of.
    reset_owed: bool,
}

impl TrapChannel {
    /// A channel for `vcpus` vCPUs, not connected.
    ///
    /// # Errors
    /// When there is no memory or no descriptor left.
    pub fn new(vcpus: usize) -> Result<Arc<Self>, Error> {
        let region = Region::new()?;
        let header = region.header();
        header.version.store(VERSION, Ordering::Relaxed);
        header.vcpus.store(vcpus as u32, Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
        Ok(Arc::new(TrapChannel {
            region,
            doorbell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::io("eventfd"))?,
            vcpus,
            dead: AtomicBool::new(false),
            state: Mutex::default(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // vCPU threads ---------------------------------------------------------------

    /// Carries out a read and returns the value; `None` when there is nobody to
    /// answer, or when the vCPU must give up because of an order.
    pub fn read(&self, vcpu: usize, control: &Control, access: &Access) -> Option<u64> {
        let slot = self.region.slot(vcpu);
        if !self.wait(slot, control) {
            return None;
        }
        self.publish(slot, access);
        self.wait(slot, control).then(|| slot.answer())
    }

    /// Posts a write. Waits only for the access before it.
    pub fn write(&self, vcpu: usize, control: &Control, access: &Access) {
        let slot = self.region.slot(vcpu);
        if self.wait(slot, control) {
            self.publish(slot, access);
        }
    }

    fn publish(&self, slot: &TrapSlot, access: &Access) {
        let header = self.region.header();
        slot.publish(header, access);
        if header.asleep.load(Ordering::Relaxed) != 0 {
            eventfd::signal(&self.doorbell);
        }
    }

    /// Waits for the slot's request to be done, looking first. The vCPU can be told to stand
    /// still meanwhile and goes on waiting afterwards.
    fn wait(&self, slot: &TrapSlot, control: &Control) -> bool {
        let start = Instant::now();
        let header = self.region.header();
        while !slot.is_done() {
            if header.asleep.load(Ordering::Relaxed) != 0 || start.elapsed() >= SPIN {
                return self.sleep(slot, control);
            }
            std::hint::spin_loop();
        }
        true
    }

    fn sleep(&self, slot: &TrapSlot, control: &Control) -> bool {
        loop {
            let (word, seen) = slot.prepare_wait();
            if slot.is_done() {
                slot.finish_wait();
                return true;
            }
            if self.dead.load(Ordering::Relaxed) {
                slot.finish_wait();
                return false;
            }
            if control.is_interrupted() {
                slot.finish_wait();
                if !control.hold() {
                    return false;
                }
                continue;
            }
            // A kick is a signal (EINTR) sent after the order was left, and
            // whoever orders also changes the word: see `kick`.
            let _ = futex::wait(word, futex::Flags::empty(), seen, None);
            slot.finish_wait();
        }
    }

    /// Wakes a vCPU that waits for an answer, so that it looks at its orders.
    pub fn kick(&self, vcpu: usize) {
        if let Some(word) = self.region.slot(vcpu).bump() {
            wake(word);
        }
    }

    // The machine ------------------------------------------------------------------

    /// Tells the platform that the machine was reset and waits until its
    /// registers are back at their start values. A platform that is away is told
    /// when it comes back.
    pub fn reset(&self) {
        let done = {
            let mut state = self.lock();
            state.reset_owed = true;
            self.send_owed_reset(&mut state)
        };
        if let Some(done) = done
            && done.recv_timeout(DEADLINE).is_err()
        {
            tracing::warn!("platform: no answer to a reset in {DEADLINE:?}");
        }
    }

    fn send_owed_reset(&self, state: &mut State) -> Option<Receiver<()>> {
        let stream = state.stream.as_ref()?;
        if !std::mem::take(&mut state.reset_owed) {
            return None;
        }
        let (done, wait) = bounded(1);
        // When this fails the connection is gone, and the loss is noticed by the
        // connection's thread.
        if channel::send(stream, &ToPlatform::Reset, &[]).is_err() {
            state.reset_owed = true;
            return None;
        }
        state.reset = Some(done);
        Some(wait)
    }

    /// Starts the thread that keeps the connection and waits for the first
    /// handshake.
    ///
    /// # Errors
    /// When that fails or takes too long.
    pub fn start(
        self: &Arc<Self>,
        endpoint: Endpoint,
        interrupts: Arc<dyn Interrupts>,
        notices: impl Fn(Notice) + Send + 'static,
    ) -> Result<(), Error> {
        let error = |why: String| Error::Platform {
            operation: "connecting",
            why,
        };
        let stream = open(&endpoint, Some(Instant::now() + DEADLINE)).map_err(error)?;
        self.shake_hands(&stream, &*interrupts).map_err(error)?;
        let this = Arc::clone(self);
        std::thread::Builder::new()
            .name("platform".into())
            .spawn(move || {
                let mut connected = Some(stream);
                let mut lost_at: Option<Instant> = None;
                loop {
                    if let Some(stream) = connected.take() {
                        notices(Notice::Connected(lost_at.map(|at| at.elapsed())));
                        let why = this.serve(stream, &notices);
                        lost_at = Some(Instant::now());
                        let for_good = matches!(endpoint, Endpoint::Fd(_));
                        if for_good {
                            this.give_up();
                        }
                        notices(Notice::Lost(why, for_good));
                        if for_good {
                            return;
                        }
                    }
                    match open(&endpoint, None)
                        .and_then(|stream| this.shake_hands(&stream, &*interrupts).map(|()| stream))
                    {
                        Ok(stream) => connected = Some(stream),
                        Err(error) => {
                            tracing::debug!("platform: {error}");
                            std::thread::sleep(RETRY);
                        }
                    }
                }
            })
            .map_err(Error::io("starting the platform thread"))?;
        Ok(())
    }

    /// From now on accesses are answered as if there had never been a platform.
    fn give_up(&self) {
        self.dead.store(true, Ordering::Relaxed);
        for vcpu in 0..self.vcpus {
            self.kick(vcpu);
        }
    }

    fn shake_hands(&self, stream: &UnixStream, interrupts: &dyn Interrupts) -> Result<(), String> {
        let text = |e: std::io::Error| e.to_string();
        stream.set_read_timeout(Some(DEADLINE)).map_err(text)?;
        let hello = ToPlatform::Hello {
            version: VERSION,
            vcpus: self.vcpus as u32,
        };
        let fds = [self.region.fd.as_raw_fd(), self.doorbell.as_raw_fd()];
        channel::send(stream, &hello, &fds).map_err(text)?;
        let (answer, _) = channel::receive::<FromPlatform>(stream).map_err(text)?;
        let FromPlatform::Lines { gsis } = answer else {
            return Err(format!("answered {answer:?} to a greeting"));
        };
        if let Some(gsi) = gsis.iter().find(|&&gsi| gsi >= IOAPIC_PINS) {
            return Err(format!(
                "asks for interrupt line {gsi}, which does not exist"
            ));
        }
        if gsis.len() > IOAPIC_PINS as usize {
            return Err("asks for too many interrupt lines".into());
        }
        let mut state = self.lock();
        for &gsi in &gsis {
            if let std::collections::btree_map::Entry::Vacant(place) = state.lines.entry(gsi) {
                let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(text)?;
                interrupts.attach(&fd, gsi).map_err(|e| e.to_string())?;
                place.insert(fd);
            }
        }
        let fds: Vec<RawFd> = gsis
            .iter()
            .map(|gsi| state.lines[gsi].as_raw_fd())
            .collect();
        channel::send(stream, &ToPlatform::Lines, &fds).map_err(text)?;
        stream.set_read_timeout(None).map_err(text)?;
        state.stream = Some(stream.try_clone().map_err(text)?);
        self.send_owed_reset(&mut state);
        Ok(())
    }

    /// Takes messages until the connection ends; returns why it did.
    fn serve(&self, stream: UnixStream, notices: &impl Fn(Notice)) -> String {
        let why = loop {
            match channel::receive::<FromPlatform>(&stream) {
                Ok((FromPlatform::PowerOff, _)) => notices(Notice::PowerOff),
                Ok((FromPlatform::ResetRequest, _)) => notices(Notice::Reset),
                Ok((FromPlatform::Exit { code }, _)) => notices(Notice::Exit(code)),
                Ok((FromPlatform::ResetDone, _)) => {
                    if let Some(done) = self.lock().reset.take() {
                        // Nobody waits any more if it took too long.
                        let _ = done.send(());
                    }
                }
                Ok((FromPlatform::Lines { .. }, _)) => break "greeted twice".to_string(),
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                    break "the process has left".to_string();
                }
                Err(e) => break e.to_string(),
            }
        };
        let mut state = self.lock();
        state.stream = None;
        if state.reset.take().is_some() {
            state.reset_owed = true;
        }
        why
    }
}

fn wake(word: &AtomicU32) {
    // No sleeper is no error.
    let _ = futex::wake(word, futex::Flags::empty(), 1);
}

/// Connects. With a deadline, tries until then; without, once.
fn open(endpoint: &Endpoint, deadline: Option<Instant>) -> Result<UnixStream, String> {
    match endpoint {
        // Opened once: a lost inherited connection is not opened again.
        Endpoint::Fd(fd) => outrigger_cli::fd::inherit(*fd)
            .map(UnixStream::from)
            .map_err(|e| format!("fd {fd}: {e}")),
        Endpoint::Path(path) => outrigger_cli::socket::connect(path, deadline)
            .map_err(|e| format!("{}: {e}", path.display())),
    }
}

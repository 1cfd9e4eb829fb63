//! The runner's end of the trap channel, over which the platform process emulates the
//! accesses that no PCI device handles. Layout and rules are in `outrigger_protocol::trap`.
//!
//! A vCPU thread puts an access into its slot and waits for the reply. One more thread
//! keeps the connection to the platform process, and connects again when it is lost. The
//! shared region outlives every platform process.
//!
//! The channel resembles Xen's ioreq page (`public/hvm/ioreq.h`) and that of ACRN (the HSM
//! ioreq buffer): one slot for each vCPU in a shared page. It differs in that writes are
//! posted, and that a slot can be answered by the successor of the process that took it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use memfd::{FileSeal, MemfdOptions};
use outrigger_cli::logging::DEVICE_SPAN;
use outrigger_protocol::channel;
use outrigger_protocol::trap::{
    Access, FromPlatform, MAGIC, MAX_VCPUS, REGION_SIZE, SLOTS_OFFSET, ToPlatform, TrapHeader,
    TrapSlot, VERSION,
};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::thread::futex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::endpoint::Endpoint;
use crate::layout::IOAPIC_PINS;
use crate::vcpu::handle::VcpuHandle;
use crate::vm::irq::{Gsi, IrqRouting};
use crate::{Error, eventfd};

/// How long a vCPU polls for a reply before it sleeps, if the platform is awake: that
/// replies within microseconds, and waking a vCPU takes tens of them. While the platform
/// sleeps, polling would only keep the CPU from it.
const SPIN: Duration = Duration::from_micros(50);
/// How often the runner tries to connect to a lost platform again.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(5);
/// How long a platform may take for its handshake, and for a reset.
const DEADLINE: Duration = Duration::from_secs(5);

/// What the platform connection tells the machine.
#[derive(Clone, Debug)]
pub enum PlatformChannelEvent {
    /// Connected. `outage`: the time since the connection was lost, if it was.
    Connected {
        /// See above.
        outage: Option<Duration>,
    },
    /// The connection is lost.
    Lost {
        /// Why.
        reason: String,
        /// It was an inherited descriptor, so it cannot come back.
        for_good: bool,
    },
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest wrote this to the exit port.
    Exit(u8),
}

/// The shared region, mapped.
struct SharedRegion {
    fd: OwnedFd,
    start: *mut u8,
}

// SAFETY: the mapping is never unmapped, and all accesses to it are through the atomics of
// `TrapHeader` and `TrapSlot`.
unsafe impl Send for SharedRegion {}
// SAFETY: as above.
unsafe impl Sync for SharedRegion {}

impl SharedRegion {
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
        // SAFETY: a new shared mapping, at an address that the kernel chooses.
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
        Ok(SharedRegion {
            fd,
            start: start.cast(),
        })
    }

    fn header(&self) -> &TrapHeader {
        // SAFETY: the region begins with a header, is page-aligned, and stays mapped.
        unsafe { &*self.start.cast::<TrapHeader>() }
    }

    /// The slot of `vcpu`, which is less than [`MAX_VCPUS`].
    fn slot(&self, vcpu: usize) -> &TrapSlot {
        debug_assert!(vcpu < MAX_VCPUS);
        // SAFETY: the slots lie within the region, are aligned, and stay mapped.
        unsafe { &*self.start.add(SLOTS_OFFSET).cast::<TrapSlot>().add(vcpu) }
    }
}

/// The channel.
pub struct TrapChannel {
    region: SharedRegion,
    doorbell: EventFd,
    vcpus: usize,
    /// The platform is lost for good: accesses are handled as if there were none.
    closed: AtomicBool,
    connection: Mutex<PlatformConnection>,
}

#[derive(Default)]
struct PlatformConnection {
    stream: Option<UnixStream>,
    /// Interrupt lines, created when a platform first asks for them.
    lines: BTreeMap<Gsi, EventFd>,
    /// Confirms to a waiting thread that a reset is done.
    reset_done: Option<Sender<()>>,
    /// A reset of which no platform has been told.
    reset_due: bool,
}

impl TrapChannel {
    /// A channel for `vcpus` vCPUs, not connected.
    ///
    /// # Errors
    /// When the shared region or the doorbell cannot be created.
    pub fn new(vcpus: usize) -> Result<Arc<Self>, Error> {
        let region = SharedRegion::new()?;
        let header = region.header();
        header.version.store(VERSION, Ordering::Relaxed);
        header.vcpus.store(vcpus as u32, Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
        Ok(Arc::new(TrapChannel {
            region,
            doorbell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::io("eventfd"))?,
            vcpus,
            closed: AtomicBool::new(false),
            connection: Mutex::default(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, PlatformConnection> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    // For vCPU threads.

    /// Carries out a read and returns the value; `None` when the platform is lost for good
    /// or the vCPU has to give the access up because of a command.
    pub fn read(&self, vcpu: usize, handle: &VcpuHandle, access: &Access) -> Option<u64> {
        let slot = self.region.slot(vcpu);
        if !self.wait(slot, handle) {
            return None;
        }
        self.publish(slot, access);
        self.wait(slot, handle).then(|| slot.answer())
    }

    /// Posts a write. It waits only for the access before it.
    pub fn write(&self, vcpu: usize, handle: &VcpuHandle, access: &Access) {
        let slot = self.region.slot(vcpu);
        if self.wait(slot, handle) {
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

    /// Waits until the request in `slot` is done: polls first, then sleeps. The vCPU can be
    /// parked meanwhile, and continues to wait afterwards.
    fn wait(&self, slot: &TrapSlot, handle: &VcpuHandle) -> bool {
        let start = Instant::now();
        let header = self.region.header();
        while !slot.is_done() {
            if header.asleep.load(Ordering::Relaxed) != 0 || start.elapsed() >= SPIN {
                return self.sleep(slot, handle);
            }
            std::hint::spin_loop();
        }
        true
    }

    fn sleep(&self, slot: &TrapSlot, handle: &VcpuHandle) -> bool {
        loop {
            let (word, seen) = slot.prepare_wait();
            if slot.is_done() {
                slot.finish_wait();
                return true;
            }
            if self.closed.load(Ordering::Relaxed) {
                slot.finish_wait();
                return false;
            }
            if handle.is_command_pending() {
                slot.finish_wait();
                if !handle.park_in_access() {
                    return false;
                }
                continue;
            }
            // A command interrupts this by its signal (EINTR), or, if it came before the
            // wait, by the change of the word: see `kick`.
            let _ = futex::wait(word, futex::Flags::empty(), seen, None);
            slot.finish_wait();
        }
    }

    /// Wakes a vCPU that waits for a reply, so that it looks for commands.
    pub fn kick(&self, vcpu: usize) {
        if let Some(word) = self.region.slot(vcpu).bump() {
            // No thread may be waiting any more.
            let _ = futex::wake(word, futex::Flags::empty(), 1);
        }
    }

    // For the machine.

    /// Tells the platform that the machine was reset, and waits until its registers have
    /// their start values. A platform that is lost is told when it comes back.
    pub fn reset(&self) {
        let done = {
            let mut connection = self.lock();
            connection.reset_due = true;
            self.send_due_reset(&mut connection)
        };
        if let Some(done) = done
            && done.recv_timeout(DEADLINE).is_err()
        {
            tracing::warn!(
                device = "platform",
                "no answer to a reset within {DEADLINE:?}"
            );
        }
    }

    fn send_due_reset(&self, connection: &mut PlatformConnection) -> Option<Receiver<()>> {
        let stream = connection.stream.as_ref()?;
        if !std::mem::take(&mut connection.reset_due) {
            return None;
        }
        let (done, confirmation) = bounded(1);
        // If this fails, the connection is lost, and its thread notices.
        if channel::send(stream, &ToPlatform::Reset, &[]).is_err() {
            connection.reset_due = true;
            return None;
        }
        connection.reset_done = Some(done);
        Some(confirmation)
    }

    /// Connects to the platform, performs the handshake, and starts the thread that keeps
    /// the connection.
    ///
    /// # Errors
    /// When the first connection or handshake fails or takes too long.
    pub fn start(
        self: &Arc<Self>,
        endpoint: Endpoint,
        irq_routing: Arc<dyn IrqRouting>,
        events: impl Fn(PlatformChannelEvent) + Send + 'static,
    ) -> Result<(), Error> {
        let error = |why: String| Error::Platform {
            operation: "connecting",
            why,
        };
        let stream = connect(&endpoint, Some(Instant::now() + DEADLINE)).map_err(error)?;
        self.handshake(&stream, &*irq_routing).map_err(error)?;
        let this = Arc::clone(self);
        std::thread::Builder::new()
            .name("platform".into())
            .spawn(move || this.run(stream, &endpoint, &*irq_routing, events))
            .map_err(Error::io("starting the platform thread"))?;
        Ok(())
    }

    /// Keeps the connection, until it is lost for good.
    fn run(
        &self,
        mut stream: UnixStream,
        endpoint: &Endpoint,
        irq_routing: &dyn IrqRouting,
        events: impl Fn(PlatformChannelEvent),
    ) {
        let _span =
            tracing::error_span!(target: DEVICE_SPAN, "platform", device = "platform").entered();
        let mut lost_at: Option<Instant> = None;
        loop {
            let outage = lost_at.map(|at| at.elapsed());
            events(PlatformChannelEvent::Connected { outage });
            let reason = self.receive_messages(stream, &events);
            lost_at = Some(Instant::now());
            let for_good = matches!(endpoint, Endpoint::Fd(_));
            if for_good {
                self.close();
            }
            events(PlatformChannelEvent::Lost { reason, for_good });
            if for_good {
                return;
            }
            stream = self.reconnect(endpoint, irq_routing);
        }
    }

    fn reconnect(&self, endpoint: &Endpoint, irq_routing: &dyn IrqRouting) -> UnixStream {
        loop {
            let connected = connect(endpoint, None)
                .and_then(|stream| self.handshake(&stream, irq_routing).map(|()| stream));
            match connected {
                Ok(stream) => return stream,
                Err(error) => {
                    tracing::debug!(error, "connecting to the platform failed");
                    std::thread::sleep(RECONNECT_INTERVAL);
                }
            }
        }
    }

    /// The platform is lost for good: ends the waits of all vCPUs.
    fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        for vcpu in 0..self.vcpus {
            self.kick(vcpu);
        }
    }

    /// Sends the region and the doorbell; creates the interrupt lines that the platform
    /// asks for.
    fn handshake(&self, stream: &UnixStream, irq_routing: &dyn IrqRouting) -> Result<(), String> {
        let text = |e: std::io::Error| e.to_string();
        stream.set_read_timeout(Some(DEADLINE)).map_err(text)?;
        let hello = ToPlatform::Hello {
            version: VERSION,
            vcpus: self.vcpus as u32,
        };
        let fds = [self.region.fd.as_raw_fd(), self.doorbell.as_raw_fd()];
        channel::send(stream, &hello, &fds).map_err(text)?;
        let (reply, _) = channel::receive::<FromPlatform>(stream).map_err(text)?;
        let FromPlatform::Lines { gsis } = reply else {
            return Err(format!("the platform replies to Hello with {reply:?}"));
        };
        if let Some(gsi) = gsis.iter().find(|&&gsi| gsi >= IOAPIC_PINS) {
            return Err(format!(
                "the platform asks for interrupt line {gsi}, but the last one is {}",
                IOAPIC_PINS - 1
            ));
        }
        if gsis.len() > IOAPIC_PINS as usize {
            return Err(format!(
                "the platform asks for {} interrupt lines, but there are {IOAPIC_PINS}",
                gsis.len()
            ));
        }
        let mut connection = self.lock();
        for &gsi in &gsis {
            if let Entry::Vacant(entry) = connection.lines.entry(gsi) {
                let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(text)?;
                irq_routing
                    .attach_irqfd(&fd, gsi)
                    .map_err(|e| e.to_string())?;
                entry.insert(fd);
            }
        }
        let fds: Vec<RawFd> = gsis
            .iter()
            .map(|gsi| connection.lines[gsi].as_raw_fd())
            .collect();
        channel::send(stream, &ToPlatform::Lines, &fds).map_err(text)?;
        stream.set_read_timeout(None).map_err(text)?;
        connection.stream = Some(stream.try_clone().map_err(text)?);
        self.send_due_reset(&mut connection);
        Ok(())
    }

    /// Receives messages until the connection ends, and closes it: a platform process that
    /// serves one runner at a time accepts the next connection only then. Returns the reason.
    fn receive_messages(
        &self,
        stream: UnixStream,
        events: &impl Fn(PlatformChannelEvent),
    ) -> String {
        let reason = loop {
            match channel::receive::<FromPlatform>(&stream) {
                Ok((FromPlatform::PowerOff, _)) => events(PlatformChannelEvent::PowerOff),
                Ok((FromPlatform::ResetRequest, _)) => events(PlatformChannelEvent::Reset),
                Ok((FromPlatform::Exit { code }, _)) => events(PlatformChannelEvent::Exit(code)),
                Ok((FromPlatform::ResetDone, _)) => {
                    if let Some(done) = self.lock().reset_done.take() {
                        // The other end is closed if its thread waited too long.
                        let _ = done.send(());
                    }
                }
                Ok((FromPlatform::Lines { .. }, _)) => {
                    break "it sent Lines a second time".to_string();
                }
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                    break "the process closed the connection".to_string();
                }
                Err(e) => break e.to_string(),
            }
        };
        let mut connection = self.lock();
        connection.stream = None;
        if connection.reset_done.take().is_some() {
            connection.reset_due = true;
        }
        reason
    }
}

/// Connects. With a deadline, it waits for a process to listen; without, it tries once.
fn connect(endpoint: &Endpoint, deadline: Option<Instant>) -> Result<UnixStream, String> {
    match endpoint {
        // Called once: an inherited connection that is lost does not come back.
        Endpoint::Fd(fd) => outrigger_cli::fd::inherit(*fd)
            .map(UnixStream::from)
            .map_err(|e| format!("fd {fd}: {e}")),
        Endpoint::Path(path) => outrigger_cli::socket::connect(path, deadline)
            .map_err(|e| format!("{}: {e}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::vm::irq::MsiMessage;

    /// Interrupt lines are not used here.
    struct NoIrq;

    impl IrqRouting for NoIrq {
        fn add_route(&self, _: MsiMessage) -> Result<Gsi, Error> {
            Ok(0)
        }
        fn set_route(&self, _: Gsi, _: MsiMessage) -> Result<(), Error> {
            Ok(())
        }
        fn attach_irqfd(&self, _: &EventFd, _: Gsi) -> Result<(), Error> {
            Ok(())
        }
        fn detach_irqfd(&self, _: &EventFd, _: Gsi) -> Result<(), Error> {
            Ok(())
        }
        fn set_line(&self, _: Gsi, _: bool) -> Result<(), Error> {
            Ok(())
        }
        fn add_ioeventfd(&self, _: &EventFd, _: u64) -> Result<(), Error> {
            Ok(())
        }
        fn remove_ioeventfd(&self, _: &EventFd, _: u64) -> Result<(), Error> {
            Ok(())
        }
    }

    /// The platform's side of the handshake.
    fn accept(listener: &UnixListener) -> UnixStream {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        channel::receive::<ToPlatform>(&stream).unwrap();
        send_lines(&stream);
        channel::receive::<ToPlatform>(&stream).unwrap();
        stream
    }

    fn send_lines(stream: &UnixStream) {
        let lines = FromPlatform::Lines { gsis: Vec::new() };
        channel::send(stream, &lines, &[]).unwrap();
    }

    #[test]
    fn a_connection_with_an_invalid_message_is_closed_before_the_next_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let platform = std::thread::spawn(move || {
            let mut first = accept(&listener);
            send_lines(&first);
            // It serves one runner at a time, so it waits for the end of this connection.
            assert_eq!(first.read(&mut [0]).unwrap(), 0);
            accept(&listener)
        });
        let (sender, events) = crossbeam_channel::unbounded();
        let channel = TrapChannel::new(1).unwrap();
        let send = move |event| drop(sender.send(event));
        channel
            .start(Endpoint::Path(path), Arc::new(NoIrq), send)
            .unwrap();
        let connections = events.iter().filter(|event| {
            let PlatformChannelEvent::Connected { outage } = event else {
                return false;
            };
            outage.is_some()
        });
        assert!(connections.take(1).next().is_some());
        platform.join().unwrap();
    }
}

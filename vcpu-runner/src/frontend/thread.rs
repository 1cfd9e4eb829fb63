//! The thread that works for a slot: takes what the driver and the machine ask for
//! and talks to the device's process. Every wait for that has a deadline.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::Receiver;
use outrigger_protocol::control::MachineEvent;
use rustix::event::{PollFd, PollFlags, poll};

use super::loss::Down;
use super::on_loss::OnLoss;
use super::rings::Rings;
use super::session::{DEADLINE, Session};
use super::slot::{Message, Notice, Slot};
use super::spec::DeviceSpec;
use super::state::Step;
use super::watchdog::Watchdog;
use crate::pci::virtio::backend::{QueueSetup, Request};
use crate::pci::virtio::{DeviceInfo, VirtioPci};
use crate::vm::memory::Ram;
use crate::{Error, clock, eventfd};

/// How long a process may take for the requests that it has, before it is stopped.
const DRAIN: Duration = Duration::from_secs(3);

/// The way to a process.
pub(super) enum Link {
    /// There is one.
    Up(Box<Session>),
    /// It is lost, and another is waited for.
    Down(Down),
}

impl Link {
    pub fn session(&mut self) -> Option<&mut Session> {
        match self {
            Link::Up(session) => Some(session),
            Link::Down(_) => None,
        }
    }
}

pub(super) struct Thread {
    pub slot: Arc<Slot>,
    messages: Receiver<Message>,
    pub watchdog: Arc<Watchdog>,
    /// Where its process is now: a swap changes that.
    pub spec: DeviceSpec,
    pub link: Link,
    /// The device as its driver knows it.
    pub info: DeviceInfo,
    pub device: Arc<VirtioPci>,
    pub rings: Rings,
    /// The machine stands still, and so do the rings.
    pub paused: bool,
    pub on_loss: Option<OnLoss>,
    /// The driver waits for these to be told to it: a reset of the device, and of queues.
    stopping: bool,
    stopping_queues: Vec<usize>,
    notices: Box<dyn Fn(Notice) + Send>,
}

impl Thread {
    pub fn new(
        (slot, messages, watchdog): (Arc<Slot>, Receiver<Message>, Arc<Watchdog>),
        (session, info): (Session, DeviceInfo),
        device: Arc<VirtioPci>,
        ram: Arc<Ram>,
        on_loss: Option<OnLoss>,
        notices: Box<dyn Fn(Notice) + Send>,
    ) -> Self {
        let spec = slot.spec.clone();
        Thread {
            on_loss,
            stopping: false,
            stopping_queues: Vec::new(),
            slot,
            messages,
            watchdog,
            spec,
            link: Link::Up(Box::new(session)),
            info,
            rings: Rings::new(Arc::clone(&device), ram),
            device,
            paused: false,
            notices,
        }
    }

    pub fn run(mut self) {
        loop {
            let Err(error) = self.wait_and_serve() else {
                continue;
            };
            if self.link.session().is_none() {
                // It is lost already, so this is our own trouble; not at full speed.
                tracing::error!("{error}");
                std::thread::sleep(DEADLINE);
            }
            self.lose(&error);
        }
    }

    pub fn report(&self, event: MachineEvent) {
        (self.notices)(Notice::Event(event));
    }

    pub fn end(&self, why: String) {
        (self.notices)(Notice::End(why));
    }

    pub fn error(&self, operation: &str, why: impl ToString) -> Error {
        Error::device(self.slot.id(), operation, why)
    }

    /// Waits for something to happen and deals with it.
    ///
    /// # Errors
    /// When the process is lost by it.
    fn wait_and_serve(&mut self) -> Result<(), Error> {
        let wake = eventfd::borrow(&self.slot.wake);
        let mut fds = vec![PollFd::from_borrowed_fd(wake, PollFlags::IN)];
        let mut timeout = None;
        match &self.link {
            Link::Up(session) => {
                fds.push(PollFd::new(session.socket(), PollFlags::IN));
                if let Some(channel) = session.channel() {
                    // SAFETY: the channel lives as long as the session.
                    let channel = unsafe { BorrowedFd::borrow_raw(channel) };
                    fds.push(PollFd::from_borrowed_fd(channel, PollFlags::IN));
                }
            }
            Link::Down(down) => {
                fds.extend(down.watched());
                timeout = down.wakes_at().map(clock::until);
            }
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::io("poll")(e.into())),
        }
        let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        let (called, announced) = (ready(1), ready(2));
        // First what was polled for: a message may put another process there.
        match &mut self.link {
            Link::Up(session) => {
                if called && let Some(error) = session.unasked() {
                    return Err(error);
                }
                if announced && session.handle_channel()? {
                    let config = session.read_config()?;
                    self.configured(config);
                }
            }
            Link::Down(_) => self.search(called),
        }
        // EAGAIN: woken by something else.
        let _ = self.slot.wake.read();
        while let Ok(message) = self.messages.try_recv() {
            self.handle(message)?;
        }
        Ok(())
    }

    /// This is the device's configuration space now.
    pub fn configured(&mut self, config: Vec<u8>) {
        self.info.config.clone_from(&config);
        self.device.set_config(config);
    }

    fn handle(&mut self, message: Message) -> Result<(), Error> {
        match message {
            Message::Request(request) => self.request(request),
            Message::Pause(done) => {
                let result = self.pause();
                self.lose_if(result);
                // Nobody waits any more if it took too long.
                let _ = done.send(());
                Ok(())
            }
            Message::Resume(done) => {
                let result = self.resume();
                self.lose_if(result);
                let _ = done.send(());
                Ok(())
            }
            Message::Stop(done) => {
                let result = self.clear();
                self.lose_if(result);
                // The whole machine is reset, and its drivers are no more.
                self.stopping = false;
                self.stopping_queues.clear();
                if std::mem::take(&mut self.paused) && self.link.session().is_some() {
                    self.slot.state.take(Step::Resume);
                }
                let _ = done.send(());
                Ok(())
            }
            Message::Swap(path, swapped) => {
                swapped(self.swap(path));
                Ok(())
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
                let result = self.rings.add(setup).and_then(|()| self.start_rings());
                self.fail_refused(result)
            }
            Request::StopQueue(index) => {
                let result = self.rings.remove(index, self.link.session());
                self.count();
                self.stopping_queues.push(index);
                self.lose_if(result);
                Ok(())
            }
            Request::Stop => {
                let result = self.clear();
                self.stopping = true;
                self.lose_if(result);
                Ok(())
            }
            Request::WriteConfig { offset, data } => {
                let Link::Up(session) = &mut self.link else {
                    self.rings.note_written(offset, &data);
                    return Ok(());
                };
                match session.write_config(offset, &data) {
                    // The driver wrote what the device does not take: nor will the next one.
                    Err(error @ Error::Refused { .. }) => tracing::debug!("{error}"),
                    // A process that is gone is found out by the next message.
                    _ => self.rings.note_written(offset, &data),
                }
                let config = session.read_config()?;
                self.configured(config);
                Ok(())
            }
        }
    }

    /// A process that failed at what it was asked is lost. After a stop, only when it is
    /// gone does the driver hear that its memory is its own again.
    fn lose_if(&mut self, result: Result<(), Error>) {
        if let Err(error) = result {
            self.lose(&error);
        }
        self.tell_stopped();
    }

    /// Tells the driver of what it waits for, unless a process that was given up could
    /// write to its memory yet.
    pub fn tell_stopped(&mut self) {
        if !self.slot.is_quiet() {
            return;
        }
        for index in self.stopping_queues.drain(..) {
            self.device.queue_stopped(index);
        }
        if std::mem::take(&mut self.stopping) {
            self.device.stopped();
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
        self.clear()
    }

    fn start(&mut self, features: u64, queues: Vec<QueueSetup>) -> Result<(), Error> {
        // A process may have been swapped for another since the driver read them.
        let missing = features & !self.info.features;
        if missing != 0 {
            return Err(Error::Refused {
                id: self.slot.id().to_owned(),
                operation: format!("features {missing:#x} that are not offered any more"),
            });
        }
        self.rings.set_up(features, queues)?;
        if let Link::Up(session) = &mut self.link {
            let inflight = self.rings.introduce(session, &mut self.info, false)?;
            self.rings.keep(inflight);
        }
        self.start_rings()?;
        self.limit_again();
        self.report(MachineEvent::DriverOk {
            id: self.slot.id().to_owned(),
            queues: self.rings.len(),
        });
        Ok(())
    }

    /// Starts the rings that do not run yet, unless the machine is paused or there is
    /// no process: then they start with it.
    pub fn start_rings(&mut self) -> Result<(), Error> {
        self.count();
        match &mut self.link {
            Link::Up(session) if !self.paused => self.rings.start(session),
            _ => Ok(()),
        }
    }

    /// Tells the control socket how many rings there are.
    fn count(&self) {
        let active = &self.slot.counts.active;
        active.store(self.rings.len(), Ordering::Relaxed);
    }

    /// The driver is no more: neither are its rings.
    fn clear(&mut self) -> Result<(), Error> {
        let result = self.stop_rings();
        self.rings.clear();
        self.count();
        result
    }

    /// Stops the rings; what was taken from them is completed then. The driver waits for
    /// this, or its vCPUs stand still.
    fn stop_rings(&mut self) -> Result<(), Error> {
        if self.leaves_work() {
            // See `Thread::drain`. One that takes its time is stopped all the same.
            self.rings.drain(DRAIN);
        }
        let Link::Up(session) = &mut self.link else {
            return Ok(());
        };
        self.rings.stop(session)?;
        if self.leaves_work() && !self.rings.settle(DEADLINE) {
            let id = self.slot.id();
            tracing::warn!("device {id}: not all of its requests are completed, though it stopped");
        }
        Ok(())
    }

    /// Holds the vCPUs until the process has come to an end of its requests; then it
    /// can be stopped before [`Thread::release`]. Without a table there is no other way:
    /// stopped in the middle of requests, qemu-storage-daemon completes them later, and
    /// fails for good when it wants to tell.
    ///
    /// # Errors
    /// When the vCPUs or the process do not come to that in time.
    pub fn drain(&self) -> Result<(), Error> {
        let (still, stands) = crossbeam_channel::bounded(1);
        (self.notices)(Notice::Hold(still));
        if stands.recv_timeout(DEADLINE).is_err() {
            return Err(self.error("draining", "the vCPUs do not stand still"));
        }
        if !self.rings.drain(DRAIN) {
            let why = "its process does not come to an end of its requests";
            return Err(self.error("draining", why));
        }
        Ok(())
    }

    /// After [`Thread::drain`], whatever came of it: the vCPUs go on.
    pub fn release(&self) {
        (self.notices)(Notice::Release);
    }

    /// Whether there is a process that may say that a ring stands still while it does
    /// not. One that tracks its work is thought to know what it does.
    pub fn leaves_work(&self) -> bool {
        match &self.link {
            Link::Up(session) => self.spec.completes_all() && !session.is_tracked(),
            Link::Down(_) => false,
        }
    }

    fn pause(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.paused, true) || self.link.session().is_none() {
            return Ok(());
        }
        self.slot.state.take(Step::Pause);
        self.stop_rings()
    }

    fn resume(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.paused) || self.link.session().is_none() {
            return Ok(());
        }
        self.slot.state.take(Step::Resume);
        self.start_rings()
    }
}

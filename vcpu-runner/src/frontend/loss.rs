//! A lost process, and the search for its successor. Coming back is one transaction:
//! whatever goes wrong in it, it is tried again from the start, and what it starts
//! from (the used rings, the table of what was in work) is in shared memory.

use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use outrigger_protocol::control::MachineEvent;
use rustix::event::{PollFd, PollFlags, poll};

use super::knock::Knock;
use super::on_loss::OnLoss;
use super::session::Session;
use super::spec::Endpoint;
use super::state::Step;
use super::suit;
use super::thread::{Link, Thread};
use crate::{Error, clock};

/// How often a path is tried: from
const SOONEST: Duration = Duration::from_millis(2);
/// to, the longer the more it was tried.
const LATEST: Duration = Duration::from_millis(250);

/// The state of the search.
pub(super) struct Down {
    since: Instant,
    reason: String,
    /// Connections to processes that are given up, until their ends are closed: only
    /// then is it certain that they touch guest memory no more.
    old: Vec<UnixStream>,
    /// Somebody was asked.
    knock: Option<Knock>,
    /// When to ask next, and how long to wait after that.
    next: Instant,
    pause: Duration,
    /// When `--on-loss` says that it has been long enough.
    limit: Option<Instant>,
    /// What was reported: that somebody came, and why the last one did not do.
    reconnecting: bool,
    refused: Option<String>,
}

impl Down {
    fn new(reason: String, limit: Option<Duration>) -> Self {
        let now = Instant::now();
        Down {
            since: now,
            reason,
            old: Vec::new(),
            knock: None,
            next: now,
            pause: SOONEST,
            limit: limit.map(|limit| now + limit),
            reconnecting: false,
            refused: None,
        }
    }

    /// What to poll.
    pub fn watched(&self) -> Option<PollFd<'_>> {
        match (self.old.first(), &self.knock) {
            // A hang-up is always told.
            (Some(old), _) => Some(PollFd::new(old, PollFlags::empty())),
            (None, Some(knock)) => Some(PollFd::new(knock.socket(), PollFlags::IN)),
            (None, None) => None,
        }
    }

    /// When to look without being called.
    pub fn wakes_at(&self) -> Option<Instant> {
        let next = (self.old.is_empty() && self.knock.is_none()).then_some(self.next);
        next.into_iter().chain(self.limit).min()
    }

    /// This did not do.
    fn try_again(&mut self) {
        self.next = Instant::now() + self.pause;
        self.pause = (2 * self.pause).min(LATEST);
    }

    /// Waits until the process that is given up is gone; false if it is not within
    /// `limit`.
    pub fn wait_gone(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        self.old.retain(|old| {
            let left = deadline.saturating_duration_since(Instant::now());
            !hangs_up(old, left)
        });
        self.old.is_empty()
    }
}

/// Whether the other end of `socket` is closed, or closes within `limit`.
pub(super) fn hangs_up(socket: &UnixStream, limit: Duration) -> bool {
    let limit = clock::until(Instant::now() + limit);
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    poll(&mut fds, Some(&limit)).is_ok_and(|ready| ready > 0)
}

impl Thread {
    /// The process is lost; what the driver set up waits for another.
    pub fn lose(&mut self, error: &Error) {
        if let Link::Down(_) = self.link {
            return;
        }
        let down = Link::Down(Down::new(error.to_string(), self.limit()));
        let mut tracked = false;
        if let Link::Up(session) = std::mem::replace(&mut self.link, down) {
            tracked = session.is_tracked();
            self.give_up(*session);
        }
        self.slot.state.take(Step::Lose);
        self.slot.counts.losses.fetch_add(1, Ordering::Relaxed);
        self.report(MachineEvent::DeviceLost {
            id: self.slot.id().to_owned(),
            reason: error.to_string(),
            tracked,
        });
        // There may be more in the mailbox, and somebody waits for it.
        let _ = self.slot.wake.write(1);
    }

    /// One that does not know guest memory can do nothing there, and just goes.
    fn give_up(&mut self, session: Session) {
        if session.has_memory() {
            self.wait_for(session.abandon());
        }
    }

    /// The process behind `old` has to be gone before there can be a successor.
    pub fn wait_for(&mut self, old: UnixStream) {
        if let Link::Down(down) = &mut self.link {
            down.old.push(old);
        }
        self.count_ghosts();
    }

    /// Tells who waits for processes that were given up whether they are gone.
    pub fn count_ghosts(&mut self) {
        let ghosts = match &self.link {
            Link::Up(_) => 0,
            Link::Down(down) => down.old.len(),
        };
        self.slot.counts.ghosts.store(ghosts, Ordering::Release);
        self.tell_stopped();
    }

    /// A driver begins with the lost device: what is to happen after some time happens
    /// once more.
    pub fn limit_again(&mut self) {
        let limit = self.limit();
        if let Link::Down(down) = &mut self.link
            && down.limit.is_none()
        {
            down.limit = limit.map(|limit| Instant::now() + limit);
        }
    }

    /// How long a loss may take until something else happens.
    fn limit(&self) -> Option<Duration> {
        self.on_loss().limit()
    }

    /// What becomes of the device. A swap changes where its process is.
    fn on_loss(&self) -> OnLoss {
        self.on_loss.unwrap_or(OnLoss::usual(&self.spec.endpoint))
    }

    /// Goes on with the search; `called`: what is polled for it has something.
    pub fn search(&mut self, called: bool) {
        let on_loss = self.on_loss();
        let Link::Down(down) = &mut self.link else {
            return;
        };
        let now = Instant::now();
        if down.limit.is_some_and(|limit| limit <= now) {
            down.limit = None;
            match on_loss {
                OnLoss::Wait => {}
                OnLoss::Error(_) => self.device.failed(),
                OnLoss::Stop(_) => {
                    let why = format!("device {} is lost: {}", self.slot.id(), down.reason);
                    self.end(why);
                }
            }
            return;
        }
        if called && !down.old.is_empty() {
            // The next one is looked at in the next round.
            down.old.remove(0);
            return self.count_ghosts();
        }
        if called && let Some(mut knock) = down.knock.take() {
            match knock.answered() {
                Ok(true) => {
                    // Reported, if it is worth it, and tried again.
                    let _ = self.reconnect(knock.into_socket());
                }
                Ok(false) => down.knock = Some(knock),
                Err(error) => {
                    tracing::debug!("device {}: {error}", self.slot.id());
                    down.try_again();
                }
            }
            return;
        }
        if let Endpoint::Path(path) = &self.spec.endpoint
            && down.old.is_empty()
            && down.knock.is_none()
            && down.next <= now
        {
            match Knock::new(path) {
                Ok(knock) => down.knock = Some(knock),
                Err(error) => {
                    tracing::trace!("device {}: {error}", self.slot.id());
                    down.try_again();
                }
            }
        }
    }

    /// A process answers at `socket`: it takes the lost one's place, all of it or
    /// nothing. Returns for how long nobody worked on the rings.
    ///
    /// # Errors
    /// Why it does not; then the search goes on.
    pub fn reconnect(&mut self, socket: UnixStream) -> Result<Duration, Error> {
        let id = self.slot.id().to_owned();
        self.slot.state.take(Step::Connect);
        if let Link::Down(down) = &mut self.link
            && !std::mem::replace(&mut down.reconnecting, true)
        {
            self.report(MachineEvent::DeviceReconnecting { id: id.clone() });
        }
        let result = Session::new(&self.spec, socket, &self.watchdog).and_then(|mut session| {
            match self.take_over(&mut session) {
                Ok(replayed) => Ok((session, replayed)),
                Err(error) => {
                    self.give_up(session);
                    Err(error)
                }
            }
        });
        let Link::Down(down) = &mut self.link else {
            return Err(self.error("reconnecting", "it was not lost"));
        };
        match result {
            Ok((session, replayed)) => {
                let outage = down.since.elapsed();
                self.link = Link::Up(Box::new(session));
                self.slot.state.take(Step::Connected);
                if self.paused {
                    self.slot.state.take(Step::Pause);
                }
                self.report(MachineEvent::DeviceRunning {
                    id,
                    outage_us: outage.as_micros().try_into().unwrap_or(u64::MAX),
                    replayed,
                });
                Ok(outage)
            }
            Err(error) => {
                self.slot.state.take(Step::Lose);
                down.try_again();
                let reason = error.to_string();
                if down.refused.as_ref() != Some(&reason) {
                    down.refused = Some(reason.clone());
                    self.report(MachineEvent::DeviceRefused { id, reason });
                }
                Err(error)
            }
        }
    }

    /// The whole handshake; returns how many requests are done again.
    fn take_over(&mut self, session: &mut Session) -> Result<u64, Error> {
        self.slot.considers(session);
        let mut info = session.shake_hands(&self.spec)?;
        suit::check(&self.info, self.device.accepted(), &info)
            .map_err(|why| self.error("reconnecting", why))?;
        let replayed = self.rings.count_inflight();
        if replayed > 0 && !session.is_tracked() {
            let why = format!("it cannot finish {replayed} requests: it has no INFLIGHT_SHMFD");
            return Err(self.error("reconnecting", why));
        }
        let inflight = self.rings.introduce(session, &mut info, true)?;
        // From its first request on, whatever becomes of it.
        self.rings.keep(inflight);
        self.rings.rewind();
        if !self.paused {
            self.rings.start(session)?;
        }
        self.slot.connected_by(session);
        self.adopt(info);
        self.rings.wake();
        Ok(replayed)
    }
}

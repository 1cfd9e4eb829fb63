//! One process in place of another, under the running guest. The new one is made
//! ready while the old one works, so that all that stands still is the time from the
//! stop of the first ring to the start of the last; whatever fails, the old one goes
//! on.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use outrigger_protocol::control::MachineEvent;

use super::inflight::Inflight;
use super::loss::hangs_up;
use super::session::{DEADLINE, Session};
use super::spec::Endpoint;
use super::state::Step;
use super::suit;
use super::thread::{Link, Thread};
use crate::Error;
use crate::pci::virtio::DeviceInfo;

impl Thread {
    /// Puts the process at `path` in place of the present one. Returns for how long no
    /// process worked on the rings.
    ///
    /// # Errors
    /// Why the old one stays; or is lost, if that came of it.
    pub fn swap(&mut self, path: PathBuf) -> Result<Duration, Error> {
        let outcome = match &self.link {
            Link::Up(_) => self.swap_running(&path),
            Link::Down(_) => self.swap_lost(&path),
        };
        let id = self.slot.id().to_owned();
        match &outcome {
            Ok(outage) => {
                self.spec.endpoint = Endpoint::Path(path);
                self.slot.counts.swaps.fetch_add(1, Ordering::Relaxed);
                self.report(MachineEvent::DeviceSwapped {
                    id,
                    outage_us: outage.as_micros().try_into().unwrap_or(u64::MAX),
                });
            }
            Err(error) => self.report(MachineEvent::DeviceSwapRefused {
                id,
                reason: error.to_string(),
            }),
        }
        outcome
    }

    fn connect_to(&self, path: &Path) -> Result<UnixStream, Error> {
        outrigger_cli::socket::connect(path, None)
            .map_err(|e| self.error(&format!("swap: connecting to {}", path.display()), e))
    }

    /// There is no process to go back to; there may be one to wait for.
    fn swap_lost(&mut self, path: &Path) -> Result<Duration, Error> {
        let gone = match &mut self.link {
            Link::Down(down) => down.wait_gone(DEADLINE),
            Link::Up(_) => true,
        };
        self.count_ghosts();
        if !gone {
            let why = "its process does not answer, but is there still: end it first";
            return Err(self.error("swap", why));
        }
        let socket = self.connect_to(path)?;
        self.reconnect(socket)
    }

    fn swap_running(&mut self, path: &Path) -> Result<Duration, Error> {
        let new = self.make_ready(path)?;
        let began = Instant::now();
        self.slot.state.take(Step::Drain);
        let leaves_work = self.leaves_work() && !self.paused;
        if leaves_work && let Err(error) = self.drain() {
            self.release();
            self.drained();
            return Err(error);
        }
        let outcome = self.exchange(new, began, leaves_work);
        if leaves_work {
            self.release();
        }
        outcome
    }

    /// The old process stops, and the new one starts.
    fn exchange(
        &mut self,
        mut new: Ready,
        began: Instant,
        leaves_work: bool,
    ) -> Result<Duration, Error> {
        let Link::Up(old) = &mut self.link else {
            return Err(self.error("swap", "its process is lost"));
        };
        if let Err(error) = self.rings.stop(old) {
            self.lose(&error);
            return Err(self.error("swap", format!("its process is lost: {error}")));
        }
        if leaves_work && !self.rings.settle(DEADLINE) {
            self.go_back(None);
            let why = "its process does not come to an end of its requests";
            return Err(self.error("swap", why));
        }
        new.session.limit();
        let started = if self.paused {
            Ok(())
        } else {
            self.rings.start(&mut new.session)
        };
        if let Err(error) = started {
            self.go_back(Some(new));
            return Err(error);
        }
        self.slot.connected_by(&mut new.session);
        let outage = began.elapsed();
        // The old process finds its connection closed.
        self.link = Link::Up(Box::new(new.session));
        self.rings.keep(new.inflight);
        self.adopt(new.info);
        self.rings.wake();
        self.drained();
        Ok(outage)
    }

    /// The whole handshake with the process at `path`, which has no ring to work on
    /// yet.
    fn make_ready(&mut self, path: &Path) -> Result<Ready, Error> {
        let socket = self.connect_to(path)?;
        let mut session = Session::new(&self.spec, socket, &self.watchdog)?;
        self.slot.considers(&session);
        let mut info = session.shake_hands(&self.spec)?;
        suit::check(&self.info, self.device.accepted(), &info)
            .map_err(|why| self.error("swap", why))?;
        let inflight = self.rings.introduce(&mut session, &mut info, false)?;
        Ok(Ready {
            session,
            inflight,
            info,
        })
    }

    /// The old process goes on, behind what the new one may have done already. If it
    /// cannot, it is lost.
    fn go_back(&mut self, new: Option<Ready>) {
        let result = self.restore(new);
        if let Err(error) = result {
            self.lose(&error);
        }
    }

    fn restore(&mut self, new: Option<Ready>) -> Result<(), Error> {
        if let Some(mut new) = new {
            new.session.limit();
            if self.rings.stop(&mut new.session).is_err() {
                // It failed in the middle: as if it had been the device's process and
                // died.
                let socket = new.session.abandon();
                let owes = new.inflight.is_some();
                if owes {
                    self.rings.keep(new.inflight);
                }
                if !hangs_up(&socket, DEADLINE) {
                    let why = "the new process has begun, and neither answers nor ends";
                    self.lose(&self.error("swap", why));
                    self.wait_for(socket);
                    return Ok(());
                }
                self.rings.rewind();
                if owes && let Link::Up(old) = &mut self.link {
                    self.rings.hand_over(old)?;
                }
            } else if self.spec.completes_all() && !new.session.is_tracked() {
                self.rings.settle(DEADLINE);
            }
        }
        let Link::Up(old) = &mut self.link else {
            return Ok(());
        };
        self.slot.connected_by(old);
        let result = if self.paused {
            Ok(())
        } else {
            self.rings.start(old)
        };
        self.rings.wake();
        self.drained();
        result
    }

    fn drained(&mut self) {
        self.slot.state.take(Step::Drained);
        if self.paused {
            self.slot.state.take(Step::Pause);
        }
    }

    /// The device is what the new process says from now on; its driver sees other
    /// features when it starts anew.
    pub fn adopt(&mut self, info: DeviceInfo) {
        self.info.features = info.features;
        self.device.offer(info.features);
        self.configured(info.config);
    }
}

/// A process that could begin.
struct Ready {
    session: Session,
    inflight: Option<Inflight>,
    info: DeviceInfo,
}

//! The launcher's control socket: what `vcpu-runner --control` answers, it forwards;
//! what takes processes, it does itself.
//!
//! A thread for each client ([`mod@client`]), so none waits for another; [`lines`] is
//! how they talk, [`watch`] passes events on, [`mod@replace`] is the order of a swap,
//! [`device`] asks a device's process.

mod client;
mod device;
pub mod lines;
mod replace;
mod watch;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use outrigger_cli::socket::{self, BoundSocket};
use outrigger_protocol::control::{ControlCommand, ControlReply};

use self::client::Clients;
use self::lines::Lines;
use self::watch::Watchers;
use crate::supervise::{Ask, Event};

/// How long the runner may take for its control socket, and how long for an answer:
/// a little longer than it gives itself.
const SERVED: Duration = Duration::from_secs(15);
const ANSWER: Duration = Duration::from_secs(65);
/// How long answers may take to go out when the machine is over.
const FAREWELL: Duration = Duration::from_millis(500);

/// The control socket, if there is to be one, and the runner's events in any case.
pub struct Server {
    listener: Option<(UnixListener, BoundSocket)>,
    bound: Option<BoundSocket>,
    link: Arc<Link>,
}

/// What the threads of the control socket share.
struct Link {
    /// The runner's control socket.
    runner: PathBuf,
    /// To the one who decides.
    machine: Mutex<Sender<Event>>,
    watchers: Watchers,
    busy: Busy,
}

impl Server {
    /// Binds `path`; clients are served once [`Server::begin`] is called.
    ///
    /// # Errors
    /// When the path cannot be bound.
    pub fn new(
        path: Option<&Path>,
        runner: PathBuf,
        machine: &Sender<Event>,
    ) -> anyhow::Result<Self> {
        let bind = |path: &Path| {
            socket::bind(path).with_context(|| format!("--control {}", path.display()))
        };
        Ok(Server {
            listener: path.map(bind).transpose()?,
            bound: None,
            link: Arc::new(Link {
                runner,
                machine: Mutex::new(machine.clone()),
                watchers: Watchers::default(),
                busy: Busy::default(),
            }),
        })
    }

    /// The runner has been started.
    pub fn begin(&mut self) {
        let link = Arc::clone(&self.link);
        std::thread::spawn(move || watch::relay(&link));
        if let Some((listener, bound)) = self.listener.take() {
            self.bound = Some(bound);
            let link = Arc::clone(&self.link);
            std::thread::spawn(move || Clients::default().serve(&listener, &link));
        }
    }

    /// The machine is over: answers may go out yet.
    pub fn finish(self) {
        self.link.busy.wait(FAREWELL);
    }
}

impl Link {
    /// Asks the runner.
    fn forward(&self, command: &ControlCommand) -> ControlReply {
        let answer = Lines::connect(&self.runner, Some(Instant::now() + SERVED))
            .and_then(|mut lines| lines.ask(command, ANSWER));
        answer.unwrap_or_else(|error| {
            ControlReply::error(
                outrigger_protocol::ErrorCode::Failed,
                format!("vcpu-runner: {error}"),
            )
        })
    }

    /// Asks the one who decides.
    fn ask<T>(&self, ask: impl FnOnce(Sender<T>) -> Ask) -> Result<T, String> {
        let (reply, answer) = channel();
        let over = || "the machine is over".to_owned();
        let machine = lock(&self.machine).clone();
        machine.send(Event::Ask(ask(reply))).map_err(|_| over())?;
        answer.recv_timeout(ANSWER).map_err(|_| over())
    }

    fn tell(&self, event: Event) {
        // Fails only when the machine is over.
        let _ = lock(&self.machine).send(event);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts what is being done for clients.
#[derive(Default)]
struct Busy {
    count: Mutex<usize>,
    changed: Condvar,
}

/// Something is being done until this is dropped.
struct Doing<'a>(&'a Busy);

impl Busy {
    fn with(&self) -> Doing<'_> {
        *lock(&self.count) += 1;
        Doing(self)
    }

    fn wait(&self, time: Duration) {
        let count = lock(&self.count);
        // Whether it is all done or not, it is time.
        let _ = self.changed.wait_timeout_while(count, time, |it| *it > 0);
    }
}

impl Drop for Doing<'_> {
    fn drop(&mut self) {
        *lock(&self.0.count) -= 1;
        self.0.changed.notify_all();
    }
}

//! The control socket: any number of clients, a JSON object a line each way
//! (`outrigger_protocol::control`). One thread, which waits for nobody: neither for a
//! client that does not read or write, nor for the machine, which may be waiting for
//! a device's process.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, unbounded};
use outrigger_cli::fd::set_nonblocking;
use outrigger_cli::socket::{self, BoundSocket};
use outrigger_protocol::ErrorCode;
use outrigger_protocol::control::{ControlCommand, ControlReply, MAX_LINE, MachineStatus};
use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{Error, clock, eventfd};

/// Longest time that the machine may take to answer: all deadlines of a reset
/// together.
const DEADLINE: Duration = Duration::from_secs(60);

/// Clients at a time; others wait.
const MAX_CLIENTS: usize = 16;

/// Bytes that wait for a client to read them; one that leaves more is dropped.
const MAX_OUTPUT: usize = 1 << 20;

/// Events on their way to this thread. If it does not keep up, some are lost.
const MAX_EVENTS: usize = 1024;

/// A command and where its answer goes.
pub struct Order {
    /// What to do: neither status nor watch, which are this thread's own.
    pub command: ControlCommand,
    /// Takes the answer.
    pub answer: Answer,
    /// Ends when the answer has gone out, for whoever is about to exit.
    pub answered: Receiver<()>,
}

/// Takes the answer to one command.
pub struct Answer {
    number: u64,
    answers: Sender<(u64, ControlReply)>,
    wake: Arc<EventFd>,
}

impl Answer {
    /// Answers. A client that has gone needs none.
    pub fn send(self, reply: ControlReply) {
        let _ = self.answers.send((self.number, reply));
        eventfd::signal(&self.wake);
    }
}

/// The way of events to clients that watch.
pub struct Watchers {
    events: Sender<Told>,
    wake: Arc<EventFd>,
}

/// What the thread is told.
enum Told {
    /// A line for those who watch.
    Line(Vec<u8>),
    /// Drop this when all before it has gone out.
    Flush { _sent: Sender<()> },
}

impl Watchers {
    /// Passes a line on, which ends as lines do.
    pub fn tell(&self, line: &[u8]) {
        if let Err(TrySendError::Full(_)) = self.events.try_send(Told::Line(line.to_vec())) {
            tracing::warn!("control socket: an event was lost");
        }
        eventfd::signal(&self.wake);
    }

    /// Waits until what was told has gone out, at most for `limit`: before the end.
    pub fn flush(&self, limit: Duration) {
        let (sent, waits) = bounded(0);
        if self.events.try_send(Told::Flush { _sent: sent }).is_ok() {
            eventfd::signal(&self.wake);
            let _ = waits.recv_timeout(limit);
        }
    }
}

/// Binds `path` and starts the thread. If this process `removes` it at its end, that is
/// when the first part of what this returns is dropped; else it stays behind, and the
/// next one replaces it.
///
/// # Errors
/// When the path cannot be bound.
pub fn start(
    path: &Path,
    removes: bool,
    status: impl Fn() -> MachineStatus + Send + 'static,
    orders: impl Fn(Order) + Send + 'static,
) -> Result<(Option<BoundSocket>, Watchers), Error> {
    let what = format!("--control {}", path.display());
    let (listener, bound) = socket::bind(path).map_err(Error::io(what.clone()))?;
    set_nonblocking(&listener).map_err(Error::io(what))?;
    let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::io("eventfd"))?;
    let wake = Arc::new(wake);
    let (events, told) = bounded(MAX_EVENTS);
    let (answers, given) = unbounded();
    let server = Server {
        listener,
        clients: Vec::new(),
        numbers: 0,
        wake: Arc::clone(&wake),
        told,
        answers,
        given,
        status: Box::new(status),
        orders: Box::new(orders),
    };
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || server.run())
        .map_err(Error::io("starting the control thread"))?;
    let watchers = Watchers { events, wake };
    if removes {
        return Ok((Some(bound), watchers));
    }
    bound.keep();
    Ok((None, watchers))
}

struct Server {
    listener: UnixListener,
    clients: Vec<Client>,
    /// Number of the last order.
    numbers: u64,
    wake: Arc<EventFd>,
    told: Receiver<Told>,
    answers: Sender<(u64, ControlReply)>,
    given: Receiver<(u64, ControlReply)>,
    status: Box<dyn Fn() -> MachineStatus + Send>,
    orders: Box<dyn Fn(Order) + Send>,
}

struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// The order that the machine works on; the next is not looked at before.
    waits: Option<Waits>,
    watches: bool,
}

struct Waits {
    number: u64,
    until: Instant,
    /// Dropped when the answer has gone out.
    unanswered: Sender<()>,
}

impl Server {
    fn run(mut self) {
        loop {
            if let Err(error) = self.serve() {
                tracing::error!("control socket: poll: {error}");
                return;
            }
        }
    }

    fn serve(&mut self) -> rustix::io::Result<()> {
        // Full, the listener is not listened to.
        let accepting = if self.clients.len() < MAX_CLIENTS {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let mut fds = vec![
            PollFd::from_borrowed_fd(eventfd::borrow(&self.wake), PollFlags::IN),
            PollFd::new(&self.listener, accepting),
        ];
        fds.extend(self.clients.iter().map(Client::watched));
        let deadlines = self
            .clients
            .iter()
            .filter_map(|c| Some(c.waits.as_ref()?.until));
        let timeout = deadlines.min().map(clock::until);
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        eventfd::take(&self.wake);
        self.pass_on();
        for index in (0..self.clients.len()).rev() {
            if !self.serve_client(index, ready[index + 2]) {
                self.clients.swap_remove(index);
            }
        }
        if ready[1] {
            self.accept();
        }
        Ok(())
    }

    fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                if error.kind() != ErrorKind::WouldBlock {
                    // No descriptors are left: not at full speed.
                    tracing::debug!("control socket: accept: {error}");
                    std::thread::sleep(Duration::from_millis(20));
                }
                return;
            }
        };
        if set_nonblocking(&stream).is_ok() {
            self.clients.push(Client {
                stream,
                input: Vec::new(),
                output: Vec::new(),
                waits: None,
                watches: false,
            });
        }
    }

    /// Events to those who watch, answers to those who wait.
    fn pass_on(&mut self) {
        while let Ok(told) = self.told.try_recv() {
            for client in self.clients.iter_mut().filter(|client| client.watches) {
                match &told {
                    Told::Line(line) => client.output.extend(line),
                    // One that is gone is found out soon.
                    Told::Flush { .. } => drop(client.send()),
                }
            }
        }
        while let Ok((number, reply)) = self.given.try_recv() {
            let waits = |client: &&mut Client| {
                client
                    .waits
                    .as_ref()
                    .is_some_and(|waits| waits.number == number)
            };
            if let Some(client) = self.clients.iter_mut().find(waits) {
                client.answer(&reply);
            }
        }
        let now = Instant::now();
        for client in &mut self.clients {
            if client
                .waits
                .as_ref()
                .is_some_and(|waits| waits.until <= now)
            {
                client.answer(&ControlReply::error(
                    ErrorCode::Timeout,
                    "no answer from the machine",
                ));
            }
        }
    }

    /// Serves a client; false when it is done with.
    fn serve_client(&mut self, index: usize, ready: bool) -> bool {
        if ready && !self.clients[index].receive() {
            return false;
        }
        while self.clients[index].waits.is_none() {
            let input = &mut self.clients[index].input;
            let Some(end) = input.iter().position(|&b| b == b'\n') else {
                break;
            };
            let line: Vec<u8> = input.drain(..=end).collect();
            self.carry_out(index, &line);
        }
        let client = &mut self.clients[index];
        if client.input.len() > MAX_LINE {
            client.answer(&ControlReply::error(
                ErrorCode::LineTooLong,
                format!("a line is longer than {MAX_LINE} bytes"),
            ));
            let _ = client.send();
            return false;
        }
        client.send()
    }

    fn carry_out(&mut self, index: usize, line: &[u8]) {
        let client = &mut self.clients[index];
        let command = match serde_json::from_slice(line) {
            Ok(command) => command,
            Err(error) => {
                return client.answer(&ControlReply::error(
                    ErrorCode::InvalidCommand,
                    error.to_string(),
                ));
            }
        };
        match command {
            ControlCommand::Status {} => client.answer(&ControlReply {
                status: Some((self.status)()),
                ..ControlReply::ok()
            }),
            ControlCommand::Watch {} => {
                client.answer(&ControlReply::ok());
                client.watches = true;
            }
            command => {
                self.numbers += 1;
                let (unanswered, answered) = bounded(0);
                client.waits = Some(Waits {
                    number: self.numbers,
                    until: Instant::now() + DEADLINE,
                    unanswered,
                });
                (self.orders)(Order {
                    command,
                    answer: Answer {
                        number: self.numbers,
                        answers: self.answers.clone(),
                        wake: Arc::clone(&self.wake),
                    },
                    answered,
                });
            }
        }
    }
}

impl Client {
    fn watched(&self) -> PollFd<'_> {
        let mut flags = PollFlags::empty();
        // What one has sent ahead waits in its socket.
        if self.waits.is_none() {
            flags |= PollFlags::IN;
        }
        if !self.output.is_empty() {
            flags |= PollFlags::OUT;
        }
        PollFd::new(&self.stream, flags)
    }

    /// Takes what has arrived; false when there will be no more.
    fn receive(&mut self) -> bool {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(count) => {
                self.input.extend_from_slice(&buffer[..count]);
                true
            }
            Err(e) => matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }

    fn answer(&mut self, reply: &ControlReply) {
        if let Ok(line) = serde_json::to_vec(reply) {
            self.output.extend(line);
            self.output.push(b'\n');
        }
        if let Some(waits) = self.waits.take() {
            // Whoever is about to exit waits for this.
            let sent = self.send();
            drop(waits.unanswered);
            tracing::trace!("answered: {sent}");
        }
    }

    /// Sends what fits; false when the client is gone or does not read.
    fn send(&mut self) -> bool {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    return self.output.len() <= MAX_OUTPUT;
                }
                Err(_) => return false,
            }
        }
        true
    }
}

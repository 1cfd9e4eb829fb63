//! The server of a control socket: one thread, any number of threads that answer.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use outrigger_cli::fd::set_nonblocking;
use outrigger_protocol::ErrorCode;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::connection::{Connection, Input, PendingCommand};
use crate::{MAX_CLIENTS, MAX_LINE};

/// Pause after accept(2) fails, for example because no descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Events that may wait for the server's thread. More are lost, and the log says so.
const MAX_EVENTS: usize = 1024;

/// A reply that the server itself makes.
#[derive(Serialize)]
struct ErrorReply {
    ok: bool,
    error: String,
    code: ErrorCode,
}

/// What other threads ask of the server's thread.
enum ServerMessage {
    Reply {
        command: u64,
        line: Vec<u8>,
        watch: bool,
    },
    Event(Vec<u8>),
    EndEvents,
    Finish {
        until: Instant,
        /// Dropped when all is sent.
        _done: Sender<()>,
    },
}

/// The way to the server's thread.
#[derive(Clone)]
struct Mailbox {
    messages: Sender<ServerMessage>,
    wake: Arc<OwnedFd>,
    events: Arc<AtomicUsize>,
}

impl Mailbox {
    fn send(&self, message: ServerMessage) {
        // Fails only after the thread has ended on an error of poll(2).
        let _ = self.messages.send(message);
        // EAGAIN: the counter is full, so the thread is about to wake up anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Answers one command. Dropped without a reply, it answers that the command failed.
pub struct Responder {
    command: u64,
    mailbox: Option<Mailbox>,
}

impl Responder {
    /// Sends the reply. A client that is gone gets none.
    pub fn reply(mut self, reply: &impl Serialize) {
        self.send(reply, false);
    }

    /// Sends the reply and from then on every event of [`ControlServer::broadcast`].
    pub fn reply_and_watch(mut self, reply: &impl Serialize) {
        self.send(reply, true);
    }

    fn send(&mut self, reply: &impl Serialize, watch: bool) {
        if let Some(mailbox) = self.mailbox.take() {
            mailbox.send(ServerMessage::Reply {
                command: self.command,
                line: line(reply),
                watch,
            });
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        let why = "the command was dropped without an answer";
        self.send(&error_reply(ErrorCode::Failed, why.to_owned()), false);
    }
}

/// A running server. Its thread runs until the process ends.
#[derive(Clone)]
pub struct ControlServer(Mailbox);

impl ControlServer {
    /// Sends `event` to every client that watches. Never waits: when the server does not
    /// keep up, events are lost.
    pub fn broadcast(&self, event: &impl Serialize) {
        if self.0.events.fetch_add(1, Ordering::Relaxed) >= MAX_EVENTS {
            self.0.events.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!("control socket: an event was lost");
            return;
        }
        self.0.send(ServerMessage::Event(line(event)));
    }

    /// There will be no more events: disconnects the clients that watch, once they have
    /// read the events so far.
    pub fn end_events(&self) {
        self.0.send(ServerMessage::EndEvents);
    }

    /// Waits until every command is answered, and every reply and event is sent to the
    /// clients that read, for at most `limit`. Meant for the end of the process.
    pub fn finish(&self, limit: Duration) {
        let (done, wait) = bounded(0);
        self.0.send(ServerMessage::Finish {
            until: Instant::now() + limit,
            _done: done,
        });
        let _ = wait.recv_timeout(limit);
    }
}

/// Serves `listener` from a new thread named `control`, in the current tracing span. `handle` is called there for each
/// command, so it must not block for long: it replies at once or passes the [`Responder`]
/// on. A reply that has not come within `reply_limit`, if there is one, is replaced by an error.
///
/// # Errors
/// There is no descriptor or thread left.
pub fn start<C: DeserializeOwned + 'static>(
    listener: UnixListener,
    reply_limit: Option<Duration>,
    handle: impl FnMut(C, Responder) + Send + 'static,
) -> io::Result<ControlServer> {
    set_nonblocking(&listener)?;
    let (messages, received) = unbounded();
    let mailbox = Mailbox {
        messages,
        wake: Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?),
        events: Arc::default(),
    };
    let mut server = ServerThread {
        listener,
        clients: Vec::new(),
        last_command: 0,
        mailbox: mailbox.clone(),
        received,
        reply_limit,
        handle,
        events_ended: false,
        finishing: Vec::new(),
        commands: std::marker::PhantomData,
    };
    let span = tracing::Span::current();
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            let _entered = span.entered();
            loop {
                if let Err(error) = server.serve() {
                    tracing::error!(%error, "control socket: poll failed");
                    return;
                }
            }
        })?;
    Ok(ControlServer(mailbox))
}

struct ServerThread<C, H> {
    listener: UnixListener,
    clients: Vec<Connection>,
    /// Number of the last command.
    last_command: u64,
    mailbox: Mailbox,
    received: Receiver<ServerMessage>,
    reply_limit: Option<Duration>,
    handle: H,
    events_ended: bool,
    /// Threads that wait in [`ControlServer::finish`], and until when.
    finishing: Vec<(Instant, Sender<()>)>,
    commands: std::marker::PhantomData<fn(C)>,
}

impl<C: DeserializeOwned, H: FnMut(C, Responder)> ServerThread<C, H> {
    /// Waits for an event and handles it.
    fn serve(&mut self) -> rustix::io::Result<()> {
        let mut fds = vec![
            PollFd::new(&self.mailbox.wake, PollFlags::IN),
            PollFd::new(&self.listener, PollFlags::IN),
        ];
        fds.extend(self.clients.iter().map(Connection::poll_fd));
        let deadlines = self.clients.iter().filter_map(Connection::deadline);
        let finishing = self.finishing.iter().map(|(until, _)| *until);
        let timeout = deadlines.chain(finishing).min().map(time_until);
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let events: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        let [_, acceptable, clients @ ..] = &events[..] else {
            return Ok(());
        };
        // EAGAIN: something else ended the wait.
        let _ = rustix::io::read(&self.mailbox.wake, &mut [0; 8]);
        self.take_messages();
        self.expire_replies();
        for index in (0..self.clients.len()).rev() {
            if !self.serve_client(index, clients[index]) {
                self.clients.swap_remove(index);
            }
        }
        if !acceptable.is_empty() {
            self.accept();
        }
        let now = Instant::now();
        let settled = self.received.is_empty() && self.clients.iter().all(Connection::is_settled);
        self.finishing.retain(|(until, _)| !settled && *until > now);
        Ok(())
    }

    fn take_messages(&mut self) {
        while let Ok(message) = self.received.try_recv() {
            match message {
                ServerMessage::Reply {
                    command,
                    line,
                    watch,
                } => {
                    // A late reply finds no client: its command has expired.
                    let waits = |client: &&mut Connection| {
                        let pending = client.pending.as_ref();
                        pending.is_some_and(|pending| pending.number == command)
                    };
                    if let Some(client) = self.clients.iter_mut().find(waits) {
                        client.pending = None;
                        client.queue(&line);
                        client.watches |= watch;
                        client.closing |= watch && self.events_ended;
                    }
                }
                ServerMessage::Event(line) => {
                    self.mailbox.events.fetch_sub(1, Ordering::Relaxed);
                    for client in self.clients.iter_mut().filter(|client| client.watches) {
                        client.queue(&line);
                    }
                }
                ServerMessage::EndEvents => {
                    self.events_ended = true;
                    for client in self.clients.iter_mut().filter(|client| client.watches) {
                        client.closing = true;
                    }
                }
                ServerMessage::Finish { until, _done } => self.finishing.push((until, _done)),
            }
        }
    }

    fn expire_replies(&mut self) {
        let now = Instant::now();
        for client in &mut self.clients {
            let due = client.pending.as_ref().and_then(|command| command.due);
            if due.is_some_and(|due| due <= now) {
                client.pending = None;
                let limit = self.reply_limit.unwrap_or_default();
                let why = format!("no answer within {limit:?}");
                client.queue(&line(&error_reply(ErrorCode::Timeout, why)));
            }
        }
    }

    /// Serves a client; false when its connection is to be closed.
    fn serve_client(&mut self, index: usize, events: PollFlags) -> bool {
        let client = &mut self.clients[index];
        // poll(2) reports a hang-up again and again until the connection is dropped. One that
        // is closed in one direction only does not hang up, and still gets its reply.
        if client.pending.is_some() && events.intersects(PollFlags::HUP | PollFlags::ERR) {
            return false;
        }
        if !events.is_empty() && client.accepts_commands() && !client.receive() {
            return false;
        }
        loop {
            let client = &mut self.clients[index];
            if !client.send() {
                return false;
            }
            if !client.accepts_commands() {
                return true;
            }
            let error = match client.next_line() {
                Input::Incomplete => return true,
                Input::TooLong => {
                    client.closing = true;
                    let why = format!("a line is longer than {MAX_LINE} bytes");
                    error_reply(ErrorCode::LineTooLong, why)
                }
                Input::Line(line) => match serde_json::from_slice(&line) {
                    Ok(command) => {
                        self.last_command += 1;
                        client.pending = Some(PendingCommand {
                            number: self.last_command,
                            due: self.reply_limit.map(|limit| Instant::now() + limit),
                        });
                        let responder = Responder {
                            command: self.last_command,
                            mailbox: Some(self.mailbox.clone()),
                        };
                        (self.handle)(command, responder);
                        // Most replies are there by now.
                        self.take_messages();
                        continue;
                    }
                    Err(error) => error_reply(ErrorCode::InvalidCommand, error.to_string()),
                },
            };
            client.queue(&line(&error));
        }
    }

    fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Another process may share the socket and have accepted first.
                if error.kind() != ErrorKind::WouldBlock {
                    tracing::debug!(%error, "control socket: accept failed");
                    std::thread::sleep(ACCEPT_PAUSE);
                }
                return;
            }
        };
        if set_nonblocking(&stream).is_err() {
            return;
        }
        let mut client = Connection::new(stream);
        if self.clients.len() >= MAX_CLIENTS {
            let now = Instant::now();
            let idle = self.clients.iter().enumerate();
            let idle = idle.filter_map(|(index, client)| Some((client.idle_time(now)?, index)));
            let Some((_, index)) = idle.max() else {
                let why = format!("all {MAX_CLIENTS} clients wait for an answer or watch");
                client.queue(&line(&error_reply(ErrorCode::TooManyClients, why)));
                client.send();
                return;
            };
            self.clients.swap_remove(index);
        }
        self.clients.push(client);
    }
}

fn error_reply(code: ErrorCode, error: String) -> ErrorReply {
    ErrorReply {
        ok: false,
        error,
        code,
    }
}

fn line(message: &impl Serialize) -> Vec<u8> {
    // None of our messages has a map with keys that JSON lacks, so this does not fail.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// The time from now until `at`, as poll(2) takes it.
fn time_until(at: Instant) -> Timespec {
    let left = at.saturating_duration_since(Instant::now());
    Timespec::try_from(left).unwrap_or(Timespec {
        tv_sec: i64::MAX,
        tv_nsec: 0,
    })
}

#[cfg(test)]
mod tests;

//! The control socket of the launcher. It has the commands of `vcpu-runner --control`, which it
//! forwards, and those that need processes, which it carries out with the supervisor.
//!
//! The server's thread starts a thread for each command, so that clients do not wait for each
//! other. [`mod@swap`] is the sequence of a swap, [`device`] sends a command to a device
//! process, [`events`] distributes the runner's events.

mod device;
mod events;
mod swap;

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use outrigger_cli::socket::{self, BoundSocket};
use outrigger_control_socket::{ControlClient, ControlServer, MAX_CLIENTS, Responder};
use outrigger_protocol::ErrorCode;
use outrigger_protocol::control::{ControlCommand, ControlReply};
use outrigger_protocol::device::DeviceCommand;

use crate::messages::{CommandError, SupervisorEvent, SupervisorRequest, SwapSource};

/// How long any command may take: a swap can need two attempts and a process that starts slowly.
pub const REPLY_LIMIT: Duration = Duration::from_secs(150);
/// How long the runner may take to create its control socket.
const RUNNER_SOCKET_LIMIT: Duration = Duration::from_secs(15);
/// How long the runner may take to answer, a little more than it gives itself.
const RUNNER_REPLY_LIMIT: Duration = Duration::from_secs(65);
/// How long the supervisor may take to answer. The slowest request waits for a process to end
/// and for its successor to become ready.
const SUPERVISOR_REPLY_LIMIT: Duration = Duration::from_secs(65);
/// How long sending the last replies and events may take at the end of the machine.
const FINISH_LIMIT: Duration = Duration::from_millis(500);
/// Commands in progress at a time. Each may have a connection to the runner, which serves as
/// many clients as this socket and one of them is for the events.
const MAX_COMMANDS: usize = MAX_CLIENTS - 1;

/// The control socket, if the machine has one, and the thread that receives the runner's events.
pub struct ControlSocket {
    socket: Option<(UnixListener, BoundSocket)>,
    context: Arc<ControlContext>,
    running: Option<RunningControl>,
}

/// What runs between [`ControlSocket::start`] and [`ControlSocket::finish`].
struct RunningControl {
    server: Option<ControlServer>,
    /// Removes the socket at the end.
    _socket_file: Option<BoundSocket>,
    /// Disconnected when the last event has been distributed.
    events_done: Receiver<()>,
}

/// What the threads of the commands share.
struct ControlContext {
    /// Path of the runner's control socket.
    runner: PathBuf,
    supervisor: Sender<SupervisorEvent>,
    /// Number of commands in progress.
    commands: AtomicUsize,
}

impl ControlSocket {
    /// Creates the socket at `path`. Clients are served once [`ControlSocket::start`] is called.
    ///
    /// # Errors
    /// The socket cannot be created.
    pub fn bind(
        path: Option<&Path>,
        runner: PathBuf,
        supervisor: Sender<SupervisorEvent>,
    ) -> anyhow::Result<Self> {
        let bind = |path: &Path| {
            socket::bind(path).with_context(|| format!("--control {}", path.display()))
        };
        Ok(ControlSocket {
            socket: path.map(bind).transpose()?,
            context: Arc::new(ControlContext {
                runner,
                supervisor,
                commands: AtomicUsize::new(0),
            }),
            running: None,
        })
    }

    /// Serves clients and receives the runner's events. Call this once the runner was started.
    ///
    /// # Errors
    /// No thread or descriptor is left.
    pub fn start(&mut self) -> anyhow::Result<()> {
        let (server, socket_file) = match self.socket.take() {
            Some((listener, socket_file)) => {
                let context = Arc::clone(&self.context);
                let handle = move |command, responder| context.handle(command, responder);
                let server = outrigger_control_socket::start(listener, Some(REPLY_LIMIT), handle);
                (Some(server.context("control socket")?), Some(socket_file))
            }
            None => (None, None),
        };
        let (done, events_done) = channel::<()>();
        let (context, events_server) = (Arc::clone(&self.context), server.clone());
        std::thread::spawn(move || {
            events::relay(&context, events_server.as_ref());
            drop(done);
        });
        self.running = Some(RunningControl {
            server,
            _socket_file: socket_file,
            events_done,
        });
        Ok(())
    }

    /// The machine has ended: waits until the last replies and events are sent.
    pub fn finish(self) {
        let Some(running) = self.running else { return };
        let deadline = Instant::now() + FINISH_LIMIT;
        let _ = running.events_done.recv_timeout(FINISH_LIMIT);
        if let Some(server) = running.server {
            server.finish(deadline.saturating_duration_since(Instant::now()));
        }
    }
}

impl ControlContext {
    /// Carries out a command in a new thread.
    fn handle(self: &Arc<Self>, command: ControlCommand, responder: Responder) {
        if matches!(command, ControlCommand::Watch {}) {
            return responder.reply_and_watch(&ControlReply::ok());
        }
        if self.commands.fetch_add(1, Ordering::Relaxed) >= MAX_COMMANDS {
            self.commands.fetch_sub(1, Ordering::Relaxed);
            let why = format!("{MAX_COMMANDS} commands are in progress: try again");
            return responder.reply(&ControlReply::error(ErrorCode::Busy, why));
        }
        let context = Arc::clone(self);
        let execute = move || {
            let reply = context.execute(command);
            // First, so that the client of this reply may send its next command.
            context.commands.fetch_sub(1, Ordering::Relaxed);
            responder.reply(&reply);
        };
        let thread = std::thread::Builder::new().name("command".into());
        if thread.spawn(execute).is_err() {
            // The responder was dropped with the closure, which is an answer.
            self.commands.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn execute(&self, command: ControlCommand) -> ControlReply {
        match command {
            ControlCommand::Swap {
                id,
                socket: Some(path),
                device: None,
            } => swap::swap(self, &id, SwapSource::Socket(path)),
            ControlCommand::Swap {
                id,
                socket: None,
                device: Some(text),
            } => swap::swap(self, &id, SwapSource::Description(text)),
            ControlCommand::Swap { id, .. } => ControlReply::error(
                ErrorCode::InvalidCommand,
                format!("{id}: swap needs socket or device, and not both"),
            ),
            ControlCommand::Restart { id } => swap::swap(self, &id, SwapSource::SameProgram),
            ControlCommand::Resize { id, size } => {
                device::send(self, &id, &DeviceCommand::Resize { size })
            }
            ControlCommand::Flush { id } => device::send(self, &id, &DeviceCommand::Flush {}),
            ControlCommand::Stats { id } => device::send(self, &id, &DeviceCommand::Stats {}),
            command => self.forward(&command),
        }
    }

    /// Forwards a command to the runner.
    fn forward(&self, command: &ControlCommand) -> ControlReply {
        let deadline = Instant::now() + RUNNER_SOCKET_LIMIT;
        let reply = ControlClient::connect(&self.runner, Some(deadline))
            .and_then(|mut client| client.request(command, RUNNER_REPLY_LIMIT));
        reply.unwrap_or_else(|error| {
            let code = error_code(&error, ErrorCode::Ended);
            ControlReply::error(code, format!("vcpu-runner: {error}"))
        })
    }

    /// Sends a request to the supervisor and waits for the answer.
    fn request<T>(
        &self,
        request: impl FnOnce(Sender<T>) -> SupervisorRequest,
    ) -> Result<T, CommandError> {
        let (reply, answer) = channel();
        let ended = || CommandError::new(ErrorCode::Ended, "the machine has ended");
        self.supervisor
            .send(SupervisorEvent::Request(request(reply)))
            .map_err(|_| ended())?;
        answer
            .recv_timeout(SUPERVISOR_REPLY_LIMIT)
            .map_err(|error| match error {
                RecvTimeoutError::Disconnected => ended(),
                RecvTimeoutError::Timeout => {
                    let why = format!("no answer within {SUPERVISOR_REPLY_LIMIT:?}");
                    CommandError::new(ErrorCode::Timeout, why)
                }
            })
    }

    /// Sends an event to the supervisor.
    fn notify(&self, event: SupervisorEvent) {
        // Fails only when the machine has ended.
        let _ = self.supervisor.send(event);
    }
}

/// The code for an error of a connection, where `closed` is for a peer that has ended.
fn error_code(error: &io::Error, closed: ErrorCode) -> ErrorCode {
    match error.kind() {
        ErrorKind::TimedOut => ErrorCode::Timeout,
        ErrorKind::UnexpectedEof
        | ErrorKind::BrokenPipe
        | ErrorKind::ConnectionReset
        | ErrorKind::ConnectionRefused
        | ErrorKind::NotFound => closed,
        _ => ErrorCode::Failed,
    }
}

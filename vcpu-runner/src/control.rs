//! The control socket: any number of clients, a JSON object a line each way
//! (`outrigger_protocol::control`). One thread; a client that does not read or
//! write holds nobody up.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use outrigger_cli::fd::set_nonblocking;
use outrigger_cli::socket::{self, Bound};
use outrigger_protocol::control::{Command, MAX_LINE, Reply};
use rustix::event::{PollFd, PollFlags, poll};

use crate::Error;

/// Longest time that the machine may take to answer: all deadlines of a reset
/// together.
const DEADLINE: Duration = Duration::from_secs(60);

/// Clients at a time; others wait.
const MAX_CLIENTS: usize = 16;

/// A command and where its answer goes.
pub struct Order {
    /// What to do.
    pub command: Command,
    /// Takes the answer.
    pub reply: Sender<Reply>,
    /// Ends when the answer has gone out, for whoever is about to exit.
    pub answered: Receiver<()>,
}

struct Client {
    stream: UnixStream,
    input: Vec<u8>,
}

/// Binds `path` and starts the thread. If this process `removes` it at its end, that is
/// when what this returns is dropped; else it stays behind, and the next one replaces it.
///
/// # Errors
/// When the path cannot be bound.
pub fn start(
    path: &Path,
    removes: bool,
    orders: impl Fn(Order) + Send + 'static,
) -> Result<Option<Bound>, Error> {
    let what = format!("--control {}", path.display());
    let (listener, bound) = socket::bind(path).map_err(Error::io(what.clone()))?;
    set_nonblocking(&listener).map_err(Error::io(what))?;
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || serve(&listener, &orders))
        .map_err(Error::io("starting the control thread"))?;
    if removes {
        return Ok(Some(bound));
    }
    bound.keep();
    Ok(None)
}

fn serve(listener: &UnixListener, orders: &impl Fn(Order)) {
    let mut clients: Vec<Client> = Vec::new();
    loop {
        // Full, the listener is not listened to.
        let accepting = if clients.len() < MAX_CLIENTS {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let mut fds = vec![PollFd::new(listener, accepting)];
        fds.extend(
            clients
                .iter()
                .map(|client| PollFd::new(&client.stream, PollFlags::IN)),
        );
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!("control socket: poll: {error}");
                return;
            }
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut at = 0;
        clients.retain_mut(|client| {
            at += 1;
            !ready[at] || client.serve(orders)
        });
        if ready[0]
            && let Ok((stream, _)) = listener.accept()
            && set_nonblocking(&stream).is_ok()
        {
            clients.push(Client {
                stream,
                input: Vec::new(),
            });
        }
    }
}

impl Client {
    /// Serves what has arrived; false when the client is done with.
    fn serve(&mut self, orders: &impl Fn(Order)) -> bool {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(count) => self.input.extend_from_slice(&buffer[..count]),
            Err(e) => return matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
        while let Some(end) = self.input.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.input.drain(..=end).collect();
            // Dropped at the end of the round: the answer has gone out then.
            let (_unanswered, answered) = bounded(0);
            if !self.answer(&carry_out(&line, answered, orders)) {
                return false;
            }
        }
        if self.input.len() > MAX_LINE {
            self.answer(&Reply::error(format!(
                "a line is longer than {MAX_LINE} bytes"
            )));
            return false;
        }
        true
    }

    /// An answer fits into any socket buffer that is read now and then.
    fn answer(&mut self, reply: &Reply) -> bool {
        let Ok(mut line) = serde_json::to_vec(reply) else {
            return false;
        };
        line.push(b'\n');
        self.stream.write_all(&line).is_ok()
    }
}

fn carry_out(line: &[u8], answered: Receiver<()>, orders: &impl Fn(Order)) -> Reply {
    let command = match serde_json::from_slice(line) {
        Ok(command) => command,
        Err(error) => return Reply::error(error.to_string()),
    };
    let (reply, answer) = bounded(1);
    orders(Order {
        command,
        reply,
        answered,
    });
    answer
        .recv_timeout(DEADLINE)
        .unwrap_or_else(|_| Reply::error("no answer from the machine"))
}

//! The control socket: any number of clients, a JSON object a line each way
//! (`outrigger_protocol::control`). One thread; a client that does not read or
//! write holds nobody up.

use std::ffi::OsString;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use outrigger_cli::fd::set_nonblocking;
use outrigger_cli::socket;
use outrigger_protocol::control::{Command, MAX_LINE, Reply};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, Mode, OFlags, statat};

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

/// The socket's place in the file system: its directory, opened while that is
/// allowed, and its name there.
pub struct Place {
    directory: OwnedFd,
    name: OsString,
    path: PathBuf,
}

impl Place {
    /// Opens the directory that `path` is in.
    ///
    /// # Errors
    /// When there is no such directory, or `path` names no file in one.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let error = Error::io(format!("--control {}", path.display()));
        let (Some(name), Some(parent)) = (path.file_name(), path.parent()) else {
            let why = "it names no file";
            return Err(error(io::Error::new(ErrorKind::InvalidInput, why)));
        };
        let parent = if parent.as_os_str().is_empty() {
            Path::new(".")
        } else {
            parent
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Place {
            directory: rustix::fs::open(parent, flags, Mode::empty())
                .map_err(|e| error(e.into()))?,
            name: name.to_owned(),
            path: path.to_owned(),
        })
    }

    /// The directory.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Device and inode of what is there now.
    fn identity(&self) -> rustix::io::Result<(u64, u64)> {
        let stat = statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok((stat.st_dev, stat.st_ino))
    }
}

/// A control socket that is served; it is removed when this is dropped.
pub struct Served {
    removes: bool,
    place: Place,
    identity: (u64, u64),
}

impl Drop for Served {
    fn drop(&mut self) {
        if !self.removes {
            return;
        }
        // Somebody may have put another one there.
        if self.place.identity() == Ok(self.identity)
            && let Err(error) =
                rustix::fs::unlinkat(&self.place.directory, &self.place.name, AtFlags::empty())
        {
            tracing::warn!("{} stays behind: {error}", self.place.path.display());
        }
    }
}

/// Binds the socket and starts the thread. Unless this process `removes` it, it
/// stays behind, to be replaced by the next one.
///
/// # Errors
/// When the path cannot be bound.
pub fn start(
    place: Place,
    removes: bool,
    orders: impl Fn(Order) + Send + 'static,
) -> Result<Served, Error> {
    let what = format!("--control {}", place.path.display());
    let (listener, unserved) = socket::bind(&place.path).map_err(Error::io(what.clone()))?;
    let identity = place
        .identity()
        .map_err(|e| Error::io(what.clone())(e.into()))?;
    let served = Served {
        removes,
        place,
        identity,
    };
    // From here on it is removed by way of its directory.
    unserved.keep();
    set_nonblocking(&listener).map_err(Error::io(what))?;
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || serve(&listener, &orders))
        .map_err(Error::io("starting the control thread"))?;
    Ok(served)
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

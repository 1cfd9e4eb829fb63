//! One client of the server: its buffers and its deadlines.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::{MAX_LINE, STALL_LIMIT};

/// Unread output in bytes at which a client is disconnected at once.
const MAX_OUTPUT: usize = 1 << 20;

/// What a client's input holds.
pub enum Input {
    /// A command line, without its newline.
    Line(Vec<u8>),
    /// No whole line yet.
    Incomplete,
    /// More than [`MAX_LINE`] bytes without a newline.
    TooLong,
}

/// A command that is not answered yet.
pub struct PendingCommand {
    /// Identifies the command in its `Responder`; never used twice.
    pub number: u64,
    /// When the reply is due, if there is a limit.
    pub due: Option<Instant>,
}

/// A client.
pub struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: VecDeque<u8>,
    /// The command in progress.
    pub pending: Option<PendingCommand>,
    /// The client gets events.
    pub watches: bool,
    /// The connection is closed as soon as the output is sent.
    pub closing: bool,
    /// The client does not read: the socket had no room at the last attempt to send.
    blocked: bool,
    /// When the client last sent a command, got a reply or read output.
    active: Instant,
}

impl Connection {
    /// A client that has said nothing yet. `stream` must not block.
    pub fn new(stream: UnixStream) -> Self {
        Connection {
            stream,
            input: Vec::new(),
            output: VecDeque::new(),
            pending: None,
            watches: false,
            closing: false,
            blocked: false,
            active: Instant::now(),
        }
    }

    /// What poll(2) waits for. Commands that arrive while one is in progress, or while
    /// replies are unread, stay in the socket.
    pub fn poll_fd(&self) -> PollFd<'_> {
        let mut flags = PollFlags::empty();
        if self.accepts_commands() {
            flags |= PollFlags::IN;
        }
        if !self.output.is_empty() {
            flags |= PollFlags::OUT;
        }
        PollFd::new(&self.stream, flags)
    }

    /// When the server has to look at this client again without any event on its socket.
    pub fn deadline(&self) -> Option<Instant> {
        let stalled = (!self.output.is_empty()).then(|| self.active + STALL_LIMIT);
        let due = self.pending.as_ref().and_then(|command| command.due);
        due.into_iter().chain(stalled).min()
    }

    /// Whether the next command may be read.
    pub fn accepts_commands(&self) -> bool {
        self.pending.is_none() && !self.closing && (self.output.is_empty() || self.watches)
    }

    /// For how long the client has been idle; `None` while it waits for a reply or watches.
    pub fn idle_time(&self, now: Instant) -> Option<Duration> {
        let idle = self.pending.is_none() && !self.watches;
        idle.then(|| now.saturating_duration_since(self.active))
    }

    /// Nothing is left to do for this client, or it does not read.
    pub fn is_settled(&self) -> bool {
        self.pending.is_none() && (self.output.is_empty() || self.blocked)
    }

    /// Reads what has arrived; false at the end of the stream.
    pub fn receive(&mut self) -> bool {
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

    /// Takes the next command line from the input.
    pub fn next_line(&mut self) -> Input {
        match self.input.iter().position(|&byte| byte == b'\n') {
            Some(end) if end < MAX_LINE => {
                self.active = Instant::now();
                let mut line: Vec<u8> = self.input.drain(..=end).collect();
                line.pop();
                Input::Line(line)
            }
            None if self.input.len() < MAX_LINE => Input::Incomplete,
            _ => Input::TooLong,
        }
    }

    /// Queues a line, which ends with its newline.
    pub fn queue(&mut self, line: &[u8]) {
        if self.output.is_empty() {
            self.active = Instant::now();
        }
        self.output.extend(line);
    }

    /// Sends what the socket has room for; false when the client is gone, has not read
    /// for [`STALL_LIMIT`], or has nothing more to get.
    pub fn send(&mut self) -> bool {
        self.blocked = false;
        while !self.output.is_empty() {
            let (front, _) = self.output.as_slices();
            match self.stream.write(front) {
                Ok(count) => {
                    self.output.drain(..count);
                    self.active = Instant::now();
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.blocked = true;
                    return self.output.len() <= MAX_OUTPUT && self.active.elapsed() < STALL_LIMIT;
                }
                Err(_) => return false,
            }
        }
        !self.closing
    }
}

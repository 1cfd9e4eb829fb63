//! Lines over a unix socket, in both directions, with limits in time and length.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use outrigger_cli::socket;
use outrigger_protocol::control::MAX_LINE;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How long the other side may take to make room for a line.
const ROOM: Duration = Duration::from_secs(5);

/// The receiving half of a connection.
pub struct Lines {
    stream: UnixStream,
    input: Vec<u8>,
}

impl Lines {
    /// Of a connection, which from now on does not wait for ever to be written to.
    ///
    /// # Errors
    /// setsockopt(2)'s.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(ROOM))?;
        Ok(Lines {
            stream,
            input: Vec::new(),
        })
    }

    /// Connects to `path`, which may take until `deadline` to be served.
    ///
    /// # Errors
    /// connect(2)'s.
    pub fn connect(path: &Path, deadline: Option<Instant>) -> io::Result<Self> {
        Self::new(socket::connect(path, deadline)?)
    }

    /// The next line, without its end; `None` when there will be none.
    ///
    /// # Errors
    /// `TimedOut` after `deadline`, `InvalidData` for a line that is too long, and
    /// read(2)'s.
    pub fn next(&mut self, deadline: Option<Instant>) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.input.iter().position(|&byte| byte == b'\n') {
                let mut line: Vec<u8> = self.input.drain(..=end).collect();
                line.pop();
                return Ok(Some(line));
            }
            if self.input.len() > MAX_LINE {
                let why = format!("a line is longer than {MAX_LINE} bytes");
                return Err(io::Error::new(ErrorKind::InvalidData, why));
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(io::Error::new(ErrorKind::TimedOut, "no answer"));
            }
            self.stream.set_read_timeout(left)?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(None),
                Ok(count) => self.input.extend_from_slice(&buffer[..count]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {} // the time is over
                Err(e) => return Err(e),
            }
        }
    }

    /// Sends `command`; returns the answer, which comes within `time`. Events that come
    /// before it are passed over.
    ///
    /// # Errors
    /// The connection's; also when the other side leaves without an answer.
    pub fn ask<R: DeserializeOwned>(
        &mut self,
        command: &impl Serialize,
        time: Duration,
    ) -> io::Result<R> {
        send(&self.stream, &serde_json::to_vec(command)?)?;
        let deadline = Instant::now() + time;
        while let Some(line) = self.next(Some(deadline))? {
            if let Ok(reply) = serde_json::from_slice(&line) {
                return Ok(reply);
            }
        }
        Err(io::Error::new(
            ErrorKind::UnexpectedEof,
            "it ended without an answer",
        ))
    }
}

/// Sends a line.
///
/// # Errors
/// write(2)'s; `WouldBlock` when there is no room for too long.
pub fn send(mut stream: &UnixStream, line: &[u8]) -> io::Result<()> {
    // In one piece, for those who read without waiting.
    let mut line = line.to_vec();
    line.push(b'\n');
    stream.write_all(&line)
}

#[cfg(test)]
mod tests {
    use outrigger_protocol::control::{ControlCommand, ControlReply};

    use super::*;

    #[test]
    fn lines_come_whole_in_time_and_not_too_long() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let mut lines = Lines::new(server).unwrap();
        client.write_all(b"one\ntw").unwrap();
        assert_eq!(lines.next(None).unwrap().unwrap(), b"one");
        let soon = Instant::now() + Duration::from_millis(20);
        let late = lines.next(Some(soon)).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::TimedOut);
        client.write_all(b"o\n").unwrap();
        assert_eq!(lines.next(None).unwrap().unwrap(), b"two");
        let long = std::thread::spawn(move || {
            let _ = client.write_all(&vec![b'x'; 2 * MAX_LINE]);
        });
        let error = lines.next(None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        drop(lines);
        long.join().unwrap();
    }

    #[test]
    fn an_answer_is_found_among_events() {
        let (client, server) = UnixStream::pair().unwrap();
        let mut lines = Lines::new(client).unwrap();
        send(&server, br#"{"event":"paused"}"#).unwrap();
        send(&server, br#"{"ok":false,"error":"no"}"#).unwrap();
        let reply: ControlReply = lines
            .ask(&ControlCommand::Pause {}, Duration::from_secs(9))
            .unwrap();
        assert_eq!(
            reply,
            ControlReply::error(outrigger_protocol::ErrorCode::Failed, "no")
        );
        drop(server);
        let ended = lines.ask::<ControlReply>(&ControlCommand::Pause {}, Duration::from_secs(9));
        assert!(ended.is_err());
    }
}

//! A client's connection to a control socket.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use outrigger_cli::socket;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{MAX_LINE, STALL_LIMIT};

/// A blocking connection. Every call has a deadline, except where the caller asks for none.
pub struct ControlClient {
    stream: UnixStream,
    /// Received bytes that are not returned as lines yet.
    input: Vec<u8>,
}

impl ControlClient {
    /// Wraps a connected socket. Writes to it fail after [`STALL_LIMIT`] without room.
    ///
    /// # Errors
    /// setsockopt(2) fails.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(STALL_LIMIT))?;
        Ok(ControlClient {
            stream,
            input: Vec::new(),
        })
    }

    /// Connects to `path`; until `deadline`, waits for a server to listen there. Without a
    /// deadline it tries once.
    ///
    /// # Errors
    /// No server accepts the connection in time (connect(2)).
    pub fn connect(path: &Path, deadline: Option<Instant>) -> io::Result<Self> {
        Self::new(socket::connect(path, deadline)?)
    }

    /// Sends `command` and returns its reply, which must come within `timeout`. Events that
    /// arrive before the reply are skipped.
    ///
    /// # Errors
    /// `TimedOut` after `timeout`; `UnexpectedEof` when the server closes the connection
    /// without a reply; otherwise the error of read(2) or write(2).
    pub fn request<R: DeserializeOwned>(
        &mut self,
        command: &impl Serialize,
        timeout: Duration,
    ) -> io::Result<R> {
        // One write, so that a server that reads without waiting sees a whole line.
        let mut line = serde_json::to_vec(command)?;
        line.push(b'\n');
        let sent = self.stream.write_all(&line);
        // A server that turns a client away says so without reading the command.
        if !matches!(&sent, Err(error) if error.kind() == ErrorKind::BrokenPipe) {
            sent?;
        }
        let deadline = Instant::now() + timeout;
        while let Some(line) = self.next_line(Some(deadline))? {
            if let Ok(reply) = serde_json::from_slice(&line) {
                return Ok(reply);
            }
        }
        let why = "the server closed the connection without an answer";
        Err(io::Error::new(ErrorKind::UnexpectedEof, why))
    }

    /// Returns the next line without its newline, or `None` at the end of the stream.
    ///
    /// # Errors
    /// `TimedOut` after `deadline`, `InvalidData` for a line longer than [`MAX_LINE`],
    /// otherwise the error of read(2).
    pub fn next_line(&mut self, deadline: Option<Instant>) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.input.iter().position(|&byte| byte == b'\n') {
                let mut line: Vec<u8> = self.input.drain(..=end).collect();
                line.pop();
                return Ok(Some(line));
            }
            if self.input.len() >= MAX_LINE {
                let why = format!("a line is longer than {MAX_LINE} bytes");
                return Err(io::Error::new(ErrorKind::InvalidData, why));
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(io::Error::new(ErrorKind::TimedOut, "no answer in time"));
            }
            self.stream.set_read_timeout(left)?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(None),
                Ok(count) => self.input.extend_from_slice(&buffer[..count]),
                // WouldBlock is the read timeout; the loop turns it into TimedOut.
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_arrive_whole_and_have_limits_in_time_and_length() {
        let (server, mut peer) = UnixStream::pair().unwrap();
        let mut client = ControlClient::new(server).unwrap();
        peer.write_all(b"one\ntw").unwrap();
        assert_eq!(client.next_line(None).unwrap().unwrap(), b"one");
        let soon = Instant::now() + Duration::from_millis(20);
        let late = client.next_line(Some(soon)).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::TimedOut);
        peer.write_all(b"o\n").unwrap();
        assert_eq!(client.next_line(None).unwrap().unwrap(), b"two");
        let long = std::thread::spawn(move || {
            let _ = peer.write_all(&vec![b'x'; 2 * MAX_LINE]);
        });
        let error = client.next_line(None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        drop(client);
        long.join().unwrap();
    }

    #[test]
    fn a_reply_is_found_among_events() {
        #[derive(serde::Deserialize)]
        struct Reply {
            ok: bool,
        }
        let (client, mut server) = UnixStream::pair().unwrap();
        let mut client = ControlClient::new(client).unwrap();
        server
            .write_all(b"{\"event\":\"paused\"}\n{\"ok\":true}\n")
            .unwrap();
        let reply: Reply = client.request(&"pause", Duration::from_secs(9)).unwrap();
        assert!(reply.ok);
        drop(server);
        let ended = client.request::<Reply>(&"pause", Duration::from_secs(9));
        assert!(ended.is_err());
    }

    #[test]
    fn a_refusal_sent_before_the_command_is_the_reply() {
        let (client, mut server) = UnixStream::pair().unwrap();
        server.write_all(b"{\"ok\":false}\n").unwrap();
        drop(server);
        let mut client = ControlClient::new(client).unwrap();
        let reply: serde_json::Value = client.request(&"pause", Duration::from_secs(9)).unwrap();
        assert_eq!(reply["ok"], false);
    }
}

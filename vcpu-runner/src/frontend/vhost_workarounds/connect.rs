//! Connects without waiting for the back end to answer.
//!
//! connect(2) succeeds as soon as a socket listens, even if its process is stopped or
//! still starting. Whether a process serves it shows only in its reply to the first
//! message, GET_FEATURES. That message is sent by hand here, so that the device task
//! can serve its mailbox until the reply is readable.
//!
//! * Call in vhost 0.18: `Frontend::get_features`.
//! * Limit: it sends the request and waits for the reply in one call.
//! * Upstream would have to split requests into sending and receiving, or to offer an
//!   asynchronous front end.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{HEADER_LENGTH, VERSION, is_reply, words};

/// Number of the message (vhost-user, "Front-end message types").
const GET_FEATURES: u32 = 1;
/// Length of the payload of the reply: the feature bits.
const PAYLOAD_LENGTH: usize = 8;
const REPLY_LENGTH: usize = HEADER_LENGTH + PAYLOAD_LENGTH;

/// A connection on which GET_FEATURES has been sent.
pub struct ConnectAttempt {
    socket: UnixStream,
    reply: [u8; REPLY_LENGTH],
    received: usize,
}

impl ConnectAttempt {
    /// Connects to `path` and sends GET_FEATURES, without waiting for the reply.
    ///
    /// # Errors
    /// When no process listens at `path`.
    pub fn start(path: &Path) -> io::Result<Self> {
        let mut socket = outrigger_cli::socket::connect(path, None)?;
        let header = [GET_FEATURES, VERSION, 0];
        socket.write_all(&header.map(u32::to_ne_bytes).concat())?;
        Ok(ConnectAttempt {
            socket,
            reply: [0; REPLY_LENGTH],
            received: 0,
        })
    }

    /// The socket to poll: it is readable when more of the reply has come.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Receives what has come of the reply; true when it is complete. Some back ends
    /// send header and payload separately.
    ///
    /// # Errors
    /// When the process closed the connection, or sent something else.
    pub fn receive_reply(&mut self) -> io::Result<bool> {
        let length = self.socket.read(&mut self.reply[self.received..])?;
        if length == 0 {
            return Err(io::Error::other("the process closed the connection"));
        }
        self.received += length;
        if self.received < REPLY_LENGTH {
            return Ok(false);
        }
        let Some((header, _)) = self.reply.split_first_chunk::<HEADER_LENGTH>() else {
            return Ok(false);
        };
        let header = words(header);
        if !is_reply(header, GET_FEATURES) || header[2] as usize != PAYLOAD_LENGTH {
            let why = format!("the reply to GET_FEATURES has header {header:x?}");
            return Err(io::Error::other(why));
        }
        Ok(true)
    }

    /// The connection, for the handshake.
    pub fn into_socket(self) -> UnixStream {
        self.socket
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// Sends `parts` as the reply; returns whether the attempt takes them for one.
    fn reply_with(parts: &[&[u8]]) -> io::Result<bool> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        // The connection is not accepted yet, and the attempt does not wait for that.
        let mut attempt = ConnectAttempt::start(&path).unwrap();
        let (mut process, _) = listener.accept().unwrap();
        let mut request = [0; 12];
        process.read_exact(&mut request).unwrap();
        assert_eq!(request, [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        let mut complete = Ok(false);
        for part in parts {
            process.write_all(part).unwrap();
            complete = attempt.receive_reply();
        }
        drop(process);
        match complete {
            Ok(false) => attempt.receive_reply(),
            complete => complete,
        }
    }

    #[test]
    fn only_a_proper_reply_is_accepted_whole_or_in_parts() {
        let mut reply = [1u32, 5, 8].map(u32::to_ne_bytes).concat();
        reply.extend([0; 8]);
        assert!(reply_with(&[&reply]).unwrap());
        assert!(reply_with(&[&reply[..12], &reply[12..]]).unwrap());
        for (at, wrong) in [(0, 2), (4, 1), (8, 4)] {
            let mut bad = reply.clone();
            bad[at] = wrong;
            assert!(reply_with(&[&bad]).is_err());
        }
        assert!(reply_with(&[&reply[..19]]).is_err());
        assert!(reply_with(&[]).is_err());
        assert!(ConnectAttempt::start(Path::new("/nonexistent/socket")).is_err());
    }
}

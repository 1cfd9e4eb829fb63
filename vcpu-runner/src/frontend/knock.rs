//! Waiting for a process to come: the first message, GET_FEATURES, by hand.
//!
//! A listening socket takes a connection although nobody may be there to serve it
//! (its process starts just now, or is stopped). Crate vhost's front end would wait
//! for the answer and for nothing else; here the slot's thread goes on serving its
//! mailbox until the answer is there to be read.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Number of the message (vhost-user, "Front-end message types").
const GET_FEATURES: u32 = 1;
/// Protocol version 1 in the header's flags, and the flag of an answer.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
/// Request, flags, size, and then the feature bits.
const ANSWER: usize = 20;

/// A connection on which GET_FEATURES was sent.
pub struct Knock {
    socket: UnixStream,
    answer: [u8; ANSWER],
    length: usize,
}

impl Knock {
    /// Connects to `path` and asks, without waiting for either.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn new(path: &Path) -> io::Result<Self> {
        let mut socket = outrigger_cli::socket::connect(path, None)?;
        let words = [GET_FEATURES, VERSION, 0];
        socket.write_all(&words.map(u32::to_ne_bytes).concat())?;
        Ok(Knock {
            socket,
            answer: [0; ANSWER],
            length: 0,
        })
    }

    /// For polling: readable when more of the answer is there.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Takes what has come, without waiting for more; whether that is all. (Some send
    /// header and payload apart.)
    ///
    /// # Errors
    /// When the process has left, or answers something else.
    pub fn answered(&mut self) -> io::Result<bool> {
        let length = self.socket.read(&mut self.answer[self.length..])?;
        if length == 0 {
            return Err(io::Error::other("the process has left"));
        }
        self.length += length;
        if self.length < ANSWER {
            return Ok(false);
        }
        let answer = &self.answer;
        let word = |at: usize| {
            u32::from_ne_bytes([answer[at], answer[at + 1], answer[at + 2], answer[at + 3]])
        };
        let is_answer = word(0) == GET_FEATURES
            && word(4) & 3 == VERSION
            && word(4) & REPLY != 0
            && word(8) == 8;
        if !is_answer {
            return Err(io::Error::other("no answer to GET_FEATURES"));
        }
        Ok(true)
    }

    /// The connection, for the handshake proper.
    pub fn into_socket(self) -> UnixStream {
        self.socket
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn answered_with(parts: &[&[u8]]) -> io::Result<bool> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        // Nobody accepts yet, and that is no reason to wait.
        let mut knock = Knock::new(&path).unwrap();
        let (mut process, _) = listener.accept().unwrap();
        let mut question = [0; 12];
        process.read_exact(&mut question).unwrap();
        assert_eq!(question, [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        let mut all = Ok(false);
        for part in parts {
            process.write_all(part).unwrap();
            all = knock.answered();
        }
        drop(process);
        match all {
            Ok(false) => knock.answered(),
            all => all,
        }
    }

    #[test]
    fn an_answer_is_taken_and_nothing_else() {
        let mut answer = [1u32, 5, 8].map(u32::to_ne_bytes).concat();
        answer.extend([0; 8]);
        assert!(answered_with(&[&answer]).unwrap());
        assert!(answered_with(&[&answer[..12], &answer[12..]]).unwrap());
        for (at, wrong) in [(0, 2), (4, 1), (8, 4)] {
            let mut bad = answer.clone();
            bad[at] = wrong;
            assert!(answered_with(&[&bad]).is_err());
        }
        assert!(answered_with(&[&answer[..19]]).is_err());
        assert!(answered_with(&[]).is_err());
        assert!(Knock::new(Path::new("/nonexistent/socket")).is_err());
    }
}

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
pub struct Knock(UnixStream);

impl Knock {
    /// Connects to `path` and asks, without waiting for either.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn new(path: &Path) -> io::Result<Self> {
        let mut socket = outrigger_cli::socket::connect(path, None)?;
        let words = [GET_FEATURES, VERSION, 0];
        socket.write_all(&words.map(u32::to_ne_bytes).concat())?;
        Ok(Knock(socket))
    }

    /// For polling: readable when the answer is there.
    pub fn socket(&self) -> &UnixStream {
        &self.0
    }

    /// Takes the answer, which has begun to arrive, and returns the connection for
    /// the handshake proper.
    ///
    /// # Errors
    /// When the process has left, or answers something else.
    pub fn answered(mut self) -> io::Result<UnixStream> {
        let mut answer = [0; ANSWER];
        // So short a message comes whole or, from a process that lies, not at all.
        let length = self.0.read(&mut answer)?;
        if length == 0 {
            return Err(io::Error::other("the process has left"));
        }
        let word = |at: usize| {
            u32::from_ne_bytes([answer[at], answer[at + 1], answer[at + 2], answer[at + 3]])
        };
        let is_answer = length == ANSWER
            && word(0) == GET_FEATURES
            && word(4) & 3 == VERSION
            && word(4) & REPLY != 0
            && word(8) == 8;
        if !is_answer {
            return Err(io::Error::other("no answer to GET_FEATURES"));
        }
        Ok(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn answered_with(answer: &[u8]) -> io::Result<UnixStream> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        // Nobody accepts yet, and that is no reason to wait.
        let knock = Knock::new(&path).unwrap();
        let (mut process, _) = listener.accept().unwrap();
        let mut question = [0; 12];
        process.read_exact(&mut question).unwrap();
        assert_eq!(question, [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        process.write_all(answer).unwrap();
        drop(process);
        knock.answered()
    }

    #[test]
    fn an_answer_is_taken_and_nothing_else() {
        let mut answer = [1u32, 5, 8].map(u32::to_ne_bytes).concat();
        answer.extend([0; 8]);
        answered_with(&answer).unwrap();
        for (at, wrong) in [(0, 2), (4, 1), (8, 4)] {
            let mut bad = answer.clone();
            bad[at] = wrong;
            assert!(answered_with(&bad).is_err());
        }
        assert!(answered_with(&answer[..19]).is_err());
        assert!(answered_with(&[]).is_err());
        assert!(Knock::new(Path::new("/nonexistent/socket")).is_err());
    }
}

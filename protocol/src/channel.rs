//! Messages with file descriptors over a unix stream socket: a 32-bit
//! little-endian length, then that many bytes of JSON. The descriptors ride on
//! the length word (`SCM_RIGHTS`, unix(7)).

use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use serde::{Serialize, de::DeserializeOwned};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The largest message body in bytes; a longer one is refused unread.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The most file descriptors in one message.
pub const MAX_FDS: usize = 32;

/// Sends `message` with `fds` attached.
///
/// # Errors
/// The socket's own, or `InvalidInput` when the message does not fit.
pub fn send<T: Serialize>(stream: &UnixStream, message: &T, fds: &[RawFd]) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    if body.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "message too large",
        ));
    }
    let length = (body.len() as u32).to_le_bytes();
    // Four bytes are sent whole or not at all on a unix stream socket.
    let sent = stream
        .send_with_fds(&[&length[..]], fds)
        .map_err(io::Error::from)?;
    if sent != length.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    (&*stream).write_all(&body)
}

/// Receives one message and its descriptors; blocks as the socket does.
///
/// # Errors
/// `UnexpectedEof` when the peer has closed, `InvalidData` for a message that
/// is too long, carries too many descriptors or does not parse.
pub fn receive<T: DeserializeOwned>(stream: &UnixStream) -> io::Result<(T, Vec<OwnedFd>)> {
    let mut length = [0u8; 4];
    let mut raw = [-1; MAX_FDS];
    let mut iovecs = [libc::iovec {
        iov_base: length.as_mut_ptr().cast(),
        iov_len: length.len(),
    }];
    // SAFETY: the iovec describes `length`, which outlives the call.
    let (count, fd_count) =
        unsafe { stream.recv_with_fds(&mut iovecs, &mut raw) }.map_err(io::Error::from)?;
    let fds: Vec<OwnedFd> = raw[..fd_count]
        .iter()
        // SAFETY: the kernel has just installed these descriptors for us.
        .map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) })
        .collect();
    if count == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut reader = stream;
    reader.read_exact(&mut length[count..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(invalid(format!("a message of {length} bytes")));
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let message = serde_json::from_slice(&body).map_err(|e| invalid(e.to_string()))?;
    Ok((message, fds))
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        send(&a, &vec![1u32, 2, 3], &[writer.as_raw_fd()]).unwrap();
        drop(writer);
        let (message, fds) = receive::<Vec<u32>>(&b).unwrap();
        assert_eq!((message, fds.len()), (vec![1, 2, 3], 1));
        io::PipeWriter::from(fds.into_iter().next().unwrap())
            .write_all(b"x")
            .unwrap();
        let mut got = String::new();
        reader.read_to_string(&mut got).unwrap();
        assert_eq!(got, "x");
    }

    #[test]
    fn a_closed_peer_and_an_absurd_length_are_errors() {
        let (a, b) = UnixStream::pair().unwrap();
        (&a).write_all(&u32::MAX.to_le_bytes()).unwrap();
        let error = receive::<u32>(&b).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(a);
        let error = receive::<u32>(&b).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

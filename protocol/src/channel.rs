//! Messages with file descriptors over a unix stream socket: a 32-bit little-endian length
//! and a JSON body of that many bytes. The descriptors are attached to the length word
//! (`SCM_RIGHTS`, unix(7)).

use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use serde::{Serialize, de::DeserializeOwned};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The largest message body in bytes. [`receive`] rejects a longer one before reading it.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The largest number of file descriptors in one message.
pub const MAX_FDS: usize = 32;

/// Sends `message` with `fds` attached.
///
/// # Errors
/// `InvalidInput` when the body is longer than [`MAX_MESSAGE`] or there are more
/// descriptors than [`MAX_FDS`]; otherwise the error of sendmsg(2).
pub fn send<T: Serialize>(stream: &UnixStream, message: &T, fds: &[RawFd]) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    if body.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        let why = format!(
            "a message of {} bytes and {} descriptors is too large",
            body.len(),
            fds.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let length = (body.len() as u32).to_le_bytes();
    // A unix stream socket does not split so short a message.
    let sent = stream
        .send_with_fds(&[&length[..]], fds)
        .map_err(io::Error::from)?;
    if sent != length.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    (&*stream).write_all(&body)
}

/// Receives one message and its descriptors. Blocks unless the socket is non-blocking.
///
/// # Errors
/// `UnexpectedEof` when the peer has closed the connection; `InvalidData` for a body that
/// is longer than [`MAX_MESSAGE`] or does not parse; otherwise the error of recvmsg(2),
/// also when the message carries more than [`MAX_FDS`] descriptors.
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
        // SAFETY: recvmsg(2) installed these descriptors for this message, and nothing
        // else owns them.
        .map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) })
        .collect();
    if count == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut reader = stream;
    reader.read_exact(&mut length[count..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(invalid(format!(
            "a message of {length} bytes is longer than {MAX_MESSAGE}"
        )));
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
    fn a_closed_peer_and_an_excessive_length_are_errors() {
        let (a, b) = UnixStream::pair().unwrap();
        (&a).write_all(&u32::MAX.to_le_bytes()).unwrap();
        let error = receive::<u32>(&b).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(a);
        let error = receive::<u32>(&b).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

//! vhost-user messages by hand, which crate vhost's front end would never send.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::DEADLINE;

/// Protocol version 1.
pub const VERSION: u32 = 1;
/// The front end wants an answer (REPLY_ACK).
pub const NEED_REPLY: u32 = 1 << 3;

/// Sends a header that announces `size` bytes, and then `body`.
pub fn send(
    stream: &UnixStream,
    request: u32,
    flags: u32,
    size: u32,
    body: &[u8],
    fds: &[BorrowedFd<'_>],
) -> std::io::Result<()> {
    let header = [request, flags, size].map(u32::to_le_bytes).concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let parts = [IoSlice::new(&header), IoSlice::new(body)];
    sendmsg(stream, &parts, &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The body of the next message from the device.
pub fn receive(mut stream: &UnixStream) -> Vec<u8> {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut header = [0; 12];
    stream.read_exact(&mut header).unwrap();
    let mut size = [0; 4];
    size.copy_from_slice(&header[8..]);
    let mut body = vec![0; u32::from_le_bytes(size) as usize];
    stream.read_exact(&mut body).unwrap();
    body
}

/// Whether the device closes the connection before the deadline.
pub fn hangs_up(mut stream: &UnixStream) -> bool {
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut bytes = [0; 256];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

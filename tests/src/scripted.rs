//! A scripted vhost-user back end. It follows the protocol (vhost-user, "Message types")
//! except where its script deviates.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

/// Numbers of front-end messages.
pub mod request {
    #![allow(missing_docs)]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_KICK: u32 = 12;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
}

/// VIRTIO_F_VERSION_1 and VHOST_USER_F_PROTOCOL_FEATURES.
const FEATURES: u64 = 1 << 32 | 1 << 30;
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG.
const PROTOCOL_FEATURES: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 9;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// What the back end does with a message.
pub enum Answer {
    /// Follow the protocol.
    Proper,
    /// Answer with these bytes and this number of descriptors.
    Bytes(Vec<u8>, usize),
    /// Send a well-formed answer with this payload.
    Payload(Vec<u8>),
    /// Send these bytes on the back-end channel, and a proper answer.
    Channel(Vec<u8>),
    /// Do not answer this message or any later one.
    Silence,
    /// Close the connection.
    Close,
}

/// A message's or an answer's header.
pub fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

/// A well-formed answer.
pub fn answer(request: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header(request, VERSION | REPLY, payload.len() as u32);
    bytes.extend(payload);
    bytes
}

/// Serves one front end on a new socket `path` by `script`, which is given the
/// number of each message. It ends with the connection.
pub fn serve(path: &Path, script: impl Fn(u32) -> Answer + Send + 'static) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        // Either side may close the connection at any point.
        let _ = run(stream, script);
    });
}

fn run(mut stream: UnixStream, script: impl Fn(u32) -> Answer) -> std::io::Result<()> {
    let mut channel = None;
    loop {
        let (request, flags, payload, fds) = receive(&mut stream)?;
        match script(request) {
            Answer::Proper if request == request::SET_BACKEND_REQ_FD => {
                channel = fds.into_iter().next().map(UnixStream::from);
            }
            Answer::Proper => {}
            Answer::Bytes(bytes, fds) => {
                send(&stream, &bytes, fds)?;
                continue;
            }
            Answer::Payload(payload) => {
                stream.write_all(&answer(request, &payload))?;
                continue;
            }
            Answer::Channel(bytes) => channel.as_ref().unwrap().write_all(&bytes)?,
            Answer::Silence => {
                // Until the other side closes the connection.
                while stream.read(&mut [0; 512])? > 0 {}
                return Ok(());
            }
            Answer::Close => return Ok(()),
        }
        let number = |value: u64| answer(request, &value.to_ne_bytes());
        let proper = match request {
            request::GET_FEATURES => number(FEATURES),
            request::GET_PROTOCOL_FEATURES => number(PROTOCOL_FEATURES),
            request::GET_QUEUE_NUM => number(1),
            request::GET_CONFIG => answer(request, &payload),
            _ if flags & NEED_REPLY != 0 => number(0),
            _ => continue,
        };
        stream.write_all(&proper)?;
    }
}

type Message = (u32, u32, Vec<u8>, Vec<OwnedFd>);

fn receive(stream: &mut UnixStream) -> std::io::Result<Message> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut header = [0; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [std::io::IoSliceMut::new(&mut header)];
    let message = rustix::net::recvmsg(
        stream.as_fd(),
        &mut parts,
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL,
    )?;
    if message.bytes < 12 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let fds = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut payload = vec![0; word(8) as usize];
    stream.read_exact(&mut payload)?;
    Ok((word(0), word(4), payload, fds))
}

fn send(stream: &UnixStream, bytes: &[u8], fds: usize) -> std::io::Result<()> {
    let passed: Vec<BorrowedFd<'_>> = vec![stream.as_fd(); fds];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    if fds > 0 {
        control.push(rustix::net::SendAncillaryMessage::ScmRights(&passed));
    }
    let parts = [IoSlice::new(bytes)];
    rustix::net::sendmsg(
        stream,
        &parts,
        &mut control,
        rustix::net::SendFlags::empty(),
    )?;
    Ok(())
}

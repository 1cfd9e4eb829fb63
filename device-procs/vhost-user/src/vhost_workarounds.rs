//! Workarounds for the limits of crate `vhost` 0.18 at the back end, all in one place. Each
//! one names the call that it replaces or prepares, and what upstream would have to change.
//!
//! 1. [`early_vring_enable`]: `BackendReqHandler::handle_request` refuses SET_VRING_ENABLE
//!    before SET_FEATURES. Upstream: accept it once the front end has sent
//!    SET_PROTOCOL_FEATURES, which it may do only if PROTOCOL_FEATURES was offered.
//! 2. [`peek`]: `BackendReqHandler::handle_request` does not tell which message it handled,
//!    nor whether it sent the result to the front end, so a caller cannot tell a failure
//!    that the front end knows from one that it does not. Upstream: return the header.
//! 3. [`config_change_message`]: `vhost_user::Backend`, which crate vhost hands to
//!    `VhostUserBackendReqHandlerMut::set_backend_req_fd`, does not implement
//!    `VhostUserFrontendReqHandler::handle_config_change` and keeps its socket private. So
//!    [`peek`] duplicates the descriptor (a peek at ancillary data does that, unix(7)), and
//!    [`crate::ConfigSpace`] sends the message itself. Upstream: implement that method.
//! 4. `MemoryTable::add` ([`crate::memory`]) checks every field of a region, because crate
//!    vhost calls `VhostUserBackendReqHandlerMut::add_mem_region` (ADD_MEM_REG) with a
//!    region that it has not validated, unlike the regions of SET_MEM_TABLE. Upstream: a
//!    `VhostUserMsgValidator::is_valid` for `VhostUserSingleMemoryRegion`.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::session::VhostUserSession;

// Requests (vhost-user, "Front-end message types").
const SET_LOG_BASE: u32 = 6;
const GET_VRING_BASE: u32 = 11;
/// Request number of SET_VRING_ENABLE.
pub const SET_VRING_ENABLE: u32 = 18;
/// Request number of SET_BACKEND_REQ_FD.
pub const SET_BACKEND_REQ_FD: u32 = 21;
const GET_INFLIGHT_FD: u32 = 31;
/// Request number of CONFIG_CHANGE_MSG (vhost-user, "Back-end message types").
const CONFIG_CHANGE_MSG: u32 = 2;

// The header: request, flags and the size of the body, 32 bits each.
const HEADER_SIZE: usize = 12;
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Size of the body of SET_VRING_ENABLE: queue index and state.
const VRING_STATE_SIZE: u32 = 8;

/// The header of a message that has not been read yet.
pub struct PeekedMessage {
    /// Request number.
    pub request: u32,
    flags: u32,
    /// A duplicate of the message's first descriptor.
    pub fd: Option<OwnedFd>,
}

impl PeekedMessage {
    /// Whether crate vhost reports a failure of this message to the front end: it asked for
    /// a reply (need_reply), and the message has no reply of its own, which could not
    /// carry the failure.
    pub fn reports_failure(&self) -> bool {
        let has_own_reply = [SET_LOG_BASE, GET_VRING_BASE, GET_INFLIGHT_FD];
        self.flags & NEED_REPLY != 0 && !has_own_reply.contains(&self.request)
    }
}

/// Waits for the next message and returns its header without reading it; `None` when the
/// front end has disconnected.
///
/// # Errors
/// recvmsg(2) fails.
pub fn peek(stream: &UnixStream) -> io::Result<Option<PeekedMessage>> {
    let mut header = [0u8; HEADER_SIZE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    loop {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            stream,
            &mut [io::IoSliceMut::new(&mut header)],
            &mut ancillary,
            RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC,
        );
        match received {
            Ok(message) if message.bytes == 0 => return Ok(None),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let fd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        // A header that has arrived only in part reads as zeros, which is no request that
        // needs a workaround. Crate vhost then waits for the rest.
        let [request, flags, _] = words(&header);
        return Ok(Some(PeekedMessage { request, flags, fd }));
    }
}

/// Handles the SET_VRING_ENABLE that waits in `stream`, before SET_FEATURES.
///
/// QEMU enables the rings of a network device as soon as the protocol features are
/// negotiated, and acknowledges PROTOCOL_FEATURES only later. The specification wants the
/// feature "negotiated" without saying when.
///
/// # Errors
/// The socket fails, the message has a wrong form, or it fails and the front end did not
/// ask for a reply.
pub fn early_vring_enable(
    mut stream: &UnixStream,
    session: &mut VhostUserSession,
) -> io::Result<()> {
    let malformed = || io::Error::other("SET_VRING_ENABLE is malformed");
    let mut header = [0; HEADER_SIZE];
    stream.read_exact(&mut header)?;
    let [_, flags, size] = words(&header);
    // The body is read only if it has the right size: what follows may be another message.
    if size != VRING_STATE_SIZE || flags & VERSION_MASK != VERSION {
        return Err(malformed());
    }
    let mut body = [0; VRING_STATE_SIZE as usize];
    stream.read_exact(&mut body)?;
    let [index, state] = words(&body);
    if state > 1 {
        return Err(malformed());
    }
    let result = session.set_vring_enable(index, state == 1);
    if !session.has_protocol_feature(VhostUserProtocolFeatures::REPLY_ACK)
        || flags & NEED_REPLY == 0
    {
        return result.map_err(io::Error::other);
    }
    if let Err(error) = &result {
        tracing::warn!("{error}");
    }
    let mut reply = [SET_VRING_ENABLE, VERSION | REPLY, VRING_STATE_SIZE]
        .map(u32::to_le_bytes)
        .concat();
    reply.extend(u64::from(result.is_err()).to_le_bytes());
    stream.write_all(&reply)
}

/// The message CONFIG_CHANGE_MSG, which has no body, for the back-end channel.
pub fn config_change_message() -> [u8; HEADER_SIZE] {
    let mut message = [0; HEADER_SIZE];
    message[..4].copy_from_slice(&CONFIG_CHANGE_MSG.to_le_bytes());
    message[4..8].copy_from_slice(&VERSION.to_le_bytes());
    message
}

fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

//! SET_VRING_ENABLE before SET_FEATURES.
//!
//! QEMU enables the rings of a network card as soon as the protocol features are
//! negotiated, and acknowledges the feature bit that stands for them only later.
//! The specification wants the bit "negotiated" and says no more of the order; crate
//! vhost refuses. So this one message is taken from the socket here when it comes
//! that early.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::session::VhostUserSession;

/// Number of the request (vhost-user, "Front-end message types").
pub const SET_VRING_ENABLE: u32 = 18;
/// Length of its body: queue index and state.
const BODY: u32 = 8;
/// Version 1 in the header's flags, and the flag that says that it is a reply.
const VERSION: u32 = 1;
const VERSION_BITS: u32 = 3;
const REPLY: u32 = VERSION | 1 << 2;
/// need_reply in the header's flags.
const NEED_REPLY: u32 = 1 << 3;

/// Takes the message that waits in `stream`, whose header has been looked at, and
/// does what it says.
///
/// # Errors
/// The socket's; a message of a wrong form; and a request that cannot be done and
/// that nobody would be told of.
pub fn take(mut stream: &UnixStream, session: &mut VhostUserSession) -> io::Result<()> {
    let mut header = [0; 12];
    stream.read_exact(&mut header)?;
    let [_, flags, size] = words(&header);
    // The body is read only if it is one: what follows may be another message.
    if size != BODY || flags & VERSION_BITS != VERSION {
        return Err(io::Error::other("SET_VRING_ENABLE of a wrong form"));
    }
    let mut body = [0; BODY as usize];
    stream.read_exact(&mut body)?;
    let [index, state] = words(&body);
    if state > 1 {
        return Err(io::Error::other("SET_VRING_ENABLE of a wrong form"));
    }
    let result = session.set_vring_enable(index, state == 1);
    if !session.negotiated(VhostUserProtocolFeatures::REPLY_ACK) || flags & NEED_REPLY == 0 {
        return result.map_err(io::Error::other);
    }
    if let Err(error) = &result {
        tracing::warn!("{error}");
    }
    let mut reply = [SET_VRING_ENABLE, REPLY, BODY]
        .map(u32::to_le_bytes)
        .concat();
    reply.extend(u64::from(result.is_err()).to_le_bytes());
    stream.write_all(&reply)
}

fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

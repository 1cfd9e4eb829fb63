//! What the runner does itself because crate vhost 0.18 cannot. Each workaround is one
//! module and can go when upstream changes what is named here.
//!
//! | module | call in vhost 0.18 | limit | what upstream would have to change |
//! |---|---|---|---|
//! | [`watchdog`] | all of `Frontend`, `FrontendReqHandler::handle_request` (`recv_into_iovec_all`) | retries EAGAIN without end, so a receive timeout on the socket has no effect and a silent peer blocks the caller | return EAGAIN to the caller, or take a deadline |
//! | [`connect`] | `Frontend::get_features` | sends and receives in one call, so its thread can serve nothing else until the peer answers | split each request into sending and receiving, or offer an asynchronous front end |
//! | [`get_config`] | `Frontend::get_config` (`recv_payload_into_buf`) | a back end refuses a length by a reply without payload; the call then waits for the payload without end | read the header first, and take size 0 for a refusal |
//! | [`unsolicited`] | all of `Frontend` | takes the next message in the socket for the reply to the request just sent, so data that was there before shifts all replies | check that nothing is readable before a request is sent |

pub mod connect;
pub mod get_config;
pub mod unsolicited;
pub mod watchdog;

/// Length of a message header: request, flags and payload size, 32 bits each.
const HEADER_LENGTH: usize = 12;
/// Protocol version 1, in the flags of the header.
const VERSION: u32 = 1;
/// The bits of the flags that hold the version.
const VERSION_MASK: u32 = 3;
/// The flag of a reply.
const REPLY: u32 = 1 << 2;

/// Three 32-bit words in host byte order: a header, or the fixed part of a
/// configuration space message.
fn words(bytes: &[u8; 12]) -> [u32; 3] {
    let mut words = [0; 3];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    words
}

/// Whether a header is that of the reply to `request`.
fn is_reply(header: [u32; 3], request: u32) -> bool {
    let [header_request, flags, _] = header;
    header_request == request && flags & VERSION_MASK == VERSION && flags & REPLY != 0
}

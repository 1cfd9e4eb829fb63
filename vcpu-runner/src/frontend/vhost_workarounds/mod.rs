//! What the runner does itself because crate vhost 0.18 cannot. Each module is one
//! workaround; its head names the call, the limit, and what upstream would have to change
//! so that the module can go.

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

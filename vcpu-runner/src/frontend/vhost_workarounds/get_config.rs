//! Reads a configuration space whose length is unknown.
//!
//! A front end cannot ask for the length of a device's configuration space. Some back
//! ends fill whatever length they are asked for. Some refuse more than their structure
//! has (qemu-storage-daemon). Some accept that one length only. The runner does not know
//! the device types' structures, so it asks for the largest length it has room for and
//! then for less, until the back end agrees.
//!
//! * Call in vhost 0.18: `Frontend::get_config`, which ends in
//!   `Endpoint::recv_payload_into_buf`.
//! * Limit: a back end refuses a length by a reply without payload, and the call then
//!   waits for the payload without end.
//! * Upstream would have to read the header first, and take size 0 for a refusal.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use super::{HEADER_LENGTH, VERSION, is_reply, words};

/// Number of the message (vhost-user, "Front-end message types").
const GET_CONFIG: u32 = 24;
/// Length of offset, size and flags, which precede the bytes of the space.
const FIXED_LENGTH: usize = 12;

/// Reads the bytes from the start of the space: as many as the back end gives, up to
/// `longest`. `known_length` is asked for first: the length that the space had before. If a
/// reconnected back end has a longer one, the rest is not seen until the next swap.
///
/// # Errors
/// When the process is gone, sends something else, or refuses every length.
pub fn read(
    socket: &UnixStream,
    known_length: Option<usize>,
    longest: usize,
) -> io::Result<Vec<u8>> {
    for length in known_length.into_iter().chain((1..=longest).rev()) {
        if let Some(bytes) = request(socket, length, longest)? {
            return Ok(bytes);
        }
    }
    Err(io::Error::other(format!(
        "the back end refuses every length from 1 to {longest}"
    )))
}

/// Asks for `length` bytes; `None` when the back end refuses this length.
fn request(mut socket: &UnixStream, length: usize, longest: usize) -> io::Result<Option<Vec<u8>>> {
    let mut message = Vec::with_capacity(HEADER_LENGTH + FIXED_LENGTH + length);
    for word in [GET_CONFIG, VERSION, (FIXED_LENGTH + length) as u32] {
        message.extend(word.to_ne_bytes());
    }
    for word in [0, length as u32, 0] {
        message.extend(word.to_ne_bytes());
    }
    message.resize(HEADER_LENGTH + FIXED_LENGTH + length, 0);
    socket.write_all(&message)?;

    let mut header = [0; HEADER_LENGTH];
    receive(socket, &mut header)?;
    let header = words(&header);
    if !is_reply(header, GET_CONFIG) {
        let why = format!("the reply has header {header:x?}");
        return Err(io::Error::other(why));
    }
    let size = header[2] as usize;
    if size > FIXED_LENGTH + longest {
        return Err(io::Error::other(format!("the reply has {size} bytes")));
    }
    let mut body = vec![0; size];
    receive(socket, &mut body)?;
    let Some((fixed, bytes)) = body.split_first_chunk::<FIXED_LENGTH>() else {
        return match size {
            0 => Ok(None),
            _ => Err(io::Error::other(format!("the reply has {size} bytes"))),
        };
    };
    match words(fixed) {
        [_, 0, _] => Ok(None),
        [0, given, _] if given as usize == length && bytes.len() == length => {
            Ok(Some(bytes.to_vec()))
        }
        [offset, given, _] => Err(io::Error::other(format!(
            "{length} bytes at offset 0 were asked for; the reply has {} bytes and says {given} \
             bytes at offset {offset}",
            bytes.len()
        ))),
    }
}

fn receive(mut socket: &UnixStream, bytes: &mut [u8]) -> io::Result<()> {
    socket.read_exact(bytes).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::other("the process closed the connection"),
        _ => e,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: usize = 256;

    /// Reads from a back end that replies to each request for `length` bytes with what
    /// `reply` returns. Returns the result and the number of requests.
    fn read_from(
        reply: impl Fn(usize) -> Vec<u8> + Send + 'static,
        known_length: Option<usize>,
        longest: usize,
    ) -> (io::Result<Vec<u8>>, usize) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let mut header = [0; HEADER_LENGTH];
            let mut requests = 0;
            while theirs.read_exact(&mut header).is_ok() {
                requests += 1;
                let length = words(&header)[2] as usize - FIXED_LENGTH;
                theirs
                    .read_exact(&mut vec![0; FIXED_LENGTH + length])
                    .unwrap();
                theirs.write_all(&reply(length)).unwrap();
            }
            requests
        });
        let result = read(&ours, known_length, longest);
        drop(ours);
        (result, thread.join().unwrap())
    }

    fn message(request: u32, flags: u32, fixed: Option<[u32; 3]>, bytes: &[u8]) -> Vec<u8> {
        let size = fixed.map_or(0, |_| FIXED_LENGTH) + bytes.len();
        let header = [request, flags, size as u32];
        let words = header.iter().chain(fixed.iter().flatten());
        let mut message: Vec<u8> = words.flat_map(|word| word.to_ne_bytes()).collect();
        message.extend(bytes);
        message
    }

    fn given(length: usize) -> Vec<u8> {
        message(24, 5, Some([0, length as u32, 0]), &vec![7; length])
    }

    /// Refuses more than 60 bytes by a reply without payload.
    fn up_to_60(length: usize) -> Vec<u8> {
        match length {
            ..=60 => given(length),
            _ => message(24, 5, None, &[]),
        }
    }

    #[test]
    fn a_space_of_any_length_is_found() {
        let read = |reply: fn(usize) -> Vec<u8>, longest| read_from(reply, None, longest).0;
        assert_eq!(read(given, LONGEST).unwrap().len(), LONGEST);
        assert_eq!(read(given, 8).unwrap(), [7; 8]);
        assert_eq!(read(up_to_60, LONGEST).unwrap(), [7; 60]);
        // Accepts one length only; refuses by a payload of size 0.
        let three = |length| match length {
            3 => given(length),
            _ => message(24, 5, Some([0, 0, 0]), &[]),
        };
        assert_eq!(read(three, LONGEST).unwrap(), [7; 3]);
    }

    #[test]
    fn a_known_length_takes_one_request_and_falls_back_to_the_search() {
        let (bytes, requests) = read_from(up_to_60, Some(60), LONGEST);
        assert_eq!((bytes.unwrap(), requests), (vec![7; 60], 1));
        let (bytes, requests) = read_from(up_to_60, Some(61), 61);
        assert_eq!((bytes.unwrap(), requests), (vec![7; 60], 3));
    }

    #[test]
    fn malformed_replies_are_refused() {
        let cases: [fn(usize) -> Vec<u8>; 7] = [
            |_| message(24, 5, None, &[]),
            |_| message(24, 1, None, &[]),
            |_| message(23, 5, None, &[]),
            |_| message(24, 5, None, &[1; 5]),
            |_| message(24, 5, None, &[1; 300]),
            |length| message(24, 5, Some([0, length as u32, 0]), &[1; 4]),
            |length| message(24, 5, Some([4, length as u32, 0]), &vec![1; length]),
        ];
        for case in cases {
            assert!(read_from(case, None, 20).0.is_err());
        }
    }
}

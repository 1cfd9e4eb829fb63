//! GET_CONFIG, by hand.
//!
//! How long a device's configuration space is cannot be asked. Some processes fill
//! whatever length they are asked for, some refuse more than their structure has
//! (qemu-storage-daemon), some take that one length only. The runner knows no
//! device, so it asks for all that it has room for and then for less. A refusal is
//! an answer without a payload, for which crate vhost's front end waits for ever.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use crate::pci::virtio::CONFIG_LENGTH;

/// Number of the message (vhost-user, "Front-end message types").
const GET_CONFIG: u32 = 24;
/// Protocol version 1 in the header's flags.
const VERSION: u32 = 1;
/// The header's flag of an answer.
const REPLY: u32 = 1 << 2;
/// Request, flags and size.
const HEADER: usize = 12;
/// Offset, size and flags, before the bytes themselves.
const FIXED: usize = 12;

/// The bytes from the start of the space, and as many as the process gives, up to
/// `longest`.
///
/// # Errors
/// When the process is gone, answers with something else, or refuses every length.
pub fn read(socket: &UnixStream, longest: usize) -> io::Result<Vec<u8>> {
    for length in (1..=longest).rev() {
        if let Some(bytes) = ask(socket, length)? {
            return Ok(bytes);
        }
    }
    Err(io::Error::other("refused, whatever the length"))
}

/// `None` when the process refuses this length.
fn ask(mut socket: &UnixStream, length: usize) -> io::Result<Option<Vec<u8>>> {
    let mut message = Vec::with_capacity(HEADER + FIXED + length);
    for word in [GET_CONFIG, VERSION, (FIXED + length) as u32] {
        message.extend(word.to_ne_bytes());
    }
    for word in [0, length as u32, 0] {
        message.extend(word.to_ne_bytes());
    }
    message.resize(HEADER + FIXED + length, 0);
    socket.write_all(&message)?;

    let mut header = [0; HEADER];
    receive(socket, &mut header)?;
    let [request, flags, size] = words(&header);
    if request != GET_CONFIG || flags & 3 != VERSION || flags & REPLY == 0 {
        let why = format!("answered with request {request}, flags {flags:#x}");
        return Err(io::Error::other(why));
    }
    let size = size as usize;
    if size > FIXED + CONFIG_LENGTH {
        return Err(io::Error::other(format!("answered with {size} bytes")));
    }
    let mut body = vec![0; size];
    receive(socket, &mut body)?;
    let Some((fixed, bytes)) = body.split_first_chunk::<FIXED>() else {
        return match size {
            0 => Ok(None),
            _ => Err(io::Error::other(format!("answered with {size} bytes"))),
        };
    };
    match words(fixed) {
        [_, 0, _] => Ok(None),
        [0, said, _] if said as usize == length && bytes.len() == length => {
            Ok(Some(bytes.to_vec()))
        }
        [offset, said, _] => Err(io::Error::other(format!(
            "asked for {length} bytes, answered with {} of offset {offset}, said to be {said}",
            bytes.len()
        ))),
    }
}

fn receive(mut socket: &UnixStream, bytes: &mut [u8]) -> io::Result<()> {
    socket.read_exact(bytes).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::other("the process has left"),
        _ => e,
    })
}

fn words(bytes: &[u8; 12]) -> [u32; 3] {
    let mut words = [0; 3];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that answers each question for `length` bytes with what `answer`
    /// makes of it.
    fn served_by(
        answer: impl Fn(usize) -> Vec<u8> + Send + 'static,
        longest: usize,
    ) -> io::Result<Vec<u8>> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let mut header = [0; HEADER];
            while theirs.read_exact(&mut header).is_ok() {
                let length = words(&header)[2] as usize - FIXED;
                theirs.read_exact(&mut vec![0; FIXED + length]).unwrap();
                theirs.write_all(&answer(length)).unwrap();
            }
        });
        let result = read(&ours, longest);
        drop(ours);
        thread.join().unwrap();
        result
    }

    fn message(request: u32, flags: u32, fixed: Option<[u32; 3]>, bytes: &[u8]) -> Vec<u8> {
        let size = fixed.map_or(0, |_| FIXED) + bytes.len();
        let head = [request, flags, size as u32];
        let words = head.iter().chain(fixed.iter().flatten());
        let mut message: Vec<u8> = words.flat_map(|word| word.to_ne_bytes()).collect();
        message.extend(bytes);
        message
    }

    fn given(length: usize) -> Vec<u8> {
        message(24, 5, Some([0, length as u32, 0]), &vec![7; length])
    }

    #[test]
    fn a_space_of_any_length_is_found() {
        assert_eq!(
            served_by(given, CONFIG_LENGTH).unwrap().len(),
            CONFIG_LENGTH
        );
        assert_eq!(served_by(given, 8).unwrap(), [7; 8]);
        // No more than the structure has; the refusal has no payload at all.
        let up_to_60 = |length| match length {
            ..=60 => given(length),
            _ => message(24, 5, None, &[]),
        };
        assert_eq!(served_by(up_to_60, CONFIG_LENGTH).unwrap(), [7; 60]);
        // One length only; the refusal is a payload of size 0.
        let three = |length| match length {
            3 => given(length),
            _ => message(24, 5, Some([0, 0, 0]), &[]),
        };
        assert_eq!(served_by(three, CONFIG_LENGTH).unwrap(), [7; 3]);
    }

    #[test]
    fn nonsense_is_refused() {
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
            assert!(served_by(case, 20).is_err());
        }
    }
}

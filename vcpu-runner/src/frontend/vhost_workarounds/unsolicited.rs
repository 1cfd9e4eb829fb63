//! Detects data that the back end sent without a request.
//!
//! * Call in vhost 0.18: every request of `Frontend`.
//! * Limit: it takes the next message in the socket for the reply to the request that it
//!   has just sent. Data that was there before shifts all following replies.
//! * Upstream would have to check that nothing is readable before it sends a request.

use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::RecvFlags;

/// What is wrong with a connection on which no request is outstanding; `None` if
/// nothing is. Data that is readable now would be taken for the next reply.
pub fn connection_error(socket: &UnixStream) -> Option<String> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match rustix::net::recv(socket, &mut [0; 1][..], flags) {
        Err(Errno::AGAIN) => None,
        Ok((0, _)) | Err(Errno::CONNRESET) => Some("the process closed the connection".to_owned()),
        Ok((1.., _)) => Some("the process sent data without a request".to_owned()),
        Err(error) => Some(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn an_idle_connection_is_told_from_one_with_data_and_from_a_closed_one() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(connection_error(&ours), None);
        theirs.write_all(&[1]).unwrap();
        let error = connection_error(&ours).unwrap();
        assert!(error.contains("without a request"), "{error}");
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(
            connection_error(&ours).unwrap(),
            "the process closed the connection"
        );
    }
}

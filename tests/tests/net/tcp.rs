//! The guest's side of a TCP connection (RFC 9293), without retransmission, because no frame is
//! lost between guest and host.

use std::net::{TcpListener, TcpStream};

use outrigger_tests::guest::Guest;
use outrigger_tests::net::*;
use outrigger_tests::process::Process;
use outrigger_tests::wait_until;

use crate::in_network_of;

pub const SYN: u8 = 2;
pub const ACK: u8 = 16;
pub const PUSH: u8 = 8;
/// The IPv4 protocol number of TCP.
pub const TCP: u8 = 6;
/// Largest segment of a 1500 byte packet.
pub const MSS: u16 = 1460;
/// Offset of the checksum in the TCP header.
pub const CHECKSUM: usize = 16;

const PORT: u16 = 40_000;

/// A connection.
pub struct TcpConnection {
    pub host: [u8; 6],
    port: u16,
    sent: u32,
    received: u32,
}

impl TcpConnection {
    /// Connects the guest to a server in the network of `process`.
    pub fn open(guest: &mut Guest, process: &Process) -> (Self, TcpStream) {
        let listener = in_network_of(process, || {
            let listener = TcpListener::bind((HOST, 0)).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        });
        let mut connection = TcpConnection {
            host: resolve(guest, GUEST),
            port: listener.local_addr().unwrap().port(),
            sent: 1000,
            received: 0,
        };
        connection.send(guest, SYN, &[]);
        let port = connection.port;
        let (_, answer) = receive_until(guest, |frame| Some(segment_of(frame, port)?.to_vec()));
        assert_eq!(answer[13], SYN | ACK);
        connection.sent += 1;
        connection.received = u32::from_be_bytes(answer[4..8].try_into().unwrap()) + 1;
        connection.send(guest, ACK, &[]);
        let mut server = None;
        wait_until("the host accepts", || {
            server = listener.accept().ok();
            server.is_some()
        });
        let (server, _) = server.unwrap();
        server.set_nonblocking(false).unwrap();
        server.set_nodelay(true).unwrap();
        server
            .set_read_timeout(Some(outrigger_tests::DEADLINE))
            .unwrap();
        server
            .set_write_timeout(Some(outrigger_tests::DEADLINE))
            .unwrap();
        (connection, server)
    }

    /// Returns a frame with the next segment and a zero checksum.
    pub fn segment(&mut self, flags: u8, data: &[u8]) -> Vec<u8> {
        let mut segment = Vec::new();
        segment.extend(PORT.to_be_bytes());
        segment.extend(self.port.to_be_bytes());
        segment.extend(self.sent.to_be_bytes());
        segment.extend(self.received.to_be_bytes());
        segment.extend([0x60, flags, 0xff, 0xff, 0, 0, 0, 0]);
        segment.extend([2, 4]); // maximum segment size
        segment.extend(MSS.to_be_bytes());
        segment.extend(data);
        self.sent += data.len() as u32;
        segment
    }

    /// Sends a segment with a complete checksum.
    pub fn send(&mut self, guest: &mut Guest, flags: u8, data: &[u8]) {
        let mut segment = self.segment(flags, data);
        let pseudo = pseudo_header(GUEST, HOST, TCP, segment.len());
        let sum = checksum(&[&pseudo[..], &segment].concat());
        segment[CHECKSUM..CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
        send(guest, &ethernet(self.host, IPV4, &ipv4(TCP, &segment)));
    }

    /// Receives `len` bytes and acknowledges them. Returns them with their frames.
    pub fn receive(&mut self, guest: &mut Guest, len: usize) -> (Vec<u8>, Vec<Frame>) {
        let (mut all, mut frames) = (Vec::new(), Vec::new());
        while all.len() < len {
            let port = self.port;
            let (frame, segment) =
                receive_until(guest, |frame| Some(segment_of(frame, port)?.to_vec()));
            let data = &segment[usize::from(segment[12] >> 4) * 4..];
            let number = u32::from_be_bytes(segment[4..8].try_into().unwrap());
            if data.is_empty() || number != self.received {
                continue; // an acknowledgement, or data that was received before
            }
            all.extend(data);
            self.received += data.len() as u32;
            frames.push(frame);
            self.send(guest, ACK, &[]);
        }
        (all, frames)
    }
}

/// Returns the TCP segment in `frame`, if it is from `port`.
fn segment_of(frame: &Frame, port: u16) -> Option<&[u8]> {
    frame
        .ipv4(TCP)
        .filter(|segment| segment[..2] == port.to_be_bytes())
}

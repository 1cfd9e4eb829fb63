//! Checksum and segmentation offload in both directions.

use std::io::{Read, Write};

use outrigger_tests::net::*;
use virtio_bindings::virtio_net::*;

use crate::tcp::{ACK, CHECKSUM, MSS, PUSH, TCP, TcpConnection};
use crate::{boot, isolated};

const CSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;
const TSO: u64 = CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
/// Offset of the TCP header in a frame.
const TRANSPORT: usize = 34;

fn text(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 / 7) as u8).collect()
}

/// Returns the frames that the host sends to a guest with these features and buffers.
fn frames_to_guest(
    process: &outrigger_tests::process::Process,
    features: u64,
    (count, len): (usize, u32),
) -> Vec<Frame> {
    let mut guest = boot(process, features);
    post(&mut guest, count, len);
    let (mut connection, mut server) = TcpConnection::open(&mut guest, process);
    let text = text(50_000);
    server.write_all(&text).unwrap();
    let (received, frames) = connection.receive(&mut guest, text.len());
    assert!(received == text);
    frames
}

fn is_complete(frame: &Frame) -> bool {
    let segment = frame.ipv4(TCP).unwrap();
    let pseudo = pseudo_header(HOST, GUEST, TCP, segment.len());
    checksum(&[&pseudo[..], segment].concat()) == 0
}

#[test]
fn segments_are_not_split_for_a_guest_with_tso() {
    let process = isolated(&[]);
    // With large buffers, and with several small buffers for each frame.
    for (features, buffers) in [(TSO, (8, 65_562)), (TSO | MERGEABLE, (200, 1536))] {
        let frames = frames_to_guest(&process, features, buffers);
        let whole = frames.iter().find(|frame| frame.bytes.len() > 4000);
        let frame = whole.expect("a frame of several segments");
        assert_eq!(u32::from(frame.header[0]), VIRTIO_NET_HDR_F_NEEDS_CSUM);
        assert_eq!(u32::from(frame.header[1]), VIRTIO_NET_HDR_GSO_TCPV4);
        let size = u16::from_le_bytes([frame.header[4], frame.header[5]]);
        assert!(size > 0 && size <= MSS, "{size}");
    }
    assert!(!process.log().contains("dropped"), "{}", process.log());
}

#[test]
fn checksums_are_left_to_a_guest_with_csum_offload() {
    let process = isolated(&[]);
    let frames = frames_to_guest(&process, CSUM, (32, 2048));
    for frame in frames {
        assert!(frame.bytes.len() <= 1514);
        assert_eq!(u32::from(frame.header[0]), VIRTIO_NET_HDR_F_NEEDS_CSUM);
        assert_eq!(frame.header[1], 0);
        assert_eq!(usize::from(frame.header[6]), TRANSPORT);
        assert_eq!(usize::from(frame.header[8]), CHECKSUM);
    }
}

#[test]
fn guest_without_offloads_gets_complete_frames() {
    let process = isolated(&[]);
    // Also after a guest that had offloads. Segmentation offload needs checksum offload.
    drop(boot(&process, TSO));
    for features in [0, TSO & !CSUM] {
        for frame in frames_to_guest(&process, features, (32, 2048)) {
            assert!(frame.bytes.len() <= 1514);
            assert_eq!(frame.header[..10], [0; 10]);
            assert!(is_complete(&frame));
        }
    }
}

#[test]
fn guest_can_leave_checksums_and_segmentation_to_the_host() {
    let process = isolated(&[]);
    let features = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4;
    let mut guest = boot(&process, features);
    post(&mut guest, 16, 2048);
    let (mut connection, mut server) = TcpConnection::open(&mut guest, &process);
    for len in [1, 1000, 9000, 30_000] {
        let text = text(len);
        let mut segment = connection.segment(ACK | PUSH, &text);
        // The guest stores the checksum of the pseudo header.
        let pseudo = pseudo_header(GUEST, HOST, TCP, segment.len());
        let sum = !checksum(&pseudo);
        segment[CHECKSUM..CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
        let mut header = [0; HEADER];
        header[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        if len > usize::from(MSS) {
            header[1] = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
            header[2] = (TRANSPORT + 24) as u8; // hdr_len
            header[4..6].copy_from_slice(&MSS.to_le_bytes());
        }
        header[6] = TRANSPORT as u8; // csum_start
        header[8] = CHECKSUM as u8; // csum_offset
        let frame = ethernet(connection.host, IPV4, &ipv4(TCP, &segment));
        send_with(&mut guest, header, &frame);
        let mut received = vec![0; len];
        server.read_exact(&mut received).unwrap();
        assert!(received == text, "{len} bytes");
    }
}

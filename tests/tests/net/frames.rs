//! Frames and buffers of all sizes and layouts.

use outrigger_tests::guest::Guest;
use outrigger_tests::net::*;
use outrigger_tests::process::Launch;
use outrigger_tests::queue::Buffer;
use outrigger_tests::wait_until;
use virtio_bindings::virtio_net::*;

use crate::{boot, in_network_of, isolated};

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

#[test]
fn configuration_space_has_mac_and_mtu() {
    let process = isolated(&["--mac", "52:54:00:12:34:56", "--mtu", "1400"]);
    let mut guest = boot(&process, 0);
    assert_eq!(guest.config(0, 6), [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    assert_eq!(guest.config(6, 2), [VIRTIO_NET_S_LINK_UP as u8, 0]);
    assert_eq!(guest.config(10, 2), 1400u16.to_le_bytes());
    // The host's interface has the same MTU.
    assert_eq!(in_network_of(&process, || mtu_of("tap0")), 1400);

    // The default address is the same each time.
    let macs = [(); 2].map(|()| boot(&isolated(&[]), 0).config(0, 6));
    assert_eq!(macs[0], macs[1]);
    assert_eq!(macs[0][0] & 3, 2, "locally administered, one station");
}

#[test]
fn host_address_can_be_chosen() {
    let process = Launch::new("device-net")
        .args(["--isolated", "192.168.77.9/29"])
        .listening();
    in_network_of(&process, || {
        std::net::UdpSocket::bind("192.168.77.9:0").unwrap();
        std::net::UdpSocket::bind("10.0.2.1:0").unwrap_err();
    });
}

/// Pings with `len` bytes of data.
fn ping_pong(guest: &mut Guest, host: [u8; 6], sequence: u16, len: usize) -> Frame {
    let data: Vec<u8> = (0..len)
        .map(|i| (i * 7 + usize::from(sequence)) as u8)
        .collect();
    send(guest, &ethernet(host, IPV4, &ping(sequence, &data)));
    let (frame, answer) = receive_until(guest, |frame| pong(frame, sequence));
    assert!(answer == data, "data of {len} bytes");
    assert_eq!(frame.bytes[..6], MAC);
    frame
}

#[test]
fn answers_pings_of_all_sizes() {
    let process = isolated(&[]);
    for features in [0, MERGEABLE] {
        let mut guest = boot(&process, features);
        post(&mut guest, 16, 2048);
        let host = resolve(&mut guest, GUEST);
        for (sequence, len) in [0, 1, 13, 56, 500, 1000, 1471, 1472]
            .into_iter()
            .enumerate()
        {
            let frame = ping_pong(&mut guest, host, sequence as u16, len);
            assert_eq!(frame.buffers(), 1);
            assert_eq!(frame.header[..10], [0; 10], "no offloads");
        }
        // More frames than the rings have descriptors, so that they wrap around.
        for sequence in 100..900 {
            ping_pong(&mut guest, host, sequence, 64);
        }
    }
}

#[test]
fn frames_are_spread_over_mergeable_buffers() {
    let process = isolated(&[]);
    let mut guest = boot(&process, MERGEABLE);
    post(&mut guest, 60, 100);
    let host = resolve(&mut guest, GUEST);
    for len in [10, 46, 47, 400, 1472] {
        let frame = ping_pong(&mut guest, host, 1, len);
        let total = HEADER + frame.bytes.len();
        assert_eq!(usize::from(frame.buffers()), total.div_ceil(100));
    }
    // The smallest buffers that a driver may offer have room for the header.
    drop(guest);
    let mut guest = boot(&process, MERGEABLE);
    post(&mut guest, 250, 12);
    let host = resolve(&mut guest, GUEST);
    let frame = ping_pong(&mut guest, host, 2, 1000);
    assert_eq!(
        usize::from(frame.buffers()),
        (HEADER + frame.bytes.len()).div_ceil(12)
    );
}

#[test]
fn too_few_mergeable_buffers_do_not_cause_busy_waiting() {
    let process = isolated(&[]);
    let mut guest = boot(&process, MERGEABLE);
    post(&mut guest, 8, 100); // less than the longest frame
    resolve(&mut guest, GUEST);
    // The host sends a few frames by itself, which take little CPU time. In the end they use
    // up the buffers; until then the device must not poll.
    let before = process.ticks();
    std::thread::sleep(std::time::Duration::from_secs(1));
    let used = process.ticks() - before;
    assert!(used < 10, "{used} ticks in a second of nothing");
}

#[test]
fn frames_can_be_split_into_any_descriptors() {
    let process = isolated(&[]);
    let mut guest = boot(&process, 0);
    post(&mut guest, 8, 2048);
    let host = resolve(&mut guest, GUEST);
    let data: Vec<u8> = (0..200).collect();
    for (sequence, piece) in [1, 3, 5, 12, 13, 26, 100, 1000].into_iter().enumerate() {
        let sequence = sequence as u16;
        let frame = ethernet(host, IPV4, &ping(sequence, &data));
        let bytes = [&[0; HEADER][..], &frame].concat();
        let at = guest.ram.put(&bytes);
        let pieces: Vec<Buffer> = (0..bytes.len())
            .step_by(piece)
            .map(|from| Buffer::readable(at + from as u64, piece.min(bytes.len() - from) as u32))
            .collect();
        if pieces.len() <= 256 {
            guest.queues[TX].run(&pieces);
            let (_, answer) = receive_until(&mut guest, |frame| pong(frame, sequence));
            assert!(answer == data, "pieces of {piece}");
        }
    }
    // For received frames: one buffer of many descriptors.
    drop(guest);
    for piece in [7, 12, 50] {
        let mut guest = boot(&process, 0);
        let at = guest.ram.alloc(1050);
        let pieces: Vec<Buffer> = (0..1050)
            .step_by(piece)
            .map(|from| Buffer::writable(at + from, piece as u32))
            .collect();
        guest.queues[RX].add(&pieces);
        guest.queues[RX].kick();
        send(&mut guest, &arp_request(GUEST, HOST));
        let used = guest.queues[RX].wait();
        let bytes = guest.ram.get(at, used.len as usize);
        let frame = Frame {
            header: bytes[..HEADER].try_into().unwrap(),
            bytes: bytes[HEADER..].to_vec(),
        };
        // The host may send other frames as well.
        assert!(frame.bytes.len() >= 42);
        assert_eq!(frame.buffers(), 1);
        assert!(frame.bytes[..6] == MAC || frame.bytes[0] & 1 == 1);
    }
}

#[test]
fn frames_wait_until_there_are_buffers() {
    let process = isolated(&[]);
    let mut guest = boot(&process, 0);
    post(&mut guest, 4, 2048);
    let host = resolve(&mut guest, GUEST);
    // Fewer frames than the queue of the tap device holds.
    for sequence in 0..100 {
        send(&mut guest, &ethernet(host, IPV4, &ping(sequence, &[1; 32])));
    }
    for sequence in 0..100 {
        receive_until(&mut guest, |frame| pong(frame, sequence));
    }
}

#[test]
fn buffers_too_small_for_a_frame_drop_only_that_frame() {
    let process = isolated(&[]);
    for features in [0, MERGEABLE] {
        let mut guest = boot(&process, features);
        // Large enough for ARP and small pings; mergeable buffers take twice as much.
        post(&mut guest, 2, 120);
        let host = resolve(&mut guest, GUEST);
        send(&mut guest, &ethernet(host, IPV4, &ping(1, &[0; 1000])));
        ping_pong(&mut guest, host, 2, 40);
        drop(guest);
    }
    wait_until("it says what it dropped", || {
        process.log().matches("oversized: ").count() >= 2
    });
}

#[test]
fn buffers_too_small_for_a_header_are_returned_empty() {
    let process = isolated(&[]);
    for features in [0, MERGEABLE] {
        let mut guest = boot(&process, features);
        for len in [0, 1, 11] {
            let runt = Buffer::writable(guest.ram.alloc(16), len);
            assert_eq!(guest.queues[RX].run(&[runt]).len, 0);
            let backwards = Buffer::readable(guest.ram.alloc(2048), 2048);
            assert_eq!(guest.queues[RX].run(&[backwards]).len, 0);
        }
        post(&mut guest, 4, 2048);
        let host = resolve(&mut guest, GUEST);
        ping_pong(&mut guest, host, 3, 100);
    }
    wait_until("it counts them", || {
        process.log().matches("runts: 6").count() == 2
    });
}

/// Each buffer is returned once, although the device checks the valid buffer before it again with
/// each frame.
#[test]
fn a_too_small_buffer_after_good_ones_is_returned_once() {
    let process = isolated(&[]);
    let mut guest = boot(&process, MERGEABLE);
    let mut expected = Vec::new();
    for len in [1000, 4, 1000, 0, 1000, 11] {
        // Smaller than the longest frame, so the device goes on to the next buffer.
        let buffer = Buffer::writable(guest.ram.alloc(1000), len);
        expected.push(guest.queues[RX].add(&[buffer]));
        let backwards = [buffer, Buffer::readable(buffer.address, 16)];
        expected.push(guest.queues[RX].add(&backwards));
    }
    guest.queues[RX].kick();
    let mut heads = Vec::new();
    wait_until("all buffers have come back", || {
        send(&mut guest, &arp_request(GUEST, HOST));
        heads.extend(std::iter::from_fn(|| guest.queues[RX].take()).map(|used| used.head));
        heads.len() >= expected.len()
    });
    heads.sort_unstable();
    expected.sort_unstable();
    assert_eq!(heads, expected);
}

#[test]
fn invalid_frames_are_dropped() {
    let process = isolated(&[]);
    let mut guest = boot(&process, 0);
    let ram = std::sync::Arc::clone(&guest.ram);
    let long = ram.alloc(1 << 20);
    let transmit = &mut guest.queues[TX];
    for len in [1, 11] {
        transmit.run(&[Buffer::readable(long, len)]); // shorter than a header
    }
    for len in [12, 13, 25, 70_000, 1 << 20] {
        transmit.run(&[Buffer::readable(long, len)]); // shorter than a frame
    }
    // A buffer that only the device may write has no frame.
    transmit.run(&[Buffer::writable(long, 2048)]);
    transmit.run(&[Buffer::readable(long, 1); 250]);

    post(&mut guest, 4, 2048);
    let host = resolve(&mut guest, GUEST);
    ping_pong(&mut guest, host, 1, 100);
    drop(guest);
    wait_until("it counts them", || process.log().contains("short: 3"));
}

#[test]
fn invalid_headers_are_harmless() {
    let process = isolated(&[]);
    let mut guest = boot(&process, 0);
    post(&mut guest, 4, 2048);
    let host = resolve(&mut guest, GUEST);
    let frame = ethernet(host, IPV4, &ping(9, &[7; 300]));
    for at in 0..HEADER {
        for value in [1, 3, 5, 0x7f, 0x80, 0xff] {
            let mut header = [0; HEADER];
            header[at] = value;
            send_with(&mut guest, header, &frame);
            header.fill(value);
            send_with(&mut guest, header, &frame);
        }
    }
    assert!(process.is_running());
    ping_pong(&mut guest, host, 10, 100);
}

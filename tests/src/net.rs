//! A minimal network stack of a guest: frames built by hand, over virtio-net from the driver's
//! side (virtio 1.2 section 5.1.6).

use std::net::Ipv4Addr;

use crate::guest::Guest;
use crate::queue::{Buffer, Used};
use crate::ram::Ram;

/// Index of the receive queue.
pub const RX: usize = 0;
/// Index of the transmit queue.
pub const TX: usize = 1;
/// Length of the header before each frame.
pub const HEADER: usize = 12;

/// The guest's MAC address.
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
/// The broadcast MAC address.
pub const BROADCAST: [u8; 6] = [0xff; 6];
/// The guest's IPv4 address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The host's IPv4 address with `--isolated`.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);

/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ARP: u16 = 0x0806;
/// EtherType for local experiments, which hosts ignore.
pub const EXPERIMENT: u16 = 0x88b5;

/// A frame from the device.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The virtio-net header.
    pub header: [u8; HEADER],
    /// The Ethernet frame.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// Its EtherType.
    pub fn ethertype(&self) -> u16 {
        u16::from_be_bytes([self.bytes[12], self.bytes[13]])
    }

    /// Bytes after the Ethernet header.
    pub fn payload(&self) -> &[u8] {
        &self.bytes[14..]
    }

    /// The IPv4 payload, if it is an IPv4 packet of `protocol`.
    pub fn ipv4(&self, protocol: u8) -> Option<&[u8]> {
        let packet = self.payload();
        (self.ethertype() == IPV4 && packet[9] == protocol).then(|| {
            let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
            &packet[usize::from(packet[0] & 15) * 4..total]
        })
    }

    /// Number of buffers that it uses (num_buffers).
    pub fn buffers(&self) -> u16 {
        u16::from_le_bytes([self.header[10], self.header[11]])
    }
}

/// An Ethernet frame from the guest.
pub fn ethernet(to: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &MAC, &ethertype.to_be_bytes(), payload].concat()
}

/// An ARP request of `from` for the address `whose`.
pub fn arp_request(from: Ipv4Addr, whose: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
    packet.extend(MAC);
    packet.extend(from.octets());
    packet.extend([0; 6]);
    packet.extend(whose.octets());
    ethernet(BROADCAST, ARP, &packet)
}

/// The MAC address in `frame`, if that answers [`arp_request`] of `from`.
pub fn arp_reply(frame: &Frame, from: Ipv4Addr) -> Option<[u8; 6]> {
    let packet = frame.payload();
    (frame.ethertype() == ARP && packet[7] == 2 && packet[24..28] == from.octets())
        .then(|| packet[8..14].try_into().unwrap())
}

/// The internet checksum (RFC 1071) of `bytes`.
pub fn checksum(bytes: &[u8]) -> u16 {
    let sum = bytes.chunks(2).fold(0u32, |sum, pair| {
        sum + u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]))
    });
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// The pseudo-header that TCP's checksum covers.
pub fn pseudo_header(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, len: usize) -> Vec<u8> {
    let len = (len as u16).to_be_bytes();
    [&from.octets()[..], &to.octets(), &[0, protocol], &len].concat()
}

/// An IPv4 packet from the guest to the host.
pub fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
    packet.extend(GUEST.octets());
    packet.extend(HOST.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

/// An ICMP echo request.
pub fn ping(sequence: u16, data: &[u8]) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0, 0x12, 0x34];
    message.extend(sequence.to_be_bytes());
    message.extend(data);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    ipv4(1, &message)
}

/// The data of `frame`, if that answers [`ping`] number `sequence`.
pub fn pong(frame: &Frame, sequence: u16) -> Option<Vec<u8>> {
    let message = frame.ipv4(1)?;
    let this = message[0] == 0 && message[6..8] == sequence.to_be_bytes();
    this.then(|| {
        assert_eq!(checksum(message), 0);
        message[8..].to_vec()
    })
}

/// The buffers that carry `frame` behind a header without offloads.
pub fn buffers(ram: &Ram, frame: &[u8]) -> Vec<Buffer> {
    let bytes = [&[0; HEADER], frame].concat();
    vec![Buffer::readable(ram.put(&bytes), bytes.len() as u32)]
}

/// Sends a frame with `header` and waits until it is completed.
pub fn send_with(guest: &mut Guest, header: [u8; HEADER], frame: &[u8]) -> Used {
    let bytes = [&header[..], frame].concat();
    let buffer = Buffer::readable(guest.ram.put(&bytes), bytes.len() as u32);
    guest.queues[TX].run(&[buffer])
}

/// Sends a frame without offloads and waits until it is completed.
pub fn send(guest: &mut Guest, frame: &[u8]) {
    send_with(guest, [0; HEADER], frame);
}

/// Offers `count` receive buffers of `len` bytes.
pub fn post(guest: &mut Guest, count: usize, len: u32) {
    for _ in 0..count {
        let buffer = Buffer::writable(guest.ram.alloc(len.into()), len);
        guest.queues[RX].add(&[buffer]);
    }
    guest.queues[RX].kick();
}

/// Waits for the next frame, and offers its buffers (of one descriptor each) again.
pub fn receive(guest: &mut Guest) -> Frame {
    let queue = &mut guest.queues[RX];
    let mut bytes = Vec::new();
    let mut buffers = Vec::new();
    let mut missing = 1;
    while missing > 0 {
        let used = queue.wait();
        let buffer = queue.buffer(used.head);
        bytes.extend(guest.ram.get(buffer.address, used.len as usize));
        if buffers.is_empty() {
            missing = u16::from_le_bytes([bytes[10], bytes[11]]);
            assert!(missing > 0);
        }
        buffers.push(buffer);
        missing -= 1;
        // All buffers of a frame are completed together.
        assert!(missing == 0 || queue.device_used_index() != queue.used_index);
    }
    for buffer in buffers {
        queue.add(&[buffer]);
    }
    queue.kick();
    Frame {
        header: bytes[..HEADER].try_into().unwrap(),
        bytes: bytes.split_off(HEADER),
    }
}

/// Waits for a frame for which `pick` returns a value. Other frames are ignored, because a
/// host sends some of its own.
pub fn receive_until<T>(guest: &mut Guest, pick: impl Fn(&Frame) -> Option<T>) -> (Frame, T) {
    let start = std::time::Instant::now();
    loop {
        let frame = receive(guest);
        if let Some(value) = pick(&frame) {
            return (frame, value);
        }
        assert!(start.elapsed() < crate::DEADLINE, "the frame did not come");
    }
}

/// MTU of interface `name` in the current network namespace.
pub fn mtu_of(name: &str) -> u32 {
    use std::os::fd::AsRawFd;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let operation = libc::SIOCGIFMTU as libc::Ioctl;
    // SAFETY: SIOCGIFMTU takes a `struct ifreq` and sets the field.
    unsafe {
        assert_eq!(libc::ioctl(socket.as_raw_fd(), operation, &mut request), 0);
        request.ifr_ifru.ifru_mtu as u32
    }
}

/// The host's MAC address, by ARP; the host learns the guest's by it.
pub fn resolve(guest: &mut Guest, from: Ipv4Addr) -> [u8; 6] {
    send(guest, &arp_request(from, HOST));
    receive_until(guest, |frame| arp_reply(frame, from)).1
}

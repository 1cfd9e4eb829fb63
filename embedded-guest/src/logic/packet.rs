//! Just enough of Ethernet, ARP (RFC 826), IPv4 (RFC 791) and ICMP echo (RFC 792).

use alloc::vec::Vec;

/// An Ethernet address.
pub type Mac = [u8; 6];
/// An IPv4 address.
pub type Ip = [u8; 4];

/// A host: its Ethernet and its IPv4 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Station {
    /// Ethernet address.
    pub mac: Mac,
    /// IPv4 address.
    pub ip: Ip,
}

const ETHERNET_HEADER: usize = 14;
const IP_HEADER: usize = 20;
const ICMP_HEADER: usize = 8;
/// Without the frame check sequence.
const SHORTEST_FRAME: usize = 60;
const TYPE_IP: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
const BROADCAST: Mac = [0xff; 6];
const ARP_REQUEST: u8 = 1;
const ARP_REPLY: u8 = 2;
const PROTOCOL_ICMP: u8 = 1;
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;

/// A received frame that the guest understands.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// `from` asks who has the address `whose`.
    ArpRequest {
        /// Who asks.
        from: Station,
        /// The address asked for.
        whose: Ip,
    },
    /// `from` says that it has its address.
    ArpReply {
        /// Who answers.
        from: Station,
    },
    /// The answer to an echo request; both checksums are right.
    EchoReply {
        /// Who answers.
        from: Ip,
        /// Sequence number of the request.
        sequence: u16,
        /// What came back.
        payload: &'a [u8],
    },
    /// Anything else.
    Other,
}

/// The Internet checksum (RFC 1071) of `bytes`.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The frame in which `own` asks for the Ethernet address of `peer`.
pub fn arp_request(own: Station, peer: Ip) -> Vec<u8> {
    arp(
        ARP_REQUEST,
        own,
        Station {
            mac: [0; 6],
            ip: peer,
        },
        BROADCAST,
    )
}

/// The frame in which `own` answers the ARP request of `peer`.
pub fn arp_reply(own: Station, peer: Station) -> Vec<u8> {
    arp(ARP_REPLY, own, peer, peer.mac)
}

fn arp(operation: u8, own: Station, peer: Station, to: Mac) -> Vec<u8> {
    let mut frame = ethernet(to, own.mac, TYPE_ARP);
    frame.extend([0, 1, 8, 0, 6, 4, 0, operation]); // Ethernet, IPv4, address lengths
    for station in [own, peer] {
        frame.extend(station.mac);
        frame.extend(station.ip);
    }
    frame.resize(SHORTEST_FRAME, 0);
    frame
}

/// The frame with an echo request. `payload` must fit: 1,472 bytes on Ethernet.
pub fn echo_request(
    own: Station,
    peer: Station,
    identifier: u16,
    sequence: u16,
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = ethernet(peer.mac, own.mac, TYPE_IP);
    let length = (IP_HEADER + ICMP_HEADER + payload.len()) as u16;
    frame.extend([0x45, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, PROTOCOL_ICMP, 0, 0]); // don't fragment, 64 hops
    frame.extend(own.ip);
    frame.extend(peer.ip);
    set_checksum(&mut frame[ETHERNET_HEADER..], 10);
    frame.extend([ECHO_REQUEST, 0, 0, 0]);
    frame.extend(identifier.to_be_bytes());
    frame.extend(sequence.to_be_bytes());
    frame.extend(payload);
    set_checksum(&mut frame[ETHERNET_HEADER + IP_HEADER..], 2);
    if frame.len() < SHORTEST_FRAME {
        frame.resize(SHORTEST_FRAME, 0);
    }
    frame
}

fn ethernet(to: Mac, from: Mac, kind: [u8; 2]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(2048);
    frame.extend(to);
    frame.extend(from);
    frame.extend(kind);
    frame
}

fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = checksum(bytes).to_be_bytes();
    bytes[at..at + 2].copy_from_slice(&sum);
}

/// Parses `frame`. An echo reply counts if it is for `own`, has `identifier` and a correct
/// checksum.
pub fn parse(frame: &[u8], own: Station, identifier: u16) -> Received<'_> {
    let received = match frame.get(12..ETHERNET_HEADER) {
        Some(kind) if kind == TYPE_ARP => parse_arp(&frame[ETHERNET_HEADER..]),
        Some(kind) if kind == TYPE_IP => {
            parse_echo_reply(&frame[ETHERNET_HEADER..], own.ip, identifier)
        }
        _ => None,
    };
    received.unwrap_or(Received::Other)
}

fn parse_arp(body: &[u8]) -> Option<Received<'_>> {
    let from = Station {
        mac: array(body, 8)?,
        ip: array(body, 14)?,
    };
    match array(body, 0)? {
        [0, 1, 8, 0, 6, 4, 0, ARP_REQUEST] => Some(Received::ArpRequest {
            from,
            whose: array(body, 24)?,
        }),
        [0, 1, 8, 0, 6, 4, 0, ARP_REPLY] => Some(Received::ArpReply { from }),
        _ => None,
    }
}

fn parse_echo_reply(packet: &[u8], own: Ip, identifier: u16) -> Option<Received<'_>> {
    let header = packet.get(..IP_HEADER)?;
    let length = usize::from(u16::from_be_bytes(array(packet, 2)?));
    let icmp = packet.get(IP_HEADER..length)?;
    let fits = header[0] == 0x45 && header[9] == PROTOCOL_ICMP && header[16..20] == own;
    let whole = checksum(header) == 0 && checksum(icmp) == 0;
    let reply = icmp.starts_with(&[ECHO_REPLY, 0]) && array(icmp, 4)? == identifier.to_be_bytes();
    (fits && whole && reply).then_some(Received::EchoReply {
        from: array(packet, 12)?,
        sequence: u16::from_be_bytes(array(icmp, 6)?),
        payload: icmp.get(ICMP_HEADER..)?,
    })
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Station = Station {
        mac: [2, 0, 0, 0, 0, 1],
        ip: [10, 0, 2, 15],
    };
    const PEER: Station = Station {
        mac: [2, 0, 0, 0, 0, 2],
        ip: [10, 0, 2, 1],
    };

    #[test]
    fn checksum_of_the_rfc_1071_example() {
        assert_eq!(
            checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            !0xddf2
        );
        assert_eq!(checksum(&[0x12]), !0x1200);
    }

    #[test]
    fn arp_round_trip() {
        let request = arp_request(OWN, PEER.ip);
        assert_eq!(request.len(), 60);
        assert_eq!(&request[..6], &[0xff; 6]);
        assert_eq!(
            parse(&request, PEER, 0),
            Received::ArpRequest {
                from: OWN,
                whose: PEER.ip
            }
        );
        assert_eq!(
            parse(&arp_reply(PEER, OWN), OWN, 0),
            Received::ArpReply { from: PEER }
        );
    }

    /// Turns a request into what an honest peer would answer.
    fn answer(request: &[u8], length: usize) -> Vec<u8> {
        let mut frame = request.to_vec();
        frame[26..30].copy_from_slice(&PEER.ip);
        frame[30..34].copy_from_slice(&OWN.ip);
        frame[34] = ECHO_REPLY;
        frame[36..38].fill(0);
        set_checksum(&mut frame[34..42 + length], 2);
        frame
    }

    #[test]
    fn echo_replies_of_all_sizes() {
        for length in [0, 1, 56, 1472] {
            let payload: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
            let request = echo_request(OWN, PEER, 77, 3, &payload);
            assert_eq!(request.len(), (42 + length).max(60));
            assert_eq!(
                parse(&request, PEER, 77),
                Received::Other,
                "a request is no reply"
            );
            let reply = answer(&request, length);
            let expected = Received::EchoReply {
                from: PEER.ip,
                sequence: 3,
                payload: &payload,
            };
            assert_eq!(parse(&reply, OWN, 77), expected);
            assert_eq!(parse(&reply, OWN, 78), Received::Other);
            assert_eq!(parse(&reply, PEER, 77), Received::Other);
        }
    }

    #[test]
    fn damaged_or_short_frames_are_no_replies() {
        let reply = answer(&echo_request(OWN, PEER, 77, 3, &[5; 100]), 100);
        for at in 14..reply.len() {
            let mut damaged = reply.clone();
            damaged[at] ^= 0x10;
            assert_eq!(
                parse(&damaged, OWN, 77),
                Received::Other,
                "byte {at} changed"
            );
        }
        for length in 0..reply.len() {
            assert_eq!(parse(&reply[..length], OWN, 77), Received::Other);
        }
    }
}

//! The network device's part of `main`.

use super::Guest;
use crate::irq::{self, Deadline};
use crate::line;
use crate::seconds;
use crate::virtio::device::Device;
use crate::virtio::net::Net;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use logic::packet::{self, Ip, Received, Station};
use logic::pattern;

/// Payloads of the echo requests, in bytes; the last fills an Ethernet frame.
const SIZES: [usize; 5] = [0, 8, 56, 512, 1472];
const PEER: Ip = [10, 0, 2, 1];
const OWN: Ip = [10, 0, 2, 15];
/// "og" in the identifier field of all echo requests.
const IDENTIFIER: u16 = 0x6f67;

/// Finds the peer's address by ARP and gets its answers to echo requests.
///
/// # Errors
/// The device failed, the peer did not answer, or not with what was sent.
pub fn check(guest: &Guest, device: Device) -> Result<(), String> {
    let (name, vectors) = (
        device.name.clone(),
        [device.queue_vector(0), device.queue_vector(1)],
    );
    let before = vectors.map(|vector| vector.count());
    let mut net = Net::start(device)?;
    let own = Station {
        mac: net.mac(),
        ip: own_address(guest)?,
    };
    let peer = find(&mut net, &name, own, peer_address(guest)?)?;
    for (sequence, size) in (1..).zip(SIZES) {
        echo(&mut net, &name, own, peer, sequence, size)?;
    }
    let counts = [0, 1].map(|queue| vectors[queue].count() - before[queue]);
    let mac = own.mac.map(|byte| format!("{byte:02x}")).join(":");
    line!(
        "{name}: {mac}, peer found, {} echo replies verified, {} interrupts on vector {} (receive), {} on {} (transmit)",
        SIZES.len(),
        counts[0],
        vectors[0].number(),
        counts[1],
        vectors[1].number()
    );
    Ok(())
}

/// The guest's address.
///
/// # Errors
/// `ip=` is not an address.
pub fn own_address(guest: &Guest) -> Result<Ip, String> {
    guest.options.address("ip", OWN)
}

/// The address of the machine to talk to.
///
/// # Errors
/// `peer=` is not an address.
pub fn peer_address(guest: &Guest) -> Result<Ip, String> {
    guest.options.address("peer", PEER)
}

/// The peer's Ethernet address, by ARP.
///
/// # Errors
/// The peer does not answer; or see [`Net::receive`].
pub fn find(net: &mut Net, name: &str, own: Station, peer: Ip) -> Result<Station, String> {
    net.send(packet::arp_request(own, peer))?;
    receive(net, own, |received| match received {
        Received::ArpReply { from } if from.ip == peer => Some(Ok(from)),
        _ => None,
    })
    .map_err(|error| format!("{name}: ARP request for {peer:?}: {error}"))
}

fn echo(
    net: &mut Net,
    name: &str,
    own: Station,
    peer: Station,
    number: u16,
    size: usize,
) -> Result<(), String> {
    let mut payload = vec![0; size];
    pattern::fill(irq::cycles(), 0, &mut payload);
    net.send(packet::echo_request(
        own, peer, IDENTIFIER, number, &payload,
    ))?;
    receive(net, own, |received| match received {
        Received::EchoReply {
            from,
            sequence,
            payload: back,
        } if from == peer.ip && sequence == number => Some(if back == payload {
            Ok(())
        } else {
            Err(String::from("not what was sent came back"))
        }),
        _ => None,
    })
    .map_err(|error| format!("{name}: echo request {number} with {size} bytes: {error}"))
}

/// Receives until `wanted` finds what it looks for; answers ARP requests meanwhile.
fn receive<T>(
    net: &mut Net,
    own: Station,
    mut wanted: impl FnMut(Received) -> Option<Result<T, String>>,
) -> Result<T, String> {
    let deadline = Deadline::after(seconds());
    while !deadline.is_over() {
        let frame = net.receive()?;
        let received = packet::parse(&frame, own, IDENTIFIER);
        if let Received::ArpRequest { from, whose } = received {
            if whose == own.ip {
                net.send(packet::arp_reply(own, from))?;
            }
        } else if let Some(result) = wanted(received) {
            return result;
        }
    }
    Err(format!("no answer in {} s", seconds()))
}

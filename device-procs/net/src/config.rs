//! What the driver reads about the network device: features and configuration space
//! (virtio 1.2 sections 5.1.3 and 5.1.4).

use std::fmt;
use std::str::FromStr;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};

/// The device's feature bits.
pub fn features() -> u64 {
    [
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_MTU,
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_ECN,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_STATUS,
    ]
    .iter()
    .fold(0, |all, bit| all | 1 << bit)
}

/// The bytes of `struct virtio_net_config`; `mtu` in bytes.
pub fn space(mac: Mac, mtu: u16) -> Vec<u8> {
    let mut space = mac.0.to_vec();
    space.extend((VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
    space.extend(1u16.to_le_bytes()); // max_virtqueue_pairs
    space.extend(mtu.to_le_bytes());
    space
}

/// A unicast MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address of the guest behind tap device `tap` of host `host`. It stays the same
    /// when the process is restarted, so that the guest keeps its network card, and it
    /// differs between the tap devices of a host.
    pub fn derived(host: &str, tap: &str) -> Self {
        // FNV-1a, 64 bits.
        let hash = host
            .bytes()
            .chain([0])
            .chain(tap.bytes())
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        let [.., a, b, c, d, e] = hash.to_be_bytes();
        Mac([0x02, a, b, c, d, e]) // locally administered, unicast
    }
}

impl FromStr for Mac {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = "not a MAC address: give six pairs of hexadecimal digits, 52:54:00:12:34:56";
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let digits =
                |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            let part = parts.next().filter(digits).ok_or(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong)?;
        }
        if parts.next().is_some() {
            return Err(wrong);
        }
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(
                "not a unicast address: the first byte must be even, and not all bytes zero",
            );
        }
        Ok(Mac(mac))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_space_has_the_layout_of_the_specification() {
        let space = space(Mac([2, 3, 4, 5, 6, 7]), 1400);
        assert_eq!(space, [2, 3, 4, 5, 6, 7, 1, 0, 1, 0, 0x78, 0x05]);
    }

    #[test]
    fn addresses_are_read_and_written() {
        let mac: Mac = "52:54:00:ab:CD:ef".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:ef");
        for bad in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:ef:00",
            "52:54:0:ab:cd:ef",
            "52:54:00:ab:cd:+f",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn derived_addresses_are_stable_and_differ() {
        let mac = Mac::derived("host", "tap0");
        assert_eq!(mac, Mac::derived("host", "tap0"));
        assert_ne!(mac, Mac::derived("host", "tap1"));
        assert_ne!(mac, Mac::derived("hostt", "ap0"));
        assert_eq!(mac.0[0] & 3, 2);
    }
}

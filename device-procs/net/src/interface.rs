//! The host side of the link: a network interface, by name (netdevice(7)).

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::str::FromStr;

use rustix::net::{AddressFamily, SocketType};

/// An interface in the network namespace in which it was opened.
pub struct Interface {
    socket: OwnedFd,
    name: String,
}

/// An IPv4 address with its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// The address.
    pub address: Ipv4Addr,
    /// Length of the prefix in bits.
    pub prefix: u32,
}

impl Network {
    fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - self.prefix).unwrap_or(0))
    }
}

impl FromStr for Network {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = "not an IPv4 address with a prefix length: give one such as 10.0.2.1/24";
        let (address, prefix) = text.split_once('/').ok_or(wrong)?;
        let network = Network {
            address: address.parse().map_err(|_| wrong)?,
            prefix: prefix.parse().map_err(|_| wrong)?,
        };
        if network.prefix > 30 || network.address.is_unspecified() {
            return Err(
                "no room for a guest: give an address other than 0.0.0.0 and a prefix of at most 30 bits",
            );
        }
        Ok(network)
    }
}

/// An ioctl(2) argument for interface `name`, with a zeroed union.
///
/// # Errors
/// `InvalidInput` for a name that is not an interface name.
pub fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.as_bytes();
    // The last byte stays 0.
    if bytes.is_empty() || bytes.len() >= request.ifr_name.len() || bytes.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not an interface name: give 1 to 15 bytes",
        ));
    }
    for (to, &from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// The interface name that the kernel wrote to `request`.
pub fn name_of(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|&c| c as u8);
    let bytes: Vec<u8> = bytes.take_while(|&byte| byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn internet_address(address: Ipv4Addr) -> libc::sockaddr {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr {
            s_addr: u32::from(address).to_be(),
        },
        sin_zero: [0; 8],
    };
    // SAFETY: both types are plain data of 16 bytes and start with the address family.
    unsafe { std::mem::transmute(address) }
}

impl Interface {
    /// The interface `name` of the current network namespace. It is looked up on use.
    ///
    /// # Errors
    /// socket(2) fails.
    pub fn new(name: &str) -> io::Result<Self> {
        Ok(Interface {
            socket: rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?,
            name: name.to_owned(),
        })
    }

    fn ioctl(
        &self,
        operation: libc::Ioctl,
        fill: impl FnOnce(&mut libc::__c_anonymous_ifr_ifru),
    ) -> io::Result<libc::ifreq> {
        let mut request = request(&self.name)?;
        fill(&mut request.ifr_ifru);
        // SAFETY: all requests of netdevice(7) take a `struct ifreq`, which outlives the call.
        if unsafe { libc::ioctl(self.socket.as_raw_fd(), operation, &mut request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(request)
    }

    /// The MTU in bytes.
    ///
    /// # Errors
    /// The interface does not exist.
    pub fn mtu(&self) -> io::Result<u32> {
        let request = self.ioctl(libc::SIOCGIFMTU as libc::Ioctl, |_| {})?;
        // SAFETY: SIOCGIFMTU has set this field.
        Ok(unsafe { request.ifr_ifru.ifru_mtu }.cast_unsigned())
    }

    /// Sets the MTU in bytes.
    ///
    /// # Errors
    /// The caller lacks CAP_NET_ADMIN, or the interface does not support this MTU.
    pub fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        self.ioctl(libc::SIOCSIFMTU as libc::Ioctl, |union| {
            union.ifru_mtu = mtu.into();
        })
        .map(drop)
    }

    /// Sets the MAC address.
    ///
    /// # Errors
    /// The caller lacks CAP_NET_ADMIN, or the interface has no MAC address.
    pub fn set_mac(&self, address: [u8; 6]) -> io::Result<()> {
        self.ioctl(libc::SIOCSIFHWADDR as libc::Ioctl, |union| {
            let mut data = [0; 14];
            data[..6].copy_from_slice(&address.map(u8::cast_signed));
            union.ifru_hwaddr = libc::sockaddr {
                sa_family: libc::ARPHRD_ETHER,
                sa_data: data,
            };
        })
        .map(drop)
    }

    /// Sets the IPv4 address and netmask.
    ///
    /// # Errors
    /// The caller lacks CAP_NET_ADMIN.
    pub fn set_network(&self, network: Network) -> io::Result<()> {
        self.ioctl(libc::SIOCSIFADDR as libc::Ioctl, |union| {
            union.ifru_addr = internet_address(network.address);
        })?;
        self.ioctl(libc::SIOCSIFNETMASK as libc::Ioctl, |union| {
            union.ifru_netmask = internet_address(network.mask());
        })
        .map(drop)
    }

    /// Whether the interface is up.
    ///
    /// # Errors
    /// The interface does not exist.
    pub fn is_up(&self) -> io::Result<bool> {
        Ok(self.flags()? & libc::IFF_UP as libc::c_short != 0)
    }

    fn flags(&self) -> io::Result<libc::c_short> {
        let request = self.ioctl(libc::SIOCGIFFLAGS as libc::Ioctl, |_| {})?;
        // SAFETY: SIOCGIFFLAGS has set this field.
        Ok(unsafe { request.ifr_ifru.ifru_flags })
    }

    /// Brings the interface up.
    ///
    /// # Errors
    /// The caller lacks CAP_NET_ADMIN.
    pub fn bring_up(&self) -> io::Result<()> {
        let flags = self.flags()? | libc::IFF_UP as libc::c_short;
        self.ioctl(libc::SIOCSIFFLAGS as libc::Ioctl, |union| {
            union.ifru_flags = flags;
        })
        .map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_parse() {
        let network: Network = "10.0.2.1/24".parse().unwrap();
        assert_eq!(network.address, Ipv4Addr::new(10, 0, 2, 1));
        assert_eq!(network.mask(), Ipv4Addr::new(255, 255, 255, 0));
        let all: Network = "1.2.3.4/0".parse().unwrap();
        assert_eq!(all.mask(), Ipv4Addr::UNSPECIFIED);
        for bad in [
            "",
            "10.0.2.1",
            "10.0.2.1/",
            "10.0.2.1/33",
            "10.0.2/24",
            "0.0.0.0/8",
            "::1/64",
        ] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }

    #[test]
    fn interface_names_have_1_to_15_bytes() {
        assert_eq!(name_of(&request("tap0").unwrap()), "tap0");
        for bad in ["", "a-name-of-16-byte", "nul\0"] {
            assert!(request(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_loopback_interface_is_found() {
        assert!(Interface::new("lo").unwrap().mtu().unwrap() > 0);
        assert!(Interface::new("no-such-if").unwrap().mtu().is_err());
    }
}

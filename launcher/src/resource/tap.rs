//! An existing tap device, attached for others (Documentation/networking/tuntap.rst
//! of the kernel).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};

/// Attaches to `name`, so that each frame has the header of virtio-net before it.
///
/// # Errors
/// When there is no such tap device, when we may not, or when somebody else is attached.
pub fn attach(name: &str) -> io::Result<OwnedFd> {
    // TUNSETIFF would make one, with nobody at its far end, for a slip of the pen.
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    netdevice::name_to_index(&socket, name)?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tap = rustix::fs::open("/dev/net/tun", flags, Mode::empty())
        .map_err(|error| io::Error::new(error.kind(), format!("/dev/net/tun: {error}")))?;

    // SAFETY: plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays the zero that ends it; that the name fits is known by now.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF takes a `struct ifreq`.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &mut request) } < 0 {
        let error = io::Error::last_os_error();
        let why = match error.raw_os_error() {
            Some(libc::EBUSY) => "another process is attached to it",
            Some(libc::EINVAL) => "no tap device, or one of another kind (with many queues)",
            Some(libc::EPERM) => "it belongs to another user",
            _ => return Err(error),
        };
        return Err(io::Error::new(error.kind(), why));
    }
    Ok(tap)
}

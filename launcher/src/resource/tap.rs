//! Attaching to an existing tap device for a process that inherits it
//! (Documentation/networking/tuntap.rst in the kernel's sources).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};

/// Attaches to the tap device `name`, with a virtio-net header in front of each frame.
///
/// # Errors
/// The device does not exist, is not a tap device with a single queue, belongs to another
/// user, or another process is attached to it.
pub fn attach(name: &str) -> io::Result<OwnedFd> {
    // For a misspelt name, TUNSETIFF would create a new device that is connected to nothing.
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    netdevice::name_to_index(&socket, name)?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tap = rustix::fs::open("/dev/net/tun", flags, Mode::empty())
        .map_err(|error| io::Error::new(error.kind(), format!("/dev/net/tun: {error}")))?;

    // SAFETY: `ifreq` is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays the terminating zero. The name fits, as the interface exists.
    let max_len = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..max_len].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes the `struct ifreq` that `request` is.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &mut request) } < 0 {
        let error = io::Error::last_os_error();
        let why = match error.raw_os_error() {
            Some(libc::EBUSY) => "another process is attached to it",
            Some(libc::EINVAL) => "not a tap device with a single queue",
            Some(libc::EPERM) => "the tap device belongs to another user",
            _ => return Err(error),
        };
        return Err(io::Error::new(error.kind(), why));
    }
    Ok(tap)
}

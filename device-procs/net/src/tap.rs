//! A tap device. The host's network stack receives what is written to it, and vice versa.
//! Each frame starts with a virtio-net header, which the kernel writes and reads itself, so
//! nothing is translated here. See Documentation/networking/tuntap.rst of the kernel.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::Context as _;
use device_core::fd::set_nonblocking;
use outrigger_sandbox::{Check, Rule};
use rustix::fs::{Mode, OFlags};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
};

use crate::interface::{self, Interface};

/// Length of `struct virtio_net_hdr_v1` in bytes (virtio 1.2 section 5.1.6).
pub const HEADER: usize = 12;

/// System calls beyond those of the serve loop, which include readv and writev: the
/// offloads change with the driver.
pub const SYSCALLS: &[Rule] = &[Rule::when(
    libc::SYS_ioctl,
    &[Check::OneOf(1, &[libc::TUNSETOFFLOAD as u32])],
)];

/// An attached tap device.
pub struct Tap {
    fd: OwnedFd,
    name: String,
}

/// Explains an `error` of TUNSETIFF, or of the look-up of the interface before it.
fn explain_attach_error(error: io::Error) -> io::Error {
    let why = match error.raw_os_error() {
        Some(libc::ENODEV) => "there is no such tap device",
        Some(libc::EBUSY) => "another process is attached to it",
        Some(libc::EINVAL) => "not a tap device, or a multi-queue one",
        Some(libc::EPERM) => "it belongs to another user",
        _ => return error,
    };
    io::Error::new(error.kind(), why)
}

impl Tap {
    /// Attaches to the existing tap device `name` of the current network namespace.
    ///
    /// # Errors
    /// It does not exist, belongs to another user, or another process is attached to it.
    pub fn attach(name: &str) -> anyhow::Result<Self> {
        let fd = Self::open()?;
        // TUNSETIFF creates a missing device, which would hide a mistyped name.
        Interface::new(name)
            .and_then(|interface| interface.mtu())
            .map_err(explain_attach_error)?;
        Ok(Self::named(fd, name).map_err(explain_attach_error)?)
    }

    /// Creates a tap device `name`, which disappears with this process.
    ///
    /// # Errors
    /// The caller lacks CAP_NET_ADMIN in this network namespace.
    pub fn create(name: &str) -> anyhow::Result<Self> {
        Ok(Self::named(Self::open()?, name)?)
    }

    fn open() -> anyhow::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        rustix::fs::open("/dev/net/tun", flags, Mode::empty()).context("/dev/net/tun")
    }

    fn named(fd: OwnedFd, name: &str) -> io::Result<Self> {
        let mut request = interface::request(name)?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF takes a `struct ifreq`.
        if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &mut request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let name = interface::name_of(&request);
        let tap = Tap { fd, name }.with_header()?;
        tap.set_offload(0)?;
        Ok(tap)
    }

    /// Uses an inherited descriptor that is attached to a tap device. The previous process
    /// may still serve it, so the offloads stay until a driver negotiates its own.
    ///
    /// # Errors
    /// It is not a tap device, or its frames have no virtio-net header.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        // The kernel replaces the name.
        let mut request = interface::request("tap")?;
        // SAFETY: TUNGETIFF writes a `struct ifreq`, which outlives the call.
        if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &mut request) } < 0 {
            return Err(io::Error::other("not an attached tap device"));
        }
        // SAFETY: TUNGETIFF has set this field.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & wanted != wanted {
            return Err(io::Error::other(
                "not attached with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR",
            ));
        }
        set_nonblocking(&fd)?;
        let name = interface::name_of(&request);
        Tap { fd, name }.with_header()
    }

    fn with_header(self) -> io::Result<Self> {
        let size = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &size) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(self)
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Lets the host's network stack send what a driver with these feature bits can
    /// receive: frames without checksum, and frames that are not segmented yet.
    ///
    /// # Errors
    /// TUNSETOFFLOAD fails.
    pub fn set_offload(&self, features: u64) -> io::Result<()> {
        let mut offload = 0;
        for (feature, flag) in [
            (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
            (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
            (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
        ] {
            if features & 1 << feature != 0 {
                offload |= flag;
            }
        }
        // Segmentation offload requires checksum offload; the kernel refuses it alone.
        if offload & libc::TUN_F_CSUM == 0 {
            offload = 0;
        }
        let offload = libc::c_ulong::from(offload);
        // SAFETY: TUNSETOFFLOAD takes its argument as a number.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, offload) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Reads a frame with its header into `iovecs`; returns the length of what
    /// went there. The end of a frame that is too long is lost.
    ///
    /// # Errors
    /// `WouldBlock` when there is none, otherwise the error of readv(2).
    ///
    /// # Safety
    /// The iovecs describe memory that may be written for the length of the call.
    pub unsafe fn read(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller guarantees that the iovecs describe mapped memory.
        unsafe { self.transfer(libc::readv, iovecs) }
    }

    /// Writes a frame with its header.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room, otherwise the error of writev(2), for example for
    /// an invalid header or length.
    ///
    /// # Safety
    /// The iovecs describe memory that may be read for the length of the call.
    pub unsafe fn write(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller guarantees that the iovecs describe mapped memory.
        unsafe { self.transfer(libc::writev, iovecs) }
    }

    /// # Safety
    /// As for [`Tap::read`] and [`Tap::write`].
    unsafe fn transfer(
        &self,
        call: unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int) -> libc::ssize_t,
        iovecs: &[libc::iovec],
    ) -> io::Result<usize> {
        let count = libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX);
        loop {
            // SAFETY: the caller guarantees that the iovecs describe mapped memory; `count` iovecs are there.
            let done = unsafe { call(self.fd.as_raw_fd(), iovecs.as_ptr(), count) };
            if let Ok(done) = usize::try_from(done) {
                return Ok(done);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

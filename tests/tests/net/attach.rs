//! The ways to attach to a tap device. Each test runs in a thread with its own network
//! namespace and uses a packet socket on the tap device.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use outrigger_tests::guest::{EVENT_IDX, Guest};
use outrigger_tests::net::*;
use outrigger_tests::process::{Launch, Process, readable_within};
use outrigger_tests::{DEADLINE, binaries};
use rustix::fs::{FileType, Mode};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Runs `body` in a thread with a network namespace of its own.
fn in_own_network(body: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: the descriptor table stays shared (no CLONE_FILES).
            unsafe { unshare_unsafe(UnshareFlags::NEWNET).unwrap() };
            body();
        });
        thread.join().unwrap();
    });
}

/// Creates a tap device in this namespace and attaches to it.
fn tap(name: &str, flags: libc::c_int) -> OwnedFd {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: `ifreq` is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes the `struct ifreq` that `request` is.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    assert_eq!(result, 0);
    file.into()
}

/// Creates a persistent tap device as `ip tuntap add` does. It is removed with the namespace.
fn persistent_tap(name: &str) {
    let tap = tap(name, libc::IFF_TAP | libc::IFF_NO_PI);
    // SAFETY: TUNSETPERSIST takes its argument as a number.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETPERSIST, 1 as libc::c_ulong) };
    assert_eq!(result, 0);
}

/// Opens a socket that receives and sends frames on interface `name` of this namespace.
fn packet_socket(name: &str) -> OwnedFd {
    let all = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: the call creates a descriptor that nothing else owns.
    unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let socket = libc::socket(libc::AF_PACKET, kind, all.into());
        assert!(socket >= 0);
        let socket = OwnedFd::from_raw_fd(socket);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        let name = std::ffi::CString::new(name).unwrap();
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        assert!(address.sll_ifindex > 0, "there is no {name:?}");
        let len = std::mem::size_of_val(&address) as libc::socklen_t;
        let bound = libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len);
        assert_eq!(bound, 0);
        socket
    }
}

/// Sends a frame in each direction through a device that is attached to `name`.
fn frames_go_through(process: &Process, name: &str) {
    let mut guest = Guest::boot(process.connect(), EVENT_IDX, 2);
    exchange_frames(&mut guest, name);
}

fn exchange_frames(guest: &mut Guest, name: &str) {
    let socket = packet_socket(name);
    let frame = ethernet(
        BROADCAST,
        EXPERIMENT,
        b"from the guest to the host, padded to sixty",
    );
    send(guest, &frame);
    loop {
        assert!(readable_within(&socket, DEADLINE), "the frame did not come");
        let mut bytes = [0; 2048];
        let len = rustix::io::read(&socket, &mut bytes).unwrap();
        if bytes[..len] == frame {
            break;
        }
    }
    post(guest, 4, 2048);
    let mut frame = ethernet(
        MAC,
        EXPERIMENT,
        b"from the host to the guest, padded to sixty",
    );
    frame[6] = 0x02;
    rustix::io::write(&socket, &frame).unwrap();
    receive_until(guest, |got| (got.bytes == frame).then_some(()));
}

#[test]
fn attaches_to_a_tap_device_by_name() {
    in_own_network(|| {
        persistent_tap("outrigger0");
        let launch = Launch::new("device-net").args(["--tap", "outrigger0", "--mtu", "1280"]);
        let process = launch.listening();
        frames_go_through(&process, "outrigger0");
        assert_eq!(mtu_of("outrigger0"), 1280);
        // The tap device is in use.
        let process = Launch::new("device-net")
            .args([
                "--tap",
                "outrigger0",
                "--socket-path",
                "/nonexistent/socket",
            ])
            .spawn();
        assert_eq!(process.wait().code(), Some(1));
    });
}

#[test]
fn uses_an_inherited_tap_device() {
    in_own_network(|| {
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let launch = Launch::new("device-net").pass("--tap-fd", tap("tap7", flags));
        frames_go_through(&launch.listening(), "tap7");
    });
}

/// As with a launcher, which attaches once, and starts the next process before the previous one
/// has ended.
#[test]
fn successive_processes_share_an_inherited_tap_device() {
    in_own_network(|| {
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let tap = tap("tap8", flags);
        let start = || {
            let tap = tap.try_clone().unwrap();
            Launch::new("device-net").pass("--tap-fd", tap).listening()
        };
        let mut process = start();
        let mut guest = Guest::boot(process.connect(), EVENT_IDX, 2);
        let address = guest.config(0, 6);
        for _ in 0..5 {
            exchange_frames(&mut guest, "tap8");
            let next = start();
            // The process without a guest takes no frames.
            exchange_frames(&mut guest, "tap8");
            process.signal(rustix::process::Signal::KILL);
            process.wait();
            guest = guest.move_to(next.connect());
            assert_eq!(guest.config(0, 6), address);
            process = next;
        }
        exchange_frames(&mut guest, "tap8");
    });
}

#[test]
fn refuses_devices_that_are_not_suitable_tap_devices() {
    in_own_network(|| {
        let wrong: [OwnedFd; 3] = [
            tap("tap1", libc::IFF_TAP | libc::IFF_NO_PI), // without headers
            tap("tun1", libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR),
            tempfile::tempfile().unwrap().into(),
        ];
        for fd in wrong {
            let (launch, socket) = (Launch::new("device-net"), "socket");
            let path = launch.directory().join(socket);
            let process = launch
                .args(["--socket-path".as_ref(), path.as_os_str()])
                .pass("--tap-fd", fd)
                .spawn();
            assert_eq!(process.wait().code(), Some(1));
            let log = process.log();
            assert!(log.starts_with("device-net: --tap-fd"), "{log}");
            assert_eq!(log.lines().count(), 1, "{log}");
        }
    });
}

#[test]
fn refuses_contradictory_options() {
    for args in [
        &["--tap", "tap0", "--isolated"][..],
        &["--tap", "tap0", "--tap-fd", "3"],
        &["--isolated", "10.0.2.1"],
        &["--isolated", "--mac", "01:00:00:00:00:00"],
        &["--isolated", "--mtu", "67"],
        &[],
    ] {
        let process = Launch::new("device-net").args(args).spawn();
        assert_eq!(
            process.wait().code(),
            Some(2),
            "{args:?}: {}",
            process.log()
        );
    }
}

#[test]
fn an_ordinary_user_can_have_an_isolated_network() {
    // The test opens the program, because the user may not search the directories of its path.
    let program = File::open(binaries::binary("device-net")).unwrap();
    in_own_network(|| {
        make_tun_accessible();
        let probe = Command::new("unshare")
            .args(["--user", "--net", "true"])
            .uid(65534)
            .status();
        if probe.is_ok_and(|status| status.success()) {
            pings_as_unprivileged_user(&program);
        } else {
            println!("not tried: this host gives an ordinary user no namespaces");
        }
    });
}

/// Mounts a /dev/net/tun that every user can open, as on many hosts, in a new mount namespace of
/// this thread.
fn make_tun_accessible() {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    // SAFETY: the descriptor table stays shared (no CLONE_FILES).
    unsafe { unshare_unsafe(UnshareFlags::NEWNS).unwrap() };
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .unwrap();
    mount("tmpfs", "/dev/net", "tmpfs", MountFlags::empty(), None).unwrap();
    let tun = rustix::fs::makedev(10, 200);
    let (kind, mode) = (FileType::CharacterDevice, Mode::from_raw_mode(0o666));
    rustix::fs::mknodat(rustix::fs::CWD, "/dev/net/tun", kind, mode, tun).unwrap();
    rustix::fs::chmod("/dev/net/tun", mode).unwrap(); // whatever the umask
}

fn pings_as_unprivileged_user(program: &File) {
    let (process, stream) = Launch::of(program)
        .as_user(65534)
        .args(["--isolated"])
        .connected();
    let mut guest = Guest::boot(stream, EVENT_IDX, 2);
    post(&mut guest, 4, 2048);
    let host = resolve(&mut guest, GUEST);
    send(&mut guest, &ethernet(host, IPV4, &ping(1, b"unprivileged")));
    receive_until(&mut guest, |frame| pong(frame, 1));
    assert_eq!(process.status("", "CapEff"), "0000000000000000");
    assert_eq!(process.status("", "Seccomp"), "2");
}

#[test]
fn refuses_a_tap_device_that_another_process_is_attached_to() {
    in_own_network(|| {
        persistent_tap("outrigger0");
        let launch = Launch::new("device-net").args(["--tap", "outrigger0"]);
        let _first = launch.listening();
        let launch = Launch::new("device-net").args(["--tap", "outrigger0"]);
        let socket = launch.directory().join("socket");
        let second = launch
            .args(["--socket-path".as_ref(), socket.as_os_str()])
            .spawn();
        assert_eq!(second.wait().code(), Some(1));
        let line = "device-net: --tap outrigger0: another process is attached to it";
        assert_eq!(second.log().trim_end(), line);
        assert!(!socket.exists());
    });
}

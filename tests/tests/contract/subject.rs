//! The devices under test.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, Ordering};

use outrigger_tests::guest::Guest;
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::queue::Buffer;
use outrigger_tests::ram::Ram;
use outrigger_tests::{DEADLINE, console, disk, net};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_IN};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU};

/// A device under test, with its image, tap or client.
pub trait Subject: Sized {
    /// Name of its program.
    const NAME: &'static str;
    /// Number of queues.
    const QUEUES: usize;
    /// A queue whose requests the device completes without other input.
    const REQUESTS: usize;
    /// Feature bits that it always offers.
    const FEATURES: u64;
    /// Its type in `--print-capabilities`.
    const TYPE: &'static str;

    /// Makes its image, tap or socket, and the options for it.
    fn prepare() -> (Launch, Self);

    /// A request for queue [`Subject::REQUESTS`], always the same.
    fn request(ram: &Ram) -> Vec<Buffer>;

    /// Sends data through the device and back, and compares them. All queues are running.
    fn round_trip(device: &mut Device<Self>, guest: &mut Guest);
}

/// A running device.
pub struct Device<S> {
    pub process: Process,
    pub subject: S,
}

impl<S: Subject> Device<S> {
    pub fn listening() -> Self {
        let (launch, subject) = S::prepare();
        let process = launch.listening();
        Device { process, subject }
    }

    /// A guest with all queues running.
    pub fn boot(&self, features: u64) -> Guest {
        Guest::boot(self.process.connect(), features, S::QUEUES)
    }

    pub fn round_trip(&mut self, guest: &mut Guest) {
        S::round_trip(self, guest);
    }

    /// Checks that the process still serves a front end.
    pub fn must_serve(&mut self) {
        assert!(self.process.is_running(), "the process is gone");
        let mut guest = self.boot(S::FEATURES);
        self.round_trip(&mut guest);
    }
}

/// device-disk with `QUEUES` queues and an image whose bytes are known.
pub struct Disk<const QUEUES: usize>;

impl<const QUEUES: usize> Subject for Disk<QUEUES> {
    const NAME: &'static str = "device-disk";
    const QUEUES: usize = QUEUES;
    const REQUESTS: usize = QUEUES - 1;
    const FEATURES: u64 = 1 << VIRTIO_BLK_F_FLUSH;
    const TYPE: &'static str = "block";

    fn prepare() -> (Launch, Self) {
        let launch = Launch::new(Self::NAME);
        let image = launch.directory().join("image");
        std::fs::write(&image, disk::pattern_of(0, 1 << 20)).unwrap();
        let queues = format!("--queues={QUEUES}");
        (
            launch.args([queues.as_ref(), "--blk-file".as_ref(), image.as_os_str()]),
            Disk,
        )
    }

    fn request(ram: &Ram) -> Vec<Buffer> {
        let data = Buffer::writable(ram.alloc(4096), 4096);
        disk::Request::new(ram, VIRTIO_BLK_T_IN, 8, &[data]).buffers
    }

    fn round_trip(_device: &mut Device<Self>, guest: &mut Guest) {
        for queue in &mut guest.queues {
            let request = Self::request(&guest.ram);
            assert_eq!(queue.run(&request).len, 4097);
            assert_eq!(guest.ram.get(request[2].address, 1), [0]);
            let data = guest.ram.get(request[1].address, 4096);
            assert_eq!(data, disk::pattern_of(8 * 512, 4096));
        }
    }
}

/// device-net with a network namespace of its own.
pub struct Net;

impl Subject for Net {
    const NAME: &'static str = "device-net";
    const QUEUES: usize = 2;
    const REQUESTS: usize = net::TX;
    const FEATURES: u64 =
        1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU | 1 << VIRTIO_NET_F_MRG_RXBUF;
    const TYPE: &'static str = "net";

    fn prepare() -> (Launch, Self) {
        (Launch::new(Self::NAME).args(["--isolated"]), Net)
    }

    fn request(ram: &Ram) -> Vec<Buffer> {
        let frame = net::ethernet(net::BROADCAST, net::EXPERIMENT, &[0x5a; 500]);
        net::buffers(ram, &frame)
    }

    fn round_trip(_device: &mut Device<Self>, guest: &mut Guest) {
        // Another sender address each time, so that an old answer is not taken for this one.
        static ASKING: AtomicU8 = AtomicU8::new(0);
        let number = 2 + ASKING.fetch_add(1, Ordering::Relaxed) % 250;
        net::post(guest, 2, 2048);
        let host = net::resolve(guest, Ipv4Addr::new(10, 0, 2, number));
        assert_eq!(host[0] & 1, 0, "one station");
    }
}

/// device-console with a unix socket, and its client.
pub struct Console(Option<UnixStream>);

impl Subject for Console {
    const NAME: &'static str = "device-console";
    const QUEUES: usize = 2;
    const REQUESTS: usize = console::TX;
    const FEATURES: u64 = 0;
    const TYPE: &'static str = "console";

    fn prepare() -> (Launch, Self) {
        let launch = Launch::new(Self::NAME);
        let socket = launch.directory().join("console");
        let launch = launch.args(["--unix".as_ref(), socket.as_os_str()]);
        (launch, Console(None))
    }

    fn request(ram: &Ram) -> Vec<Buffer> {
        vec![Buffer::readable(ram.put(&[b'.'; 100]), 100)]
    }

    fn round_trip(device: &mut Device<Self>, guest: &mut Guest) {
        static SAYING: AtomicU8 = AtomicU8::new(0);
        let number = SAYING.fetch_add(1, Ordering::Relaxed);
        let client = device.subject.0.get_or_insert_with(|| {
            let path = device.process.directory().join("console");
            let client = UnixStream::connect(path).unwrap();
            client.set_read_timeout(Some(DEADLINE)).unwrap();
            client
        });
        // The client also gets the output of earlier requests.
        let text = format!("guest {number}\n");
        console::send(guest, text.as_bytes());
        let mut heard = Vec::new();
        while !heard.ends_with(text.as_bytes()) {
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            heard.extend(byte);
        }
        let text = format!("client {number}\n");
        console::post(guest, 1, 64);
        client.write_all(text.as_bytes()).unwrap();
        assert_eq!(console::receive(guest), text.as_bytes());
    }
}

//! A disk process with its image and its guest.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use outrigger_tests::disk::{Request, SECTOR, pattern_of};
use outrigger_tests::guest::{EVENT_IDX, Guest};
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::queue::Buffer;
use outrigger_tests::ram::Ram;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

pub const SIZE: usize = 1 << 20;
pub const SECTORS: u64 = (SIZE / SECTOR) as u64;
pub const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

pub struct Disk {
    pub image: PathBuf,
    pub process: Process,
    pub guest: Guest,
}

impl Disk {
    pub fn start(size: usize, options: &[&str], queues: usize) -> Self {
        Self::launch(Launch::new("device-disk"), size, options, queues, FLUSH)
    }

    /// Starts a disk with a driver that accepts `features`.
    pub fn driven(features: u64) -> Self {
        Self::launch(Launch::new("device-disk"), SIZE, &[], 1, features)
    }

    /// As above, with a command line of the test.
    pub fn launch(
        launch: Launch,
        size: usize,
        options: &[&str],
        queues: usize,
        features: u64,
    ) -> Self {
        let image = launch.directory().join("image");
        std::fs::write(&image, pattern_of(0, size)).unwrap();
        if options.contains(&"--read-only") {
            std::fs::set_permissions(&image, Permissions::from_mode(0o444)).unwrap();
        }
        let process = launch
            .args(["--blk-file".as_ref(), image.as_os_str()])
            .args(options)
            .listening();
        let guest = Guest::boot(process.connect(), features | EVENT_IDX, queues);
        Disk {
            image,
            process,
            guest,
        }
    }

    pub fn new(options: &[&str]) -> Self {
        Self::start(SIZE, options, 1)
    }

    pub fn ram(&self) -> &Ram {
        &self.guest.ram
    }

    /// Sends a request with data for the device; returns its status.
    pub fn send(&mut self, kind: u32, sector: u64, data: &[u8]) -> u32 {
        let data = match data.len() {
            0 => vec![],
            len => vec![Buffer::readable(self.ram().put(data), len as u32)],
        };
        self.run(kind, sector, &data)
    }

    /// Sends a request for data; returns its status and the data.
    pub fn receive(&mut self, kind: u32, sector: u64, len: usize) -> (u32, Vec<u8>) {
        let at = self.ram().put(&vec![0xcc; len]);
        let status = self.run(kind, sector, &[Buffer::writable(at, len as u32)]);
        (status, self.ram().get(at, len))
    }

    pub fn run(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> u32 {
        let request = Request::new(&self.guest.ram, kind, sector, data);
        request.run(&self.guest.ram, &mut self.guest.queues[0])
    }

    pub fn file(&self) -> Vec<u8> {
        std::fs::read(&self.image).unwrap()
    }

    pub fn offers(&mut self, feature: u32) -> bool {
        use vhost::VhostBackend;
        self.guest.frontend.get_features().unwrap() & (1 << feature) != 0
    }
}

//! Helpers of the formats' tests: a disk on top of an image, a model of it, and QEMU.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use device_vhost_user::Buffers;
use device_vhost_user::GuestMemory;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{BackingPolicy, Extent, Image, ImageFormat, ImageOrigin, SECTOR, open, open_file};
use crate::lock::{self, ImageAccess};
use crate::transfer;

/// The longest request in bytes.
pub const LARGEST: usize = 1 << 20;

/// An image as the rest of the program uses it.
pub struct TestDisk {
    pub image: Arc<dyn Image>,
    memory: Mutex<GuestMemory>,
}

impl TestDisk {
    pub fn new(image: Arc<dyn Image>) -> Self {
        // Two regions, so that buffers consist of several slices.
        let half = LARGEST / 2;
        let ranges = [
            (GuestAddress(0), half + 4096),
            (GuestAddress(1 << 30), half + 4096),
        ];
        TestDisk {
            image,
            memory: Mutex::new(GuestMemory::from_ranges(&ranges).unwrap()),
        }
    }

    pub fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let memory = self.memory.lock().unwrap();
        let mut buffers = pieces(&memory, len);
        let whole = buffers.clone();
        whole.copy_from(&vec![0xa5; len]);
        let mut at = offset;
        while !buffers.is_empty() {
            let left = buffers.len() as u64;
            let extent = self.image.map_read(at, left)?;
            let len = extent.len();
            assert!(len > 0 && len <= left, "{extent:?}");
            let piece = buffers.take(len as usize).unwrap();
            match extent {
                Extent::Data { offset, .. } => {
                    transfer::read(self.image.file(), offset, &piece)?;
                }
                Extent::Zero { .. } => {
                    piece.copy_from(&vec![0; len as usize]);
                }
                Extent::Special { .. } => self.image.read(at, &piece)?,
            }
            at += len;
        }
        let mut bytes = vec![0; len];
        whole.copy_to(&mut bytes);
        Ok(bytes)
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let memory = self.memory.lock().unwrap();
        let mut buffers = pieces(&memory, bytes.len());
        buffers.copy_from(bytes);
        let mut at = offset;
        while !buffers.is_empty() {
            let left = buffers.len() as u64;
            let extent = self.image.map_write(at, left)?;
            let len = extent.len();
            assert!(len > 0 && len <= left, "{extent:?}");
            let piece = buffers.take(len as usize).unwrap();
            match extent {
                Extent::Data { offset, .. } => match self.image.metadata_file() {
                    // Fault injection.
                    Some(image_file) => image_file.write_guest(&piece, offset)?,
                    None => transfer::write(self.image.file(), offset, &piece)?,
                },
                _ => self.image.write(at, &piece)?,
            }
            at += len;
        }
        Ok(())
    }
}

fn pieces(memory: &GuestMemory, len: usize) -> Buffers<'_> {
    let first = len / 2 / 512 * 512;
    [(0, first), (1 << 30, len - first)]
        .iter()
        .map(|&(at, len)| memory.get_slice(GuestAddress(at), len).unwrap())
        .collect()
}

/// Pseudo-random numbers, the same in every run (xorshift64*).
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}

/// A request of a guest.
#[derive(Clone, Debug)]
pub enum Step {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Discard(u64, u64),
    Zero(u64, u64),
}

impl Step {
    /// A random request on a disk of `capacity` bytes, mostly a small one.
    pub fn random(random: &mut Random, capacity: u64) -> Self {
        let sectors = capacity / SECTOR;
        let most = [1, 8, 64, 700][random.below(4) as usize].min(sectors);
        let count = 1 + random.below(most);
        let offset = random.below(sectors - count + 1) * SECTOR;
        let len = count * SECTOR;
        match random.below(10) {
            0..=3 => Step::Read(offset, len as usize),
            4..=7 => {
                let byte = 1 + random.below(255) as u8;
                let bytes = (0..len).map(|at| byte ^ (at >> 9) as u8).collect();
                Step::Write(offset, bytes)
            }
            8 => Step::Discard(offset, len),
            _ => Step::Zero(offset, len),
        }
    }

    pub fn run(&self, disk: &TestDisk) -> io::Result<Vec<u8>> {
        match self {
            Step::Read(offset, len) => return disk.read(*offset, *len),
            Step::Write(offset, bytes) => disk.write(*offset, bytes)?,
            Step::Discard(offset, len) => match disk.image.discard(*offset, *len) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                result => result?,
            },
            Step::Zero(offset, len) => disk.image.write_zeroes(*offset, *len, true)?,
        }
        Ok(Vec::new())
    }

    /// The range that it writes, if any.
    pub fn range(&self) -> std::ops::Range<usize> {
        match self {
            Step::Read(..) => 0..0,
            Step::Write(at, bytes) => *at as usize..*at as usize + bytes.len(),
            Step::Discard(at, len) | Step::Zero(at, len) => *at as usize..(*at + *len) as usize,
        }
    }
}

/// Runs `count` random steps and compares the disk with `model`, its content.
pub fn exercise(disk: &TestDisk, model: &mut [u8], random: &mut Random, count: usize) {
    for number in 0..count {
        let step = Step::random(random, model.len() as u64);
        let read = step.run(disk).unwrap_or_else(|e| panic!("{number}: {e}"));
        match &step {
            Step::Read(offset, len) => {
                let expected = &model[*offset as usize..][..*len];
                assert!(read == expected, "step {number}: {len} bytes at {offset}");
            }
            Step::Write(offset, bytes) => {
                model[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
            }
            Step::Discard(offset, len) => {
                // What the range then reads as is not defined.
                let now = disk.read(*offset, *len as usize).unwrap();
                let model = &mut model[*offset as usize..][..*len as usize];
                for (now, then) in now.iter().zip(model.iter()) {
                    assert!(*now == 0 || now == then, "step {number}: {step:?}");
                }
                model.copy_from_slice(&now);
            }
            Step::Zero(..) => model[step.range()].fill(0),
        }
    }
    compare(disk, model);
}

/// Compares the whole disk with `model`.
pub fn compare(disk: &TestDisk, model: &[u8]) {
    for (index, expected) in model.chunks(LARGEST).enumerate() {
        let offset = (index * LARGEST) as u64;
        let read = disk.read(offset, expected.len()).unwrap();
        let wrong = read.iter().zip(expected).position(|(a, b)| a != b);
        assert_eq!(wrong.map(|at| at as u64 + offset), None);
    }
}

/// A directory with images in it.
pub struct TestImages(tempfile::TempDir);

impl TestImages {
    pub fn new() -> Self {
        TestImages(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs qemu-img in the directory; returns its output.
    pub fn qemu_img(&self, args: &[&str]) -> String {
        retry_locked(|| {
            let output = Command::new("qemu-img")
                .args(args)
                .current_dir(self.0.path())
                .output()
                .unwrap_or_else(|e| panic!("qemu-img: {e}; ./test.sh installs it"));
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said).into_owned();
            if said.contains("Failed to get") {
                return Err(format!("qemu-img {args:?}: {said}"));
            }
            assert!(output.status.success(), "qemu-img {args:?}: {said}");
            Ok(said)
        })
    }

    /// Creates an image.
    pub fn create(&self, name: &str, format: &str, options: &str, size: &str) {
        let mut args = vec!["create", "-q", "-f", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        self.qemu_img(&[args, vec![name, size]].concat());
    }

    /// Creates a file that contains `model`.
    pub fn raw(&self, name: &str, model: &[u8]) {
        std::fs::write(self.path(name), model).unwrap();
    }

    /// qemu-img finds no error in the image, and the same content.
    pub fn agree(&self, name: &str, format: &str, model: &[u8]) {
        if format == "qcow2" {
            self.qemu_img(&["check", "-q", "-f", format, name]);
        }
        self.raw("model", model);
        self.qemu_img(&["compare", "-q", "-f", format, "-F", "raw", name, "model"]);
    }

    /// Opens the image as the program does.
    pub fn open(&self, name: &str, format: ImageFormat, read_only: bool) -> io::Result<TestDisk> {
        open_at(
            &self.path(name),
            Some(format),
            read_only,
            BackingPolicy::Allow,
            true,
        )
    }

    /// Opens the image once more, as a process that waits to take over.
    pub fn open_again(&self, name: &str, format: ImageFormat) -> io::Result<TestDisk> {
        open_at(
            &self.path(name),
            Some(format),
            false,
            BackingPolicy::Allow,
            false,
        )
    }

    /// qemu-img finds no error except leaked clusters.
    pub fn is_sound(&self, name: &str, format: ImageFormat) {
        if format != ImageFormat::Qcow2 {
            return; // it has no check of others
        }
        let output = Command::new("qemu-img")
            .args(["check", "-f", "qcow2"])
            .arg(self.path(name))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        // 3: leaked clusters.
        assert!(matches!(output.status.code(), Some(0 | 3)), "{said}");
    }
}

pub fn open_at(
    path: &Path,
    format: Option<ImageFormat>,
    read_only: bool,
    backing: BackingPolicy,
    lock: bool,
) -> io::Result<TestDisk> {
    let name = path.display().to_string();
    let origin = ImageOrigin {
        name: &name,
        directory: path.parent(),
        backing,
        lock,
        depth: 0,
    };
    let file = open_file(path, read_only)?;
    if lock {
        let to = if read_only {
            ImageAccess::Read
        } else {
            ImageAccess::Grow
        };
        lock::take(&file, to)?;
    }
    open(file, format, read_only, &origin).map(|image| TestDisk::new(image.into()))
}

/// Retries an open that may find a closed image locked: a child process that the thread of
/// another test is starting has it open, and so locked, until it calls execve(2).
pub fn retry_locked<T, E: std::fmt::Debug>(mut what: impl FnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match what() {
            Ok(done) => return done,
            Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes in which every sector differs.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 512 * 7 + at % 251) as u8).collect()
}

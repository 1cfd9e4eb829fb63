//! fsx-style verification of block devices: random reads, writes, zeroings, discards and
//! flushes, past the guest's page cache and through it, against a copy in memory. Any
//! byte that differs ends it.
//!
//! `fsx OPS SEED DEVICE...`: so many operations on each, in turns.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::exit;

const SECTOR: usize = 512;
/// Bytes at the start of each device that are worked on.
const WINDOW: usize = 1 << 20;
/// Longest operation in sectors.
const LONGEST: u64 = 64;
/// What buffers are aligned to.
const PAGE: usize = 4096;

// Requests of linux/fs.h, and a flag of asm-generic/fcntl.h.
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;
const BLKFLSBUF: u64 = 0x1261;
const O_DIRECT: i32 = 0x4000;

// SAFETY: ioctl(2), as it is called here.
unsafe extern "C" {
    fn ioctl(fd: i32, request: u64, argument: *const [u64; 2]) -> i32;
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}

struct Device {
    name: String,
    direct: File,
    cached: File,
    model: Vec<u8>,
    /// Sectors that were discarded: they may read as anything.
    unknown: Vec<bool>,
}

fn fail(device: &str, what: &str, why: impl std::fmt::Display) -> ! {
    println!("fsx: {device}: {what}: {why}");
    exit(1);
}

impl Device {
    fn open(name: &str) -> Self {
        let open = |flags| {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).custom_flags(flags).open(name);
            file.unwrap_or_else(|error| fail(name, "open", error))
        };
        let mut device = Device {
            name: name.to_owned(),
            direct: open(O_DIRECT),
            cached: open(0),
            model: vec![0; WINDOW],
            unknown: vec![true; WINDOW / SECTOR],
        };
        // What is there is taken for granted, once.
        let mut model = std::mem::take(&mut device.model);
        if let Err(error) = device.cached.read_exact_at(&mut model, 0) {
            fail(name, "first read", error);
        }
        device.model = model;
        device.unknown.fill(false);
        device
    }

    fn call(&self, what: &str, request: u64, argument: [u64; 2]) {
        // Both descriptors see the same: what is cached is written and forgotten first.
        // SAFETY: these requests take two numbers, or nothing.
        let result = unsafe {
            ioctl(self.cached.as_raw_fd(), BLKFLSBUF, &[0; 2]);
            ioctl(self.direct.as_raw_fd(), request, &argument)
        };
        if result != 0 {
            fail(&self.name, what, std::io::Error::last_os_error());
        }
    }

    fn step(&mut self, random: &mut Random, page: &mut [u8]) {
        let sectors = 1 + random.below(LONGEST) as usize;
        let first = random.below((WINDOW / SECTOR - sectors) as u64) as usize;
        let (at, len) = (first * SECTOR, sectors * SECTOR);
        let range = [at as u64, len as u64];
        let direct = random.below(4) != 0;
        let file = if direct { &self.direct } else { &self.cached };
        let buffer = &mut page[..len];
        match random.below(16) {
            0 => {
                self.call("discard", BLKDISCARD, range);
                self.unknown[first..first + sectors].fill(true);
            }
            1 => {
                self.call("zeroing", BLKZEROOUT, range);
                self.model[at..at + len].fill(0);
                self.unknown[first..first + sectors].fill(false);
            }
            2 => {
                if let Err(error) = self.direct.sync_all() {
                    fail(&self.name, "flush", error);
                }
            }
            3..=8 => {
                let start = random.below(256) as usize;
                let bytes = buffer.iter_mut().enumerate();
                bytes.for_each(|(i, byte)| *byte = (start + i * 7 + i / 251) as u8);
                if let Err(error) = file.write_all_at(buffer, at as u64) {
                    fail(&self.name, "write", error);
                }
                self.model[at..at + len].copy_from_slice(buffer);
                self.unknown[first..first + sectors].fill(false);
            }
            _ => {
                buffer.fill(0xee);
                if let Err(error) = file.read_exact_at(buffer, at as u64) {
                    fail(&self.name, "read", error);
                }
                self.compare(first, buffer);
            }
        }
    }

    fn compare(&self, first: usize, got: &[u8]) {
        for (index, sector) in got.chunks(SECTOR).enumerate() {
            let at = (first + index) * SECTOR;
            if !self.unknown[first + index] && sector != &self.model[at..at + SECTOR] {
                fail(&self.name, "verify", format!("sector {} differs", first + index));
            }
        }
    }

    fn finish(&mut self) {
        self.call("forgetting", BLKFLSBUF, [0; 2]);
        let mut all = vec![0; WINDOW];
        if let Err(error) = self.cached.read_exact_at(&mut all, 0) {
            fail(&self.name, "last read", error);
        }
        self.compare(0, &all);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [ops, seed, names @ ..] = &arguments[..] else {
        fail("", "usage", "fsx OPS SEED DEVICE...")
    };
    let (Ok(ops), Ok(seed)) = (ops.parse::<u64>(), seed.parse::<u64>()) else {
        fail("", "usage", "OPS and SEED are numbers")
    };
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut devices: Vec<Device> = names.iter().map(|name| Device::open(name)).collect();
    let mut room = vec![0; LONGEST as usize * SECTOR + PAGE];
    let skip = room.as_ptr().align_offset(PAGE);
    for _ in 0..ops {
        for device in &mut devices {
            device.step(&mut random, &mut room[skip..]);
        }
    }
    devices.iter_mut().for_each(Device::finish);
    println!("fsx: {ops} operations on each of {} devices", devices.len());
}

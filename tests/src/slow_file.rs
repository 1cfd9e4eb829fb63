//! A file whose reads a test can delay: a FUSE file system that consists of this one file
//! (linux/fuse.h), served by a thread of the test.

use std::fs::File;
use std::io::{Read as _, Write};
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::DEADLINE;

/// Length of the file in bytes.
pub const LEN: u64 = 4 << 20;
/// Reads from this offset on are delayed.
pub const SLOW: u64 = LEN / 2;
/// Every byte of the file.
pub const CONTENT: u8 = 0x5a;

// Requests (enum fuse_opcode).
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
/// FUSE_ASYNC_DIO: O_DIRECT reads are asynchronous.
const ASYNC_DIO: u32 = 1 << 15;
/// Length of a request's header in bytes.
const HEADER: usize = 40;

/// The file.
pub struct SlowFile {
    /// Open for reading. It is unmounted already, so nothing is left behind.
    pub file: File,
    held: Receiver<Read>,
}

/// A delayed read.
#[must_use]
pub struct Read {
    device: File,
    unique: u64,
    size: usize,
}

impl Read {
    /// Answers it.
    pub fn release(self) {
        reply(&self.device, self.unique, Ok(vec![CONTENT; self.size]));
    }
}

impl Drop for Read {
    /// Answers the read, so that no process waits for ever after a test fails. The kernel
    /// ignores a second answer.
    fn drop(&mut self) {
        reply(&self.device, self.unique, Err(libc::EIO));
    }
}

impl SlowFile {
    /// `None`, with a message, where this user may not mount.
    pub fn new() -> Option<Self> {
        let place = tempfile::NamedTempFile::new().unwrap();
        let mut options = File::options();
        let device = options.read(true).write(true).open("/dev/fuse");
        let device = device.inspect_err(|error| eprintln!("skipped: /dev/fuse: {error}"));
        let device = device.ok()?;
        let fd = device.as_raw_fd();
        let data = format!("fd={fd},rootmode=100644,user_id=0,group_id=0,allow_other");
        let data = std::ffi::CString::new(data).unwrap();
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        mount(c"test", place.path(), c"fuse", flags, &*data)
            .inspect_err(|error| eprintln!("skipped: mounting: {error}"))
            .ok()?;
        let (say, held) = channel();
        std::thread::spawn(move || serve(device, &say));
        let file = File::open(place.path());
        unmount(place.path(), UnmountFlags::DETACH).unwrap();
        let file = file.unwrap();
        // The kernel sends FLUSH at each close unless the server has refused it once. When a
        // test dies, the file is closed after the server's thread is gone.
        drop(file.try_clone().unwrap());
        Some(SlowFile { file, held })
    }

    /// Waits for a delayed read.
    ///
    /// # Panics
    /// There is none in time.
    pub fn wait(&self) -> Read {
        self.held.recv_timeout(DEADLINE).unwrap()
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Serves until no process has the file open.
fn serve(mut device: File, say: &Sender<Read>) {
    let mut request = vec![0; 1 << 17];
    while device.read(&mut request).is_ok() {
        let (opcode, unique) = (word(&request, 4), long(&request, 8));
        let body = &request[HEADER..];
        let answer: Result<Vec<u8>, i32> = match opcode {
            FORGET | BATCH_FORGET | INTERRUPT => continue,
            INIT => Ok(init()),
            GETATTR => Ok(attributes()),
            OPEN => Ok(vec![0; 16]),
            RELEASE => Ok(vec![]),
            // For example FLUSH, at each close.
            READ => {
                let (offset, size) = (long(body, 8), word(body, 16) as usize);
                if offset >= SLOW {
                    let device = device.try_clone().unwrap();
                    let read = Read {
                        device,
                        unique,
                        size,
                    };
                    // No test waits for it: dropping it answers it.
                    let _ = say.send(read);
                    continue;
                }
                Ok(vec![CONTENT; size])
            }
            _ => Err(libc::ENOSYS),
        };
        reply(&device, unique, answer);
    }
}

fn reply(mut device: &File, unique: u64, answer: Result<Vec<u8>, i32>) {
    let (error, body) = match answer {
        Ok(body) => (0, body),
        Err(errno) => (-errno, vec![]),
    };
    let mut bytes = (16 + body.len() as u32).to_ne_bytes().to_vec();
    bytes.extend(error.to_ne_bytes());
    bytes.extend(unique.to_ne_bytes());
    bytes.extend(body);
    // The process that reads may be gone.
    let _ = device.write(&bytes);
}

/// struct fuse_init_out.
fn init() -> Vec<u8> {
    let mut out = [0u8; 64];
    for (at, value) in [(0, 7u32), (4, 31), (12, ASYNC_DIO), (20, 1 << 16)] {
        out[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    out[16..18].copy_from_slice(&16u16.to_ne_bytes()); // max_background
    out[18..20].copy_from_slice(&12u16.to_ne_bytes()); // congestion_threshold
    out.to_vec()
}

/// struct fuse_attr_out, with an infinite timeout.
fn attributes() -> Vec<u8> {
    let mut out = [0u8; 104];
    for (at, value) in [(0, u64::MAX >> 1), (16, 1), (24, LEN), (32, LEN / 512)] {
        out[at..at + 8].copy_from_slice(&value.to_ne_bytes());
    }
    for (at, value) in [(76, libc::S_IFREG | 0o644), (80, 1), (96, 4096)] {
        out[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    out.to_vec()
}

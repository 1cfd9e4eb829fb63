//! A file whose reads somebody may hold up: a FUSE file system that is this one file
//! (linux/fuse.h), served by a thread of the test.

use std::fs::File;
use std::io::{Read as _, Write};
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::DEADLINE;

/// Length of the file in bytes.
pub const LEN: u64 = 4 << 20;
/// Reads from here on are held up.
pub const SLOW: u64 = LEN / 2;
/// What is in it everywhere.
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
/// FUSE_ASYNC_DIO: those who go past the page cache need not wait.
const ASYNC_DIO: u32 = 1 << 15;
/// Length of a request's header in bytes.
const HEADER: usize = 40;

/// The file.
pub struct SlowFile {
    /// Open to be read. It has no name any more, so nothing is left behind.
    pub file: File,
    held: Receiver<Read>,
}

/// A read that waits for its answer.
#[must_use]
pub struct Read {
    device: File,
    unique: u64,
    size: usize,
}

impl Read {
    /// Lets it go on.
    pub fn release(self) {
        reply(&self.device, self.unique, Ok(vec![CONTENT; self.size]));
    }
}

impl Drop for Read {
    /// A test that fails must not leave somebody who waits for ever. A second answer is
    /// none.
    fn drop(&mut self) {
        reply(&self.device, self.unique, Err(libc::EIO));
    }
}

impl SlowFile {
    /// `None` where this user may not mount, which is said.
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
        // A close is told to the server unless it has said once that it has no use for
        // that; a test that dies closes the file when its threads are gone.
        drop(file.try_clone().unwrap());
        Some(SlowFile { file, held })
    }

    /// Waits until a read is held up.
    ///
    /// # Panics
    /// When none is.
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

/// Until the last who has the file open is gone.
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
            // Among them FLUSH, at each close.
            READ => {
                let (offset, size) = (long(body, 8), word(body, 16) as usize);
                if offset >= SLOW {
                    let device = device.try_clone().unwrap();
                    let read = Read {
                        device,
                        unique,
                        size,
                    };
                    // Nobody waits for it: it is dropped, and thereby answered.
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
    // Whoever asked may be gone.
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

/// struct fuse_attr_out: it stays as it is.
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

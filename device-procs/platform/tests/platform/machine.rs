//! The runner's side of the trap channel, without a virtual machine.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use outrigger_protocol::channel;
use outrigger_protocol::trap::{
    Access, FromPlatform, MAGIC, REGION_SIZE, SLOTS_OFFSET, Space, ToPlatform, TrapHeader,
    TrapSlot, VERSION,
};
use outrigger_tests::DEADLINE;
use outrigger_tests::process::{Launch, Process};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::thread::futex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long a vCPU spins; the runner's own value.
const SPIN: Duration = Duration::from_micros(100);

/// The region with its descriptors.
pub struct Machine {
    pub region: OwnedFd,
    start: *mut u8,
    pub doorbell: EventFd,
    /// The serial port's interrupt line.
    pub line: EventFd,
    vcpus: u32,
}

// SAFETY: everything in the region is atomic, and it is unmapped only on drop.
unsafe impl Sync for Machine {}
// SAFETY: as above.
unsafe impl Send for Machine {}

/// A memfd of `size` bytes, sealed if `sealed` is set.
pub fn memfd(size: usize, seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("trap-test", flags).unwrap();
    rustix::fs::ftruncate(&fd, size as u64).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

impl Machine {
    pub fn new(vcpus: u32) -> Self {
        let region = memfd(REGION_SIZE, SealFlags::SHRINK | SealFlags::GROW);
        // SAFETY: the kernel chooses the address of the new mapping.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                REGION_SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &region,
                0,
            )
        }
        .unwrap();
        let machine = Machine {
            region,
            start: start.cast(),
            doorbell: EventFd::new(EFD_NONBLOCK).unwrap(),
            line: EventFd::new(EFD_NONBLOCK).unwrap(),
            vcpus,
        };
        let header = machine.header();
        header.version.store(VERSION, Ordering::Relaxed);
        header.vcpus.store(vcpus, Ordering::Relaxed);
        header.magic.store(MAGIC, Ordering::Release);
        machine
    }

    pub fn header(&self) -> &TrapHeader {
        // SAFETY: the region starts with the header.
        unsafe { &*self.start.cast() }
    }

    pub fn slot(&self, vcpu: usize) -> &TrapSlot {
        assert!(vcpu < self.vcpus as usize);
        // SAFETY: all slots lie in the region.
        unsafe { &*self.start.add(SLOTS_OFFSET).cast::<TrapSlot>().add(vcpu) }
    }

    pub fn hello(&self) -> ToPlatform {
        ToPlatform::Hello {
            version: VERSION,
            vcpus: self.vcpus,
        }
    }

    /// The whole handshake.
    pub fn greet(&self, stream: &UnixStream) {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let fds = [self.region.as_raw_fd(), self.doorbell.as_raw_fd()];
        channel::send(stream, &self.hello(), &fds).unwrap();
        assert_eq!(receive(stream), FromPlatform::Lines { gsis: vec![4] });
        channel::send(stream, &ToPlatform::Lines, &[self.line.as_raw_fd()]).unwrap();
    }

    pub fn publish(&self, vcpu: usize, access: &Access) {
        self.slot(vcpu).publish(self.header(), access);
        if self.header().asleep.load(Ordering::Relaxed) != 0 {
            self.doorbell.write(1).unwrap();
        }
    }

    /// Waits until the slot's request is done; panics after a lost wake-up.
    pub fn wait(&self, vcpu: usize) {
        let slot = self.slot(vcpu);
        let start = Instant::now();
        while start.elapsed() < SPIN {
            if slot.is_done() {
                return;
            }
            std::hint::spin_loop();
        }
        let end = start + DEADLINE;
        loop {
            let (word, seen) = slot.prepare_wait();
            if slot.is_done() {
                slot.finish_wait();
                return;
            }
            let left = end.saturating_duration_since(Instant::now());
            let timeout = futex::Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            };
            let woken = futex::wait(word, futex::Flags::empty(), seen, Some(&timeout));
            assert_ne!(woken, Err(Errno::TIMEDOUT), "vCPU {vcpu} was not woken");
            slot.finish_wait();
        }
    }

    pub fn access(&self, vcpu: usize, access: &Access) -> u64 {
        self.wait(vcpu);
        self.publish(vcpu, access);
        self.wait(vcpu);
        self.slot(vcpu).answer()
    }

    /// `in`.
    pub fn read(&self, vcpu: usize, port: u64, size: u8) -> u64 {
        self.access(vcpu, &port_access(port, size, None))
    }

    /// `out`: posted.
    pub fn write(&self, vcpu: usize, port: u64, size: u8, value: u64) {
        self.wait(vcpu);
        self.publish(vcpu, &port_access(port, size, Some(value)));
    }

    /// Bytes for the serial line.
    pub fn print(&self, vcpu: usize, text: &[u8]) {
        for &byte in text {
            self.write(vcpu, 0x3f8, 1, byte.into());
        }
    }

    /// One of the 32-bit words that begin the slot of `vcpu`: `seq`, `done`, `wake`,
    /// `waiting`.
    fn word(&self, vcpu: usize, at: usize) -> &AtomicU32 {
        let slot: *const TrapSlot = self.slot(vcpu);
        // SAFETY: they are atomics, and belong to the slot.
        unsafe { &*slot.cast::<AtomicU32>().add(at) }
    }

    /// Makes an answered request look unanswered.
    pub fn reopen(&self, vcpu: usize) {
        let done = self.word(vcpu, 1);
        assert_eq!(
            done.fetch_sub(1, Ordering::SeqCst),
            self.word(vcpu, 0).load(Ordering::SeqCst)
        );
    }

    /// Whether the vCPU sleeps or is about to sleep.
    pub fn is_waiting(&self, vcpu: usize) -> bool {
        self.word(vcpu, 3).load(Ordering::SeqCst) != 0
    }

    /// Whether the line was raised since the last call.
    pub fn raised(&self) -> bool {
        self.line.read().is_ok()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: nothing borrowed from it is left.
        unsafe { rustix::mm::munmap(self.start.cast(), REGION_SIZE) }.unwrap();
    }
}

pub fn port_access(port: u64, size: u8, write: Option<u64>) -> Access {
    Access {
        space: Space::Port,
        address: port,
        size,
        write,
    }
}

pub fn receive(stream: &UnixStream) -> FromPlatform {
    channel::receive(stream).unwrap().0
}

/// A machine with its platform process, whose serial line goes to a file.
pub struct Connected {
    pub machine: Machine,
    pub stream: UnixStream,
    pub process: Process,
    pub serial: PathBuf,
}

/// Starts the program with `options` besides `--serial file=...`.
pub fn connected(vcpus: u32, options: &[&str]) -> Connected {
    let launch = Launch::new("device-platform");
    let serial = launch.directory().join("serial");
    let machine = Machine::new(vcpus);
    let (process, stream) = launch
        .args([option("--serial=file=", &serial)])
        .args(options)
        .connected();
    machine.greet(&stream);
    Connected {
        machine,
        stream,
        process,
        serial,
    }
}

/// `--option=PATH`.
pub fn option(name: &str, path: &Path) -> String {
    format!("{name}{}", path.display())
}

//! A disk without a virtual machine: the vhost-user front end and virtio-blk driver of crate
//! virtio-driver, in this process. Its guest memory is this process's memory, and
//! guest-physical addresses are virtual addresses.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};
use vm_memory::{FileOffset, MmapRegion};

use crate::DEADLINE;
use crate::process::readable_within;

/// Entries that a request takes: header, data and status.
const ENTRIES: usize = 3;
/// The fewest entries of a queue.
const SMALLEST: usize = 128;

/// A front end and its buffers.
pub struct Driver {
    /// The device's queues.
    pub queues: Vec<Queue>,
    transport: Box<VirtioBlkTransport>,
}

/// One queue with buffers of its own.
pub struct Queue {
    // Fields are dropped in this order, the memory last.
    queue: VirtioBlkQueue<'static, usize>,
    doorbell: Box<dyn QueueNotifier>,
    interrupt: Arc<EventFd>,
    buffer_size: usize,
    memory: MmapRegion<()>,
}

impl Driver {
    /// Connects to `socket` and starts `queues` queues, each with `buffers` buffers
    /// of `size` bytes, and room for as many requests at a time.
    pub fn connect(socket: &Path, queues: usize, buffers: usize, size: usize) -> Self {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits()
            | VirtioBlkFeatureFlags::DISCARD.bits()
            | VirtioBlkFeatureFlags::WRITE_ZEROES.bits()
            | VirtioBlkFeatureFlags::MQ.bits();
        let path = socket.to_str().unwrap();
        let mut transport: Box<VirtioBlkTransport> =
            Box::new(VhostUser::new(path, features).unwrap());
        let entries = (buffers * ENTRIES).next_power_of_two().max(SMALLEST);
        let entries = u16::try_from(entries).unwrap();
        let rings = VirtioBlkQueue::setup_queues(&mut *transport, queues, entries).unwrap();
        let queues = rings.into_iter().enumerate().map(|(index, queue)| {
            let file: File = memfd_create("buffers", MemfdFlags::CLOEXEC).unwrap().into();
            let len = buffers * size;
            file.set_len(len as u64).unwrap();
            let fd = file.as_raw_fd();
            let memory = MmapRegion::from_file(FileOffset::new(file, 0), len).unwrap();
            let address = memory.as_ptr() as usize;
            transport.map_mem_region(address, len, fd, 0).unwrap();
            Queue {
                queue,
                doorbell: transport.get_submission_notifier(index),
                interrupt: transport.get_completion_fd(index),
                buffer_size: size,
                memory,
            }
        });
        let queues = queues.collect();
        Driver { queues, transport }
    }

    /// Whether the device takes discards.
    pub fn discards(&self) -> bool {
        self.transport.get_features() & VirtioBlkFeatureFlags::DISCARD.bits() != 0
    }

    /// Size of the disk in bytes.
    pub fn capacity(&self) -> u64 {
        u64::from(self.transport.get_config().unwrap().capacity) * 512
    }
}

impl Queue {
    fn address(&self, buffer: usize) -> *mut u8 {
        let at = buffer * self.buffer_size;
        assert!(at + self.buffer_size <= self.memory.size());
        // SAFETY: within the mapping.
        unsafe { self.memory.as_ptr().add(at) }
    }

    /// Fills buffer `buffer`; no request in flight may use it.
    pub fn fill(&mut self, buffer: usize, bytes: &[u8]) {
        assert!(bytes.len() <= self.buffer_size);
        // SAFETY: the buffer has that length, and no request in flight uses it.
        unsafe { self.address(buffer).copy_from(bytes.as_ptr(), bytes.len()) };
    }

    /// Content of buffer `buffer`; no request in flight may use it.
    pub fn content(&self, buffer: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.buffer_size];
        let len = bytes.len();
        // SAFETY: as in `fill`.
        unsafe { bytes.as_mut_ptr().copy_from(self.address(buffer), len) };
        bytes
    }

    /// Offers a read of the whole of buffer `buffer` from `offset` (in bytes).
    pub fn read(&mut self, buffer: usize, offset: u64) {
        self.read_part(buffer, offset, self.buffer_size);
    }

    /// Offers a read of `len` bytes into buffer `buffer`.
    pub fn read_part(&mut self, buffer: usize, offset: u64, len: usize) {
        assert!(len <= self.buffer_size);
        let at = self.address(buffer);
        // SAFETY: `at` is shared memory of that length, which lives as long as the queue.
        unsafe { self.queue.read_raw(offset, at, len, buffer).unwrap() };
    }

    /// Offers a write of the whole of buffer `buffer` to `offset`.
    pub fn write(&mut self, buffer: usize, offset: u64) {
        self.write_part(buffer, offset, self.buffer_size);
    }

    /// Offers a write of `len` bytes of buffer `buffer`.
    pub fn write_part(&mut self, buffer: usize, offset: u64, len: usize) {
        assert!(len <= self.buffer_size);
        let at = self.address(buffer);
        // SAFETY: as in `read_part`.
        unsafe { self.queue.write_raw(offset, at, len, buffer).unwrap() };
    }

    /// Offers a discard, which is reported as `number`.
    pub fn discard(&mut self, number: usize, offset: u64, len: u64) {
        self.queue.discard(offset, len, number).unwrap();
    }

    /// Offers a write of zeros, which is reported as `number`.
    pub fn write_zeroes(&mut self, number: usize, offset: u64, len: u64, unmap: bool) {
        self.queue.write_zeroes(offset, len, unmap, number).unwrap();
    }

    /// Offers a flush, which is reported as `number`.
    pub fn flush(&mut self, number: usize) {
        self.queue.flush(number).unwrap();
    }

    /// Rings the doorbell unless the device has disabled it.
    pub fn kick(&mut self) {
        // The available index must be visible before the device's notification flag is read;
        // the crate has no barrier there (virtio 1.2 section 2.7.13.4.1).
        fence(Ordering::SeqCst);
        if self.queue.avail_notif_needed() {
            self.doorbell.notify().unwrap();
        }
    }

    /// Waits for completed requests, sleeping until an interrupt if there are none; returns
    /// the buffers' numbers and 0 or a negative errno.
    pub fn wait(&mut self) -> Vec<(usize, i32)> {
        loop {
            let done: Vec<_> = self
                .queue
                .completions()
                .map(|c| (c.context, c.ret))
                .collect();
            if !done.is_empty() {
                return done;
            }
            // used_event must be visible before the used index is read again; the crate has
            // no barrier there either.
            self.queue.set_used_notif_enabled(true);
            fence(Ordering::SeqCst);
            if self.queue.completions().has_next() {
                continue;
            }
            // A read would block for ever if the device does not answer.
            assert!(readable_within(&*self.interrupt, DEADLINE), "no interrupt");
            self.interrupt.read().unwrap();
        }
    }

    /// Rings the doorbell and takes one completion, which must be the only one.
    pub fn run(&mut self) -> i32 {
        self.kick();
        let done = self.wait();
        assert_eq!(done.len(), 1);
        done[0].1
    }
}

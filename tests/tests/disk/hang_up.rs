//! When the connection is closed, a front end assumes that guest memory is not accessed any
//! more.

use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use outrigger_tests::DEADLINE;
use outrigger_tests::disk::{Request, SECTOR};
use outrigger_tests::guest::{EVENT_IDX, Guest};
use outrigger_tests::process::{Launch, readable_within};
use outrigger_tests::queue::Buffer;
use outrigger_tests::ram::Ram;
use outrigger_tests::slow_file::{CONTENT, SLOW, SlowFile};
use rustix::process::Signal;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

const BYTES: usize = 4096;

fn read(guest: &mut Guest, queue: usize, at: u64, sector: u64) {
    guest.ram.set(at, &[0xcc; BYTES]);
    let data = [Buffer::writable(at, BYTES as u32)];
    let request = Request::new(&guest.ram, VIRTIO_BLK_T_IN, sector, &data);
    guest.queues[queue].add(&request.buffers);
    guest.queues[queue].kick();
}

/// SIGTERM leaves no request in flight: a front end without an in-flight table would not know
/// of it.
#[test]
fn socket_closes_after_requests_in_flight_when_the_process_is_terminated() {
    let Some(slow) = SlowFile::new() else { return };
    let process = Launch::new("device-disk")
        .pass("--blk-fd", slow.file.try_clone().unwrap().into())
        .args(["--format", "raw", "--read-only", "--cache", "none"])
        .listening();
    let mut guest = Guest::boot(process.connect(), EVENT_IDX, 1);
    let at = guest.ram.alloc(2 * BYTES as u64).next_multiple_of(4096);
    read(&mut guest, 0, at, SLOW / SECTOR as u64);
    let held = slow.wait();
    process.signal(Signal::TERM);
    assert!(!readable_within(&guest.stream, Duration::from_millis(300)));
    held.release();
    assert!(process.wait().success());
    assert!(guest.queues[0].take().is_some());
    assert!(guest.ram.get(at, BYTES) == [CONTENT; BYTES]);
}

/// An inherited file that has O_DIRECT loses the flag, for in this mode no io_uring keeps the
/// connection open.
#[test]
fn socket_closes_after_the_last_direct_transfer() {
    let Some(slow) = SlowFile::new() else { return };
    let mut options = std::fs::File::options();
    options.read(true).custom_flags(libc::O_DIRECT);
    let direct = options.open(format!("/proc/self/fd/{}", slow.file.as_raw_fd()));
    let process = Launch::new("device-disk")
        .pass("--blk-fd", direct.unwrap().into())
        .args(["--format", "raw", "--read-only"])
        .listening();
    let mut guest = Guest::boot(process.connect(), EVENT_IDX, 1);
    let at = guest.ram.alloc(2 * BYTES as u64).next_multiple_of(4096);
    read(&mut guest, 0, at, SLOW / SECTOR as u64);
    let held = slow.wait();
    process.signal(Signal::KILL);
    assert!(!readable_within(&guest.stream, Duration::from_millis(300)));
    held.release();
    assert!(readable_within(&guest.stream, DEADLINE));
}

/// After the death of the process, the block device still writes to guest memory.
#[test]
fn socket_closes_after_the_last_transfer_when_the_process_is_killed() {
    for queues in [1, 2] {
        let Some(slow) = SlowFile::new() else { return };
        let count = queues.to_string();
        let process = Launch::new("device-disk")
            .pass("--blk-fd", slow.file.try_clone().unwrap().into())
            .args(["--format", "raw", "--read-only", "--cache", "none"])
            .args(["--queues", &count])
            .listening();
        let mut guest = Guest::new(process.connect(), Ram::small());
        guest.negotiate(EVENT_IDX);
        guest.share_memory();
        for _ in 0..queues {
            guest.add_queue(64);
        }
        // A transfer is in flight.
        let at = guest.ram.alloc(2 * BYTES as u64).next_multiple_of(4096);
        let last = queues - 1;
        read(&mut guest, last, at, 0);
        guest.queues[last].wait();
        assert!(guest.ram.get(at, BYTES) == [CONTENT; BYTES]);

        read(&mut guest, last, at, SLOW / SECTOR as u64);
        let held = slow.wait();
        process.signal(Signal::KILL);
        process.wait();
        let hung_up = |time| readable_within(&guest.stream, time);
        assert!(!hung_up(Duration::from_millis(500)), "{queues} queues");
        assert!(guest.ram.get(at, BYTES) == [0xcc; BYTES]);
        held.release();
        assert!(hung_up(DEADLINE), "{queues} queues");
        assert!(guest.ram.get(at, BYTES) == [CONTENT; BYTES]);
    }
}

//! Hostile guests and front ends: the process refuses what they do, continues, and serves the
//! next front end.

use std::os::fd::{AsFd, BorrowedFd};
use std::thread::sleep;
use std::time::Duration;

use outrigger_tests::guest::{EVENT_IDX, Guest, INDIRECT_DESC};
use outrigger_tests::queue::{Buffer, DriverQueue, INDIRECT, NEXT, WRITE};
use outrigger_tests::ram::Ram;
use outrigger_tests::{raw, wait_until};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::subject::{Device, Subject};

/// A user address and a guest-physical address that are not mapped.
const NOWHERE: u64 = 1 << 50;

pub fn queue_that_does_not_exist<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(0);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let addresses = guest.addresses(0);
    for index in [S::QUEUES, S::QUEUES + 1, 200, 255] {
        let front = &mut guest.frontend;
        front.set_vring_num(index, 64).unwrap_err();
        front.set_vring_base(index, 0).unwrap_err();
        front.set_vring_addr(index, &addresses).unwrap_err();
        front.set_vring_call(index, &event).unwrap_err();
        front.set_vring_err(index, &event).unwrap_err();
        front.set_vring_kick(index, &event).unwrap_err();
        front.set_vring_enable(index, true).unwrap_err();
    }
    device.round_trip(&mut guest);
    // The reply to this message cannot report an error.
    guest.frontend.get_vring_base(200).unwrap_err();
    device.must_serve();
}

pub fn invalid_ring_size<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(0);
    for size in [0, 3, 100, 1 << 15, u16::MAX] {
        guest.frontend.set_vring_num(0, size).unwrap_err();
    }
    device.round_trip(&mut guest);
    drop(guest);
    for size in [1 << 16, 1 << 31, u32::MAX] {
        let guest = device.boot(0);
        let body = [0u32, size].map(u32::to_le_bytes).concat();
        let request = FrontendReq::SET_VRING_NUM as u32;
        raw::send(&guest.stream, request, raw::VERSION, 8, &body, &[]).unwrap();
        assert!(raw::hangs_up(&guest.stream), "{size}");
    }
    device.must_serve();
}

pub fn second_queue_without_multi_queue<S: Subject>() {
    let mut device = Device::<S>::listening();
    // Without REPLY_ACK, so the process can only end the connection.
    for index in [S::QUEUES as u32, 1 << 31, u32::MAX] {
        let guest = device.boot(0);
        let body = [index, 1].map(u32::to_le_bytes).concat();
        let request = FrontendReq::SET_VRING_ENABLE as u32;
        raw::send(&guest.stream, request, raw::VERSION, 8, &body, &[]).unwrap();
        assert!(raw::hangs_up(&guest.stream), "{index}");
    }
    device.must_serve();
}

pub fn rings_outside_memory<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    let index = S::REQUESTS;
    let good = guest.addresses(index);
    let end = guest.ram.user((1 << 32) + (4 << 20));
    for bad in [
        0,
        good.desc_table_addr - guest.ram.user(0),
        NOWHERE,
        end,
        end - 16,
        !0 << 4,
    ] {
        for ring in 0..3 {
            let mut addresses = good;
            match ring {
                0 => addresses.desc_table_addr = bad,
                1 => addresses.avail_ring_addr = bad,
                _ => addresses.used_ring_addr = bad,
            }
            guest.stop(index);
            let queue = &guest.queues[index];
            let _ = guest.frontend.set_vring_addr(index, &addresses);
            let start = guest.frontend.set_vring_kick(index, &queue.kick);
            assert!(start.is_err(), "ring {ring} at {bad:#x}");
            // With the same doorbell, which must have left the poller.
            guest.frontend.set_vring_addr(index, &good).unwrap();
            guest.frontend.set_vring_kick(index, &queue.kick).unwrap();
            guest.frontend.set_vring_call(index, &queue.call).unwrap();
        }
    }
    device.round_trip(&mut guest);
}

type Build = fn(&DriverQueue, &Ram);

/// Chains that begin at descriptor 0.
const CHAINS: &[(&str, Build)] = &[
    ("its own successor", |q, ram| {
        direct(q, ram, &[(0, NEXT, 0)])
    }),
    ("a loop", |q, ram| {
        direct(q, ram, &[(0, NEXT, 1), (0, NEXT, 2), (0, NEXT, 0)])
    }),
    ("a loop of writable ones", |q, ram| {
        direct(q, ram, &[(WRITE, NEXT, 1), (WRITE, NEXT, 0)])
    }),
    ("a successor out of range", |q, ram| {
        direct(q, ram, &[(0, NEXT, q.size)])
    }),
    ("a successor far out of range", |q, ram| {
        direct(q, ram, &[(0, NEXT, u16::MAX)])
    }),
    ("readable after writable", |q, ram| {
        direct(q, ram, &[(WRITE, NEXT, 1), (0, 0, 0)])
    }),
    ("all flags", |q, ram| {
        direct(q, ram, &[(WRITE, u16::MAX, 1), (WRITE, u16::MAX, 0)])
    }),
    ("lengths of zero", |q, _| {
        q.descriptor(q.descriptors, 0, Buffer::readable(NOWHERE, 0), NEXT, 1);
        q.descriptor(q.descriptors, 1, Buffer::writable(0, 0), 0, 0);
    }),
    ("an indirect table in an indirect table", |q, ram| {
        let inner = table(q, ram, &[(0, 0, 0)]);
        let outer = ram.alloc(16);
        q.descriptor(outer, 0, Buffer::readable(inner, 16), INDIRECT, 0);
        indirect(q, outer, 16);
    }),
    ("an indirect table that names itself", |q, ram| {
        let outer = ram.alloc(16);
        q.descriptor(outer, 0, Buffer::readable(outer, 16), INDIRECT, 0);
        indirect(q, outer, 16);
    }),
    ("a loop in an indirect table", |q, ram| {
        indirect(q, table(q, ram, &[(0, NEXT, 1), (0, NEXT, 0)]), 32);
    }),
    ("a successor outside its indirect table", |q, ram| {
        indirect(q, table(q, ram, &[(0, NEXT, 2), (0, 0, 0)]), 32);
    }),
    ("an indirect table of no length", |q, ram| {
        indirect(q, table(q, ram, &[(0, 0, 0)]), 0);
    }),
    ("an indirect table of half a descriptor", |q, ram| {
        indirect(q, table(q, ram, &[(0, NEXT, 1), (0, 0, 0)]), 24);
    }),
    ("an indirect table without end", |q, ram| {
        let long: Vec<_> = (1..=5000).map(|next| (0, NEXT, next)).collect();
        indirect(q, table(q, ram, &long), 16 * 5000);
    }),
    ("an indirect table that claims all memory", |q, ram| {
        indirect(q, table(q, ram, &[(0, 0, 0)]), u32::MAX - 15);
    }),
    ("an indirect table nowhere", |q, _| indirect(q, NOWHERE, 16)),
    ("an indirect table behind the end", |q, _| {
        indirect(q, u64::MAX - 7, 16)
    }),
    ("an indirect table that is not aligned", |q, ram| {
        let at = ram.alloc(64) + 3;
        q.descriptor(at, 0, Buffer::readable(ram.alloc(1), 1), 0, 0);
        indirect(q, at, 16);
    }),
    ("an indirect table and a successor", |q, ram| {
        let at = table(q, ram, &[(0, 0, 0)]);
        q.descriptor(
            q.descriptors,
            0,
            Buffer::readable(at, 16),
            INDIRECT | NEXT,
            1,
        );
        q.descriptor(q.descriptors, 1, Buffer::readable(ram.alloc(1), 1), 0, 0);
    }),
];

/// Descriptors of one byte each: direction, flags, next.
fn direct(queue: &DriverQueue, ram: &Ram, chain: &[(u16, u16, u16)]) {
    write_table(queue, ram, queue.descriptors, chain);
}

fn table(queue: &DriverQueue, ram: &Ram, chain: &[(u16, u16, u16)]) -> u64 {
    let at = ram.alloc(16 * chain.len() as u64);
    write_table(queue, ram, at, chain);
    at
}

fn write_table(queue: &DriverQueue, ram: &Ram, at: u64, chain: &[(u16, u16, u16)]) {
    let byte = Buffer::readable(ram.alloc(1), 1);
    for (index, &(direction, flags, next)) in (0..).zip(chain) {
        queue.descriptor(at, index, byte, direction | flags, next);
    }
}

fn indirect(queue: &DriverQueue, table: u64, len: u32) {
    queue.descriptor(
        queue.descriptors,
        0,
        Buffer::readable(table, len),
        INDIRECT,
        0,
    );
}

pub fn malformed_chain<S: Subject>() {
    let mut device = Device::<S>::listening();
    for (what, build) in CHAINS {
        let mut guest = device.boot(EVENT_IDX | INDIRECT_DESC);
        build(&guest.queues[S::REQUESTS], &guest.ram);
        let queue = &mut guest.queues[S::REQUESTS];
        queue.offer(0);
        queue.kick();
        // It is returned, so that the ring does not fill up.
        assert_eq!(queue.wait().head, 0, "{what}");
        assert!(device.process.is_running(), "{what}");
        device.round_trip(&mut guest);
    }
    device.must_serve();
}

pub fn does_not_fill_the_log<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    let queue = &mut guest.queues[S::REQUESTS];
    for _ in 0..1000 {
        queue.run(&[Buffer::readable(NOWHERE, 1)]);
    }
    let lines = device.process.log().lines().count();
    assert!(lines < 50, "{lines} lines");
    device.round_trip(&mut guest);
}

pub fn buffer_outside_memory<S: Subject>() {
    let mut device = Device::<S>::listening();
    let hole = 1 << 20; // ends the first region
    let end = (1 << 32) + (4 << 20);
    for (address, len) in [
        (NOWHERE, 1),
        (hole, 4096),
        (hole - 1, 2),
        (end - 1, 2),
        (end - 4096, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX - 100, 4096),
        (0, u32::MAX),
    ] {
        let mut guest = device.boot(EVENT_IDX);
        let request = S::request(&guest.ram);
        let readable = Buffer::readable(address, len);
        let writable = Buffer::writable(address, len);
        let queue = &mut guest.queues[S::REQUESTS];
        queue.run(&[readable]);
        queue.run(&[&[readable], &request[..]].concat());
        queue.run(&[writable]);
        queue.run(&[&request[..], &[writable]].concat());
        device.round_trip(&mut guest);
    }
}

/// After `break_it` the queue is broken, which the err eventfd reports. It works again after
/// a stop and a start.
fn breaks_the_queue<S: Subject>(break_it: fn(&mut DriverQueue)) {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    let index = S::REQUESTS;
    let err = EventFd::new(EFD_NONBLOCK).unwrap();
    guest.frontend.set_vring_err(index, &err).unwrap();
    let queue = &mut guest.queues[index];
    break_it(queue);
    queue.kick();
    wait_until("the queue is broken", || err.read().is_ok());
    // A broken ring is not processed.
    let before = queue.device_used_index();
    queue.kick();
    assert!(guest.frontend.get_features().is_ok());
    guest.stop(index);
    assert_eq!(guest.queues[index].device_used_index(), before);
    guest.queues[index].clear();
    guest.start(index, 0);
    device.round_trip(&mut guest);
    drop(guest);
    device.must_serve();
}

pub fn available_index_that_jumps<S: Subject>() {
    breaks_the_queue::<S>(|queue| {
        queue.set_avail_index(queue.avail_index.wrapping_add(queue.size + 1));
    });
}

pub fn head_out_of_range<S: Subject>() {
    breaks_the_queue::<S>(|queue| queue.offer(queue.size));
    breaks_the_queue::<S>(|queue| queue.offer(u16::MAX));
}

/// Request, flags, announced size, body, descriptors.
type Message<'a> = (u32, u32, u32, Vec<u8>, Vec<BorrowedFd<'a>>);

pub fn malformed_message<S: Subject>() {
    let mut device = Device::<S>::listening();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    // SAFETY: `event` stays open until the end of the test.
    let event = unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&event)) };
    let file = tempfile::tempfile().unwrap();
    let regions = |count: u32| [&[count, 0].map(u32::to_le_bytes).concat()[..], &[0; 32]].concat();
    use FrontendReq as Req;
    let (mem, kick, call) = (Req::SET_MEM_TABLE, Req::SET_VRING_KICK, Req::SET_VRING_CALL);
    let messages: Vec<Message<'_>> = vec![
        (0, 1, 0, vec![], vec![]),
        (200, 1, 8, vec![0; 8], vec![]),
        (u32::MAX, 1, 0, vec![], vec![]),
        (Req::GET_FEATURES as u32, 0, 0, vec![], vec![]), // version 0
        (Req::GET_FEATURES as u32, 5, 0, vec![], vec![]), // a reply
        (Req::GET_FEATURES as u32, u32::MAX, 0, vec![], vec![]),
        (Req::GET_FEATURES as u32, 1, 8, vec![0; 8], vec![]),
        (Req::GET_FEATURES as u32, 1, 0, vec![], vec![event]),
        (Req::SET_FEATURES as u32, 1, u32::MAX, vec![0; 64], vec![]),
        (Req::SET_FEATURES as u32, 1, 0, vec![], vec![]),
        (Req::SET_VRING_NUM as u32, 1, 4, vec![0; 4], vec![]),
        (mem as u32, 1, 40, regions(0), vec![]),
        (mem as u32, 1, 40, regions(1), vec![]),
        (mem as u32, 1, 40, regions(9), vec![event]),
        (mem as u32, 1, 40, regions(u32::MAX), vec![event]),
        (mem as u32, 1, 40, regions(1), vec![event; 20]),
        (mem as u32, 1, 40, regions(1), vec![event; 60]),
        (mem as u32, 1, 4, vec![0; 4], vec![]),
        (Req::ADD_MEM_REG as u32, 1, 40, vec![0; 40], vec![]),
        (Req::ADD_MEM_REG as u32, 1, 40, vec![0; 40], vec![event]),
        (Req::REM_MEM_REG as u32, 1, 40, vec![0xff; 40], vec![event]),
        (kick as u32, 1, 8, vec![0; 8], vec![]),
        (kick as u32, 1, 8, vec![0; 8], vec![event; 2]),
        (kick as u32, 1, 8, vec![0; 8], vec![file.as_fd()]), // cannot be polled
        (kick as u32, 1, 8, 0x100u64.to_le_bytes().into(), vec![]), // polling
        (call as u32, 1, 4, vec![0; 4], vec![event]),
        (Req::SET_VRING_ENABLE as u32, 1, 8, vec![0xff; 8], vec![]),
        (Req::GET_CONFIG as u32, 1, 12, vec![0; 12], vec![]),
        (Req::SET_BACKEND_REQ_FD as u32, 1, 0, vec![], vec![]),
        (Req::GET_INFLIGHT_FD as u32, 1, 0, vec![], vec![]),
        (Req::SET_LOG_BASE as u32, 1, 16, vec![0xff; 16], vec![event]),
        (Req::SET_LOG_BASE as u32, 1, 3, vec![0xff; 3], vec![event]),
    ];
    for (request, flags, size, body, fds) in messages {
        for flags in [flags, flags | raw::NEED_REPLY] {
            let guest = device.boot(EVENT_IDX);
            raw::send(&guest.stream, request, flags, size, &body, &fds).unwrap();
            // Followed by another header, for a process that waits for more bytes.
            let _ = raw::send(&guest.stream, Req::GET_FEATURES as u32, 1, 0, &[], &[]);
            drop(guest);
            assert!(
                device.process.is_running(),
                "request {request}, size {size}"
            );
        }
    }
    device.must_serve();
}

pub fn endless_descriptor_chain<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    // One of each kind, so that descriptors that are kept are counted.
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let (channel, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let round = |guest: &mut Guest| {
        let queue = &guest.queues[0];
        guest.frontend.set_vring_call(0, &queue.call).unwrap();
        guest.frontend.set_vring_kick(0, &queue.kick).unwrap();
        guest.frontend.set_vring_err(0, &event).unwrap();
        guest.frontend.set_backend_request_fd(&channel).unwrap();
        guest.share_memory();
    };
    round(&mut guest);
    let count = || std::fs::read_dir(device.process.proc("fd")).map(Iterator::count);
    let before = count();
    for _ in 0..800 {
        round(&mut guest);
    }
    match before {
        // The descriptor of the last message may still be open for a moment.
        Ok(before) => wait_until("as many files are open as before", || {
            count().is_ok_and(|now| now <= before)
        }),
        // Only root may inspect a process that is not dumpable.
        Err(_) => assert!(!rustix::process::geteuid().is_root()),
    }
    device.round_trip(&mut guest);
}

pub fn random_descriptors<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX | INDIRECT_DESC);
    // A linear congruential generator: the same numbers in every run.
    let mut state = 0x5eed_u64;
    let mut random = move |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % below
    };
    let index = S::REQUESTS;
    for _ in 0..300 {
        let queue = &mut guest.queues[index];
        let buffers = guest.ram.alloc(0);
        for slot in 0..queue.size {
            let address = match random(8) {
                0 => random(1 << 40),
                1 => queue.descriptors + 16 * random(64),
                _ => buffers + random(1 << 16),
            };
            let len = match random(8) {
                0 => random(1 << 32),
                1 => 16 * random(64),
                _ => random(4096),
            };
            let flags = random(8) as u16;
            let next = random(u64::from(queue.size) + 2) as u16;
            let buffer = Buffer::readable(address, len as u32);
            queue.descriptor(queue.descriptors, slot, buffer, flags, next);
        }
        for _ in 0..random(u64::from(queue.size)) {
            queue.offer(random(u64::from(queue.size)) as u16);
        }
        queue.kick();
        sleep(Duration::from_micros(random(500)));
        guest.stop(index);
        guest.queues[index].clear();
        guest.start(index, 0);
    }
    drop(guest);
    device.must_serve();
}

//! Requirements of virtio 1.2 section 2.7 on a device that no other module tests. Each test is
//! named after the section.

use std::time::Duration;

use outrigger_tests::guest::{EVENT_IDX, INDIRECT_DESC};
use outrigger_tests::queue::{Buffer, DriverQueue, INDIRECT, NEXT, Used};
use outrigger_tests::ram::Ram;

use crate::subject::{Device, Subject};

/// Runs a request with the descriptors `direct` and an indirect table with `rest`.
fn run_mixed(
    queue: &mut DriverQueue,
    ram: &Ram,
    (direct, rest): (&[Buffer], &[Buffer]),
    writable: bool,
) -> Used {
    let len = 16 * rest.len() as u64;
    let table = ram.alloc(len);
    for (index, buffer) in (0u16..).zip(rest) {
        let more = usize::from(index) + 1 < rest.len();
        queue.descriptor(
            table,
            index,
            *buffer,
            if more { NEXT } else { 0 },
            index + 1,
        );
    }
    for (index, buffer) in (0u16..).zip(direct) {
        queue.descriptor(queue.descriptors, index, *buffer, NEXT, index + 1);
    }
    let whole = Buffer {
        address: table,
        len: len as u32,
        writable,
    };
    let last = direct.len() as u16;
    queue.descriptor(queue.descriptors, last, whole, INDIRECT, 0);
    queue.offer(0);
    queue.kick();
    queue.wait()
}

pub fn r2_7_5_3_2_direct_descriptors_before_an_indirect_table<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX | INDIRECT_DESC);
    let request = S::request(&guest.ram);
    let expected = guest.queues[S::REQUESTS].run(&request).len;
    // The first buffer is split in two, for a direct descriptor before the indirect table.
    let half = request[0].len / 2;
    let mut pieces = vec![
        Buffer {
            len: half,
            ..request[0]
        },
        Buffer {
            address: request[0].address + u64::from(half),
            len: request[0].len - half,
            ..request[0]
        },
    ];
    pieces.extend(&request[1..]);
    for direct in 1..pieces.len() {
        let (ram, queue) = (&guest.ram, &mut guest.queues[S::REQUESTS]);
        let used = run_mixed(queue, ram, pieces.split_at(direct), false);
        assert_eq!(used.len, expected, "{direct} direct descriptors");
    }
    drop(guest);
    device.must_serve();
}

pub fn r2_7_5_3_2_the_write_flag_of_an_indirect_table_is_ignored<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX | INDIRECT_DESC);
    let request = S::request(&guest.ram);
    let expected = guest.queues[S::REQUESTS].run(&request).len;
    let (ram, queue) = (&guest.ram, &mut guest.queues[S::REQUESTS]);
    let used = run_mixed(queue, ram, (&[], &request), true);
    assert_eq!(used.len, expected);
    drop(guest);
    device.must_serve();
}

pub fn r2_7_8_2_used_length_is_what_was_written<S: Subject>() {
    let device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    let request = S::request(&guest.ram);
    let room: u32 = request.iter().filter(|b| b.writable).map(|b| b.len).sum();
    let used = guest.queues[S::REQUESTS].run(&request);
    assert!(used.len <= room, "{} bytes into {room}", used.len);
    if room > 0 {
        assert!(used.len > 0);
    }
}

pub fn r2_7_10_2_doorbells_without_buffers_are_harmless<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    for _ in 0..100 {
        for queue in &guest.queues {
            queue.kick();
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    device.round_trip(&mut guest);
}

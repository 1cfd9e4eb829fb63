//! The memory table.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use outrigger_tests::DEADLINE;
use outrigger_tests::guest::{EVENT_IDX, Guest};
use outrigger_tests::queue::Buffer;
use outrigger_tests::ram::Ram;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use crate::subject::{Device, Subject};

pub fn accepts_memory_regions_one_by_one<S: Subject>() {
    let mut device = Device::<S>::listening();
    // More than the 8 regions of a SET_MEM_TABLE message, in any order.
    let layout: Vec<(u64, u64)> = (0..20u64).map(|i| (i << 30, 1 << 20)).collect();
    let mut guest = Guest::new(device.process.connect(), Ram::new(&layout));
    guest.negotiate(EVENT_IDX);
    let regions = guest.ram.regions();
    for region in regions.iter().skip(10).chain(regions.iter().take(10)) {
        guest.frontend.add_mem_region(region).unwrap();
    }
    for _ in 0..S::QUEUES {
        guest.add_queue(64);
    }
    device.round_trip(&mut guest);

    // A region that is not in use can be removed once, and added again.
    for region in &regions[5..12] {
        guest.frontend.remove_mem_region(region).unwrap();
        guest.frontend.remove_mem_region(region).unwrap_err();
    }
    device.round_trip(&mut guest);
    guest.frontend.add_mem_region(&regions[7]).unwrap();
    guest.frontend.add_mem_region(&regions[7]).unwrap_err();
    device.round_trip(&mut guest);

    // Without the region of its rings, a queue stops. Everything else continues.
    guest.frontend.remove_mem_region(&regions[0]).unwrap();
    guest.queues[S::REQUESTS].kick();
    assert!(guest.frontend.get_features().is_ok());
    guest.frontend.add_mem_region(&regions[0]).unwrap();
    drop(guest);
    device.must_serve();
}

pub fn continues_while_memory_is_replaced<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    let request = S::request(&guest.ram);
    for _ in 0..20 {
        let queue = &mut guest.queues[S::REQUESTS];
        while queue.room() >= request.len() {
            queue.add(&request);
        }
        queue.kick();
        guest.share_memory();
        guest.queues[S::REQUESTS].wait_all();
    }
    device.round_trip(&mut guest);
}

/// Regions, more than fit into one message, are added and removed while requests are in
/// flight.
pub fn continues_while_regions_are_added_and_removed<S: Subject>() {
    let mut device = Device::<S>::listening();
    let layout: Vec<(u64, u64)> = (0..20u64).map(|i| (i << 30, 1 << 20)).collect();
    let mut guest = Guest::new(device.process.connect(), Ram::new(&layout));
    guest.negotiate(EVENT_IDX);
    let regions = guest.ram.regions();
    // The rings are in the first and the last region.
    for region in [&regions[0], &regions[19]] {
        guest.frontend.add_mem_region(region).unwrap();
    }
    for _ in 0..S::QUEUES {
        guest.add_queue(64);
    }
    let request = S::request(&guest.ram);
    let stop = AtomicBool::new(false);
    let Guest {
        frontend, queues, ..
    } = &mut guest;
    let queue = &mut queues[S::REQUESTS];
    let completed = std::thread::scope(|scope| {
        let feeder = scope.spawn(|| {
            let (mut completed, start) = (0, Instant::now());
            // On a busy machine this thread may start when the others are done.
            while !stop.load(Ordering::Acquire) || completed == 0 && start.elapsed() < DEADLINE {
                while queue.room() >= request.len() {
                    queue.add(&request);
                }
                queue.kick();
                completed += queue.wait_all().len();
            }
            completed
        });
        for _ in 0..5 {
            for region in &regions[1..19] {
                frontend.add_mem_region(region).unwrap();
            }
            for region in &regions[1..19] {
                frontend.remove_mem_region(region).unwrap();
            }
        }
        stop.store(true, Ordering::Release);
        feeder.join().unwrap()
    });
    assert!(completed > 0);
    device.round_trip(&mut guest);
}

/// A request with a buffer in a removed region is returned, and the next one is served. When
/// the region is added again, the buffer can be used again.
pub fn returns_requests_in_a_removed_region<S: Subject>() {
    let mut device = Device::<S>::listening();
    let layout: Vec<(u64, u64)> = (0..10u64).map(|i| (i << 30, 1 << 20)).collect();
    let mut guest = Guest::new(device.process.connect(), Ram::new(&layout));
    guest.negotiate(EVENT_IDX);
    let regions = guest.ram.regions();
    for region in &regions {
        guest.frontend.add_mem_region(region).unwrap();
    }
    for _ in 0..S::QUEUES {
        guest.add_queue(64);
    }
    // The same request, with its buffers in the region that is removed.
    let request = S::request(&guest.ram);
    let moved: Vec<Buffer> = request
        .iter()
        .map(|buffer| {
            let len = u64::from(buffer.len);
            let address = guest.ram.alloc_in(5, len, 16);
            guest
                .ram
                .set(address, &guest.ram.get(buffer.address, len as usize));
            Buffer { address, ..*buffer }
        })
        .collect();
    let there = guest.queues[S::REQUESTS].run(&moved).len;
    for _ in 0..3 {
        guest.frontend.remove_mem_region(&regions[5]).unwrap();
        let before = guest.ram.get(5 << 30, 1 << 20);
        assert_eq!(guest.queues[S::REQUESTS].run(&moved).len, 0);
        // The device wrote no byte there, because it has unmapped the region.
        assert!(guest.ram.get(5 << 30, 1 << 20) == before);
        device.round_trip(&mut guest);
        guest.frontend.add_mem_region(&regions[5]).unwrap();
        assert_eq!(guest.queues[S::REQUESTS].run(&moved).len, there);
    }
    device.round_trip(&mut guest);
}

pub fn refuses_invalid_regions<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(0);
    let ram = Arc::clone(&guest.ram); // keeps the file open
    let good = ram.regions()[1];
    let beyond = good.guest_phys_addr + (1 << 40);
    let impossible = |(address, user, size, offset)| {
        let mut region = good;
        region.guest_phys_addr = address;
        region.userspace_addr = user;
        region.memory_size = size;
        region.mmap_offset = offset;
        region
    };
    for (why, region) in [
        ("overlaps", (good.guest_phys_addr, beyond, 4096, 0)),
        (
            "user addresses overlap",
            (beyond, good.userspace_addr, 4096, 0),
        ),
        ("longer than its file", (beyond, beyond, 1 << 40, 0)),
        ("behind its file", (beyond, beyond, 4096, 1 << 40)),
        ("not a whole number of pages", (beyond, beyond, 4096, 100)),
    ] {
        let region = impossible(region);
        assert!(guest.frontend.add_mem_region(&region).is_err(), "{why}");
        let table = guest.frontend.set_mem_table(&[region, good]);
        assert!(table.is_err(), "{why}");
        device.round_trip(&mut guest);
    }
    drop(guest);

    // An invalid region may end the connection.
    for region in [
        (beyond, beyond, 4096, u64::MAX - 100),
        (beyond, beyond, u64::MAX, 0),
        (u64::MAX - 100, beyond, 4096, 0),
        (beyond, u64::MAX - 100, 4096, 0),
    ] {
        let region = impossible(region);
        let mut guest = device.boot(0);
        guest.frontend.add_mem_region(&region).unwrap_err();
        drop(guest);
        let guest = device.boot(0);
        guest.frontend.set_mem_table(&[region, good]).unwrap_err();
    }
    device.must_serve();
}

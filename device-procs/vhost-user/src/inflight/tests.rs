//! Simulated processes die at any step of a ring with an in-flight table, and a driver
//! checks that each request is completed once.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{MemoryTable, RegionInfo};
use crate::ring::{Ring, RingAddresses};
use crate::testing::{Random, run_until_death};

const SIZE: u16 = 8;
const QUEUES: usize = 2;
/// Not the first queue, so that the offset of its region matters.
const QUEUE: usize = 1;
const MEMORY: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;

/// What outlives a process: guest memory, the in-flight table, and the driver.
struct Survivors {
    memory: MemoryTable,
    layout: InflightLayout,
    table: File,
    offered: u16,
    reaped: u16,
    /// Requests that the driver has made available and not seen completed.
    outstanding: Vec<u16>,
    completed: u64,
}

impl Survivors {
    fn new() -> Self {
        Self::starting_at(0)
    }

    /// A ring that was used before: `index` requests have gone through it.
    fn starting_at(index: u16) -> Self {
        let file: File = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap().into();
        file.set_len(MEMORY).unwrap();
        let region = RegionInfo {
            guest: 0,
            size: MEMORY,
            user: 0,
            offset: 0,
        };
        let layout = InflightLayout {
            queues: QUEUES as u16,
            size: SIZE,
        };
        let world = Survivors {
            memory: MemoryTable::new([(region, file)]).unwrap(),
            layout,
            table: create(layout, QUEUES, SIZE).unwrap().0,
            offered: index,
            reaped: index,
            outstanding: Vec::new(),
            completed: 0,
        };
        for head in 0..SIZE {
            let descriptor = [0x8000 + 16 * u64::from(head), 16];
            world.put(16 * u64::from(head), descriptor);
        }
        world.put(AVAILABLE + 2, index);
        world.put(USED + 2, index);
        world
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        let memory = self.memory.memory();
        memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.memory().read_obj(GuestAddress(at)).unwrap()
    }

    fn offer(&mut self, head: u16) {
        assert!(!self.outstanding.contains(&head));
        self.put(AVAILABLE + 4 + 2 * u64::from(self.offered % SIZE), head);
        self.offered = self.offered.wrapping_add(1);
        self.put(AVAILABLE + 2, self.offered);
        self.outstanding.push(head);
    }

    /// Offers up to `count` requests.
    fn offer_some(&mut self, count: u64, random: &mut Random) {
        for _ in 0..count {
            let mut free = (0..SIZE).filter(|head| !self.outstanding.contains(head));
            let skip = random.below(u64::from(SIZE)) as usize;
            match free.clone().nth(skip).or(free.next()) {
                Some(head) => self.offer(head),
                None => return,
            }
        }
    }

    fn reap(&mut self) {
        let used: u16 = self.get(USED + 2);
        while self.reaped != used {
            let element: [u32; 2] = self.get(USED + 4 + 8 * u64::from(self.reaped % SIZE));
            let at = self
                .outstanding
                .iter()
                .position(|&head| u32::from(head) == element[0])
                .unwrap_or_else(|| panic!("{} is completed twice", element[0]));
            self.outstanding.swap_remove(at);
            self.reaped = self.reaped.wrapping_add(1);
            self.completed += 1;
        }
    }

    fn table(&self) -> Arc<InflightTable> {
        let file = self.table.try_clone().unwrap();
        let len = self.layout.len();
        Arc::new(InflightTable::map(self.layout, file, 0, len, QUEUES, SIZE).unwrap())
    }

    /// A process starts the ring, with a wrong base from the front end.
    fn start(&self) -> Ring {
        let mut ring = Ring::new(QUEUE, SIZE).unwrap();
        ring.set_size(SIZE.into()).unwrap();
        ring.set_base(4711);
        let addresses = RingAddresses {
            descriptors: 0,
            available: AVAILABLE,
            used: USED,
        };
        ring.set_addresses(addresses, &self.memory).unwrap();
        let table = self.table();
        let split = ring.prepare(&self.memory, Some(&table)).unwrap();
        let kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        ring.start(split, kick, Some(&table));
        ring.set_enabled(true);
        ring
    }

    /// A process pops requests, puts some back and completes others, in any order.
    fn work(&self, rounds: u64, random: &mut Random) {
        let memory = self.memory.memory();
        let mut ring = self.start();
        let mut popped: Vec<u16> = Vec::new();
        for _ in 0..rounds {
            ring.disable_notification();
            for _ in 0..random.below(5) {
                let Some(chain) = ring.pop(memory) else { break };
                if random.below(6) == 0 {
                    ring.undo_pop(&chain);
                } else {
                    popped.push(chain.head);
                }
            }
            let mut batch = Vec::new();
            for _ in 0..random.below(4).min(popped.len() as u64) {
                let at = random.below(popped.len() as u64) as usize;
                batch.push((popped.swap_remove(at), 0));
            }
            ring.add_used_batch(&batch);
            ring.flush();
            assert!(ring.is_running());
        }
    }

    /// A process that does not die completes all requests.
    fn finish(&mut self) {
        let ring = &mut self.start();
        drain(ring, self.memory.memory());
        self.reap();
        assert!(self.outstanding.is_empty(), "lost: {:?}", self.outstanding);
    }

    /// Overwrites bytes in the region of the queue.
    fn corrupt(&self, offset: usize, bytes: &[u8]) {
        let at = QUEUE as u64 * self.layout.stride() + offset as u64;
        self.table.write_all_at(bytes, at).unwrap();
    }
}

fn drain(ring: &mut Ring, memory: &crate::GuestMemory) {
    loop {
        ring.disable_notification();
        let Some(chain) = ring.pop(memory) else {
            break;
        };
        let head = chain.head;
        ring.add_used(head, 0);
        ring.flush();
    }
}

#[test]
fn each_request_is_completed_once_whenever_processes_die() {
    let mut deaths = 0;
    for seed in 0..400 {
        let mut random = Random::new(seed);
        // The indices wrap around in some runs.
        let mut world = Survivors::starting_at(random.pick(&[0, 0, 5, 65_500]));
        for _ in 0..60 {
            let count = random.below(5);
            world.offer_some(count, &mut random);
            let (steps, rounds) = (random.below(90), 1 + random.below(4));
            let alive = run_until_death(steps, || world.work(rounds, &mut random));
            deaths += u32::from(alive.is_none());
            // A process that did not die stopped with requests in flight, which is the same.
            world.reap();
        }
        world.finish();
        assert!(world.completed > 60, "seed {seed}: {}", world.completed);
    }
    assert!(deaths > 5_000, "{deaths}");
}

/// The first process dies at each of its steps, and so does the second.
#[test]
fn two_deaths_in_a_row_lose_nothing() {
    let scenario = |world: &Survivors| {
        let memory = world.memory.memory();
        let mut ring = world.start();
        ring.disable_notification();
        let heads: Vec<u16> = (0..5).map_while(|_| Some(ring.pop(memory)?.head)).collect();
        let batch = |some: &[u16]| some.iter().map(|&head| (head, 0)).collect::<Vec<_>>();
        if let [first, second, third, rest @ ..] = &heads[..] {
            ring.add_used_batch(&batch(&[*second, *third]));
            ring.add_used_batch(&batch(rest));
            ring.add_used(*first, 0);
        }
        ring.flush();
    };
    let mut both = 0;
    for first in 0.. {
        let mut world = Survivors::new();
        (0..6).for_each(|head| world.offer(head));
        if run_until_death(first, || scenario(&world)).is_some() {
            break;
        }
        for second in 0.. {
            let mut world = Survivors::new();
            (0..6).for_each(|head| world.offer(head));
            assert!(run_until_death(first, || scenario(&world)).is_none());
            world.reap();
            let alive = run_until_death(second, || scenario(&world)).is_some();
            world.reap();
            world.finish();
            if alive {
                break;
            }
            both += 1;
        }
    }
    assert!(both > 1000, "{both}");
}

#[test]
fn requests_are_resubmitted_in_their_order_of_submission() {
    let mut world = Survivors::new();
    for head in [6, 2, 3, 0] {
        world.offer(head);
    }
    let memory = Arc::clone(world.memory.memory());
    let mut ring = world.start();
    ring.disable_notification();
    for _ in 0..3 {
        ring.pop(&memory).unwrap();
    }
    ring.add_used(2, 0);
    drop(ring);

    let mut ring = world.start();
    assert_eq!(ring.to_resubmit(), 2);
    ring.disable_notification();
    let first = ring.pop(&memory).unwrap();
    assert_eq!(first.head, 6);
    // A request that is put back comes again, before new ones.
    assert_eq!(ring.pop(&memory).unwrap().head, 3);
    assert_eq!(ring.pop(&memory).unwrap().head, 0);
    ring.undo_pop(&first);
    for head in [6, 3, 0] {
        assert_eq!(ring.pop(&memory).unwrap().head, head);
        ring.add_used(head, 0);
    }
    assert!(ring.pop(&memory).is_none() && ring.is_running());
    assert_eq!(ring.to_resubmit(), 0);
    world.reap();
    assert!(world.outstanding.is_empty());

    // A request that was put back is not in flight.
    world.offer(4);
    let chain = ring.pop(&memory).unwrap();
    ring.undo_pop(&chain);
    drop(ring);
    assert_eq!(world.start().to_resubmit(), 0);
}

/// Checks that the ring breaks for a process that finds `world`, which has the error `wrong`.
fn assert_breaks(world: &Survivors, wrong: &str) {
    let mut ring = world.start();
    assert!(!ring.is_running(), "{wrong}");
    assert!(ring.pop(world.memory.memory()).is_none());
}

#[test]
fn an_invalid_table_breaks_the_ring() {
    let used = || {
        let mut world = Survivors::starting_at(3);
        world.offer(1);
        drop(world.start()); // initialises the table
        world
    };
    let world = used();
    world.corrupt(VERSION_OFFSET, &7u16.to_ne_bytes());
    assert_breaks(&world, "version");

    let world = used();
    for head in [1, 2] {
        world.corrupt(entry_offset(head, INFLIGHT_OFFSET), &[1]);
    }
    assert_breaks(&world, "more in flight than available");

    let world = used();
    world.corrupt(USED_IDX_OFFSET, &2u16.to_ne_bytes());
    world.corrupt(LAST_BATCH_HEAD_OFFSET, &SIZE.to_ne_bytes());
    assert_breaks(&world, "last batch outside the table");

    // A loop in the last batch ends: its requests are cleared again.
    let mut world = used();
    world.corrupt(USED_IDX_OFFSET, &(3 - SIZE as i16).to_ne_bytes());
    world.finish();
}

#[test]
fn a_table_with_random_contents_does_no_harm() {
    let mut broken = 0;
    for seed in 0..3000 {
        let mut random = Random::new(seed);
        let world = &mut Survivors::new();
        world.offer_some(6, &mut random);
        let mut bytes = vec![0; world.layout.stride() as usize];
        for _ in 0..random.below(40) {
            let anywhere = random.below(bytes.len() as u64) as usize;
            let inflight = entry_offset(random.below(SIZE.into()) as u16, INFLIGHT_OFFSET);
            let at = random.pick(&[anywhere, inflight, LAST_BATCH_HEAD_OFFSET, USED_IDX_OFFSET]);
            bytes[at] = random.pick(&[0, 1, 1, 2, 7, 8, 255]);
        }
        bytes[VERSION_OFFSET..][..2].copy_from_slice(&VERSION.to_ne_bytes());
        world.corrupt(0, &bytes);
        let mut ring = world.start();
        drain(&mut ring, world.memory.memory());
        broken += u32::from(!ring.is_running());
        // No more requests are completed than were made available.
        assert!(world.get::<u16>(USED + 2) <= 6, "seed {seed}");
    }
    assert!(broken > 50, "{broken}");
}

#[test]
fn a_table_must_fit_the_queues_of_the_device() {
    let layout = |queues, size| InflightLayout { queues, size };
    for wrong in [
        layout(0, 8),
        layout(3, 8),
        layout(2, 0),
        layout(2, 7),
        layout(2, 16),
        layout(u16::MAX, u16::MAX),
    ] {
        assert!(create(wrong, QUEUES, SIZE).is_err(), "{wrong:?}");
    }
    // 16 bytes of header and 16 for each of 8 entries, whatever size is asked for; rounded
    // up to a multiple of 64.
    let (file, len) = create(layout(2, 4), QUEUES, SIZE).unwrap();
    assert_eq!(len, 2 * 192);
    let map = |offset, len| {
        let file = file.try_clone().unwrap();
        InflightTable::map(layout(2, 4), file, offset, len, QUEUES, SIZE).map(Arc::new)
    };
    let table = map(0, len).unwrap();
    assert!(table.check_room(1, 8).is_ok() && table.check_room(0, 4).is_ok());
    assert!(table.check_room(2, 8).is_err() && table.check_room(0, 16).is_err());
    // A table that another program made has the size that it says.
    let small = map(0, 2 * 128).unwrap();
    assert!(small.check_room(1, 4).is_ok() && small.check_room(1, 8).is_err());
    for (offset, len) in [
        (0, 2 * 128 - 1),
        (0, len + 1),
        (64, len),
        (0, u64::MAX),
        (u64::MAX, len),
        (4096, 0),
    ] {
        assert!(map(offset, len).is_err(), "{offset} {len}");
    }
    assert!(table.field::<AtomicU8>(1, entry_offset(7, 15)).is_some());
    assert!(table.field::<AtomicU8>(0, entry_offset(8, 0)).is_none());
    assert!(table.field::<AtomicU8>(2, 0).is_none());
}

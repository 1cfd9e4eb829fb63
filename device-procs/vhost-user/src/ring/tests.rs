//! Crate virtio-queue is the oracle: whatever a driver does, both make the same changes to
//! the same memory.

use std::fs::File;
use std::sync::atomic::Ordering;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::*;
use crate::memory::RegionInfo;
use crate::testing::Random;

const MEMORY: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;

fn table() -> MemoryTable {
    let file: File = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap().into();
    file.set_len(MEMORY).unwrap();
    let region = RegionInfo {
        guest: 0,
        size: MEMORY,
        user: 0,
        offset: 0,
    };
    MemoryTable::new([(region, file)]).unwrap()
}

impl Ring {
    fn running_mut(&mut self) -> &mut RunningRing {
        match &mut self.state {
            RingState::Running(running) => running,
            _ => panic!("the ring is not running"),
        }
    }

    /// Available index, used index, and number of requests in flight.
    fn counters(&mut self) -> (u16, u16, u16) {
        self.running_mut().counters()
    }
}

/// A ring, the oracle with its own memory, and a driver of both.
struct Pair {
    size: u16,
    event_idx: bool,
    ours: Ring,
    memory: Arc<GuestMemory>,
    theirs: Queue,
    their_memory: Arc<GuestMemory>,
    interrupt: OwnedFd,
    available: u16,
    /// Requests that the driver has made available and that are not completed.
    outstanding: Vec<u16>,
    /// Requests that the device has popped.
    in_flight: Vec<u16>,
    is_empty: bool,
    used_added: bool,
    interrupts: u64,
}

impl Pair {
    fn new(random: &mut Random) -> Self {
        let size = 1 << random.below(5);
        let event_idx = random.below(2) == 0;
        let index = random.pick(&[0, 1, 77, u16::MAX - 5, u16::MAX]);
        let (table, their_memory) = (table(), Arc::clone(table().memory()));
        let mut ours = Ring::new(0, 256).unwrap();
        let mut theirs = Queue::new(256).unwrap();
        ours.set_size(size.into()).unwrap();
        theirs.try_set_size(size).unwrap();
        ours.set_event_idx(event_idx);
        theirs.set_event_idx(event_idx);
        ours.set_base(index);
        theirs.set_next_avail(index);
        theirs.set_next_used(index);
        let addresses = RingAddresses {
            descriptors: 0,
            available: AVAILABLE,
            used: USED,
        };
        ours.set_addresses(addresses, &table).unwrap();
        theirs
            .try_set_avail_ring_address(GuestAddress(AVAILABLE))
            .unwrap();
        theirs
            .try_set_used_ring_address(GuestAddress(USED))
            .unwrap();
        theirs.set_ready(true);
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let call = eventfd(0, flags).unwrap();
        let mut pair = Pair {
            size,
            event_idx,
            memory: Arc::clone(table.memory()),
            their_memory,
            interrupt: call.try_clone().unwrap(),
            ours,
            theirs,
            available: index,
            outstanding: Vec::new(),
            in_flight: Vec::new(),
            is_empty: false,
            used_added: false,
            interrupts: 0,
        };
        pair.put(AVAILABLE + 2, index);
        pair.put(USED + 2, index);
        pair.ours.set_call(Some(call));
        let split = pair.ours.prepare(&table, None).unwrap();
        pair.ours.start(split, eventfd(0, flags).unwrap(), None);
        pair.ours.set_enabled(true);
        // The interrupt of a ring that was used before.
        pair.ours.flush();
        pair.has_interrupt();
        pair
    }

    fn put<T: ByteValued>(&self, at: u64, value: T) {
        for memory in [&self.memory, &self.their_memory] {
            memory.write_obj(value, GuestAddress(at)).unwrap();
        }
    }

    fn has_interrupt(&self) -> bool {
        rustix::io::read(&self.interrupt, &mut [0; 8]).is_ok()
    }

    /// The driver makes a request available, if it has a free head.
    fn offer(&mut self, random: &mut Random) {
        let free: Vec<u16> = (0..self.size)
            .filter(|head| !self.outstanding.contains(head))
            .collect();
        if free.is_empty() {
            return;
        }
        let head = random.pick(&free);
        self.put(
            AVAILABLE + 4 + 2 * u64::from(self.available % self.size),
            head,
        );
        self.available = self.available.wrapping_add(1);
        self.put(AVAILABLE + 2, self.available);
        self.outstanding.push(head);
    }

    /// The driver changes which interrupts it wants.
    fn set_driver_event(&mut self, random: &mut Random) {
        self.put(AVAILABLE, random.below(2) as u16);
        let event = self.theirs.next_used().wrapping_add(random.below(6) as u16);
        let event = event.wrapping_sub(3);
        self.put(AVAILABLE + 4 + 2 * u64::from(self.size), event);
    }

    /// The device pops a request; false if both have found that the ring is broken.
    fn pop(&mut self) -> bool {
        let ours = self.ours.pop(&self.memory).map(|chain| chain.head);
        let Ok(mut theirs) = self.theirs.iter(&*self.their_memory) else {
            assert!(ours.is_none());
            assert!(!self.ours.is_running());
            return false;
        };
        assert_eq!(ours, theirs.next().map(|chain| chain.head_index()));
        assert_eq!(self.ours.counters().0, self.theirs.next_avail());
        self.in_flight.extend(ours);
        self.is_empty |= ours.is_none();
        true
    }

    /// The device completes some of its requests, in any order.
    fn add_used(&mut self, random: &mut Random) {
        let count = random.below(self.in_flight.len() as u64 + 1);
        let mut batch = Vec::new();
        for _ in 0..count {
            let at = random.below(self.in_flight.len() as u64) as usize;
            let (head, written) = (self.in_flight.swap_remove(at), random.below(1 << 32) as u32);
            self.outstanding.retain(|&other| other != head);
            self.theirs
                .add_used(&*self.their_memory, head, written)
                .unwrap();
            batch.push((head, written));
        }
        self.ours.add_used_batch(&batch);
        self.used_added |= count > 0;
    }

    fn flush(&mut self) {
        self.ours.flush();
        let mut wanted = std::mem::take(&mut self.used_added);
        if wanted {
            let flags: u16 = self.memory.read_obj(GuestAddress(AVAILABLE)).unwrap();
            // The oracle ignores the flag.
            let theirs = self.theirs.needs_notification(&*self.their_memory).unwrap();
            wanted = theirs && (self.event_idx || flags == 0);
        }
        assert_eq!(self.has_interrupt(), wanted);
        self.interrupts += u64::from(wanted);
    }

    fn enable_notification(&mut self) {
        self.ours.running_mut().pending = false;
        self.ours.enable_notification();
        if std::mem::take(&mut self.is_empty) {
            let more = self
                .theirs
                .enable_notification(&*self.their_memory)
                .unwrap();
            assert_eq!(self.ours.is_pending(), more);
        }
    }

    fn disable_notification(&mut self) {
        self.ours.disable_notification();
        self.theirs
            .disable_notification(&*self.their_memory)
            .unwrap();
    }

    fn assert_same_memory(&self) {
        let all = |memory: &GuestMemory| {
            let mut bytes = vec![0; MEMORY as usize];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            bytes
        };
        assert!(all(&self.memory) == all(&self.their_memory));
        let used: u16 = (self.memory)
            .load(GuestAddress(USED + 2), Ordering::Acquire)
            .unwrap();
        assert_eq!(used, self.theirs.next_used());
    }
}

#[test]
fn a_ring_does_the_same_as_crate_virtio_queue() {
    let (mut broken, mut completed, mut interrupts) = (0, 0, 0);
    for seed in 0..3000 {
        println!("seed {seed}");
        let random = &mut Random::new(seed);
        let mut pair = Pair::new(random);
        'ring: for _ in 0..100 {
            match random.below(10) {
                0..3 => pair.offer(random),
                3 => pair.set_driver_event(random),
                4 => pair.add_used(random),
                5 => pair.flush(),
                6 => pair.enable_notification(),
                7 => pair.disable_notification(),
                8 => {
                    pair.ours.refill_budget();
                    for _ in 0..random.below(4) {
                        if !pair.pop() {
                            broken += 1;
                            break 'ring;
                        }
                    }
                }
                _ if random.below(30) == 0 => {
                    // The available index jumps.
                    let least = pair.ours.counters().0.wrapping_add(pair.size + 1);
                    let beyond = random.below(u64::from(u16::MAX - pair.size));
                    pair.put(AVAILABLE + 2, least.wrapping_add(beyond as u16));
                }
                _ => {}
            }
            pair.assert_same_memory();
        }
        completed += u64::from(pair.theirs.next_used());
        interrupts += u64::from(pair.interrupts > 0);
    }
    assert!(broken > 300 && completed > 10_000 && interrupts > 1000);
}

#[test]
fn a_driver_cannot_have_more_requests_in_flight_than_entries() {
    let random = &mut Random::new(1);
    let mut pair = loop {
        let pair = Pair::new(random);
        if pair.size == 4 {
            break pair;
        }
    };
    (0..4).for_each(|_| pair.offer(random));
    pair.ours.refill_budget();
    let chains: Vec<u16> = (0..4)
        .map_while(|_| Some(pair.ours.pop(&pair.memory)?.head))
        .collect();
    assert_eq!(chains.len(), 4);
    // The driver makes one of them available again, although it is in flight.
    pair.put(AVAILABLE + 2, pair.available.wrapping_add(1));
    assert!(pair.ours.pop(&pair.memory).is_none());
    assert!(!pair.ours.is_running());
    // A broken ring completes nothing.
    pair.ours.add_used(chains[0], 0);
    pair.assert_same_memory();
}

/// A valid request, a malformed one, and one that the device refuses: `undo_pop` of the first
/// puts all of them back, and later each of them is completed once.
#[test]
fn requests_that_are_refused_after_one_that_is_put_back_are_completed_once() {
    let table = table();
    let memory = Arc::clone(table.memory());
    let put = |at: u64, value: u16| memory.write_obj(value, GuestAddress(at)).unwrap();
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    for inflight in [false, true] {
        for head in 0..4 {
            let far = if head == 1 { 1 << 40 } else { 0x3000 };
            let words = [far, 16u64];
            (memory.write_obj(words, GuestAddress(16 * u64::from(head)))).unwrap();
            put(AVAILABLE + 4 + 2 * u64::from(head), head);
        }
        put(AVAILABLE + 2, 4);
        put(USED + 2, 0);
        let mut ring = Ring::new(0, 4).unwrap();
        let addresses = RingAddresses {
            descriptors: 0,
            available: AVAILABLE,
            used: USED,
        };
        ring.set_addresses(addresses, &table).unwrap();
        let layout = crate::inflight::InflightLayout { queues: 1, size: 4 };
        let (file, len) = crate::inflight::create(layout, 1, 4).unwrap();
        let tracked = Arc::new(InflightTable::map(layout, file, 0, len, 1, 4).unwrap());
        let tracked = inflight.then_some(&tracked);
        let split = ring.prepare(&table, tracked).unwrap();
        ring.start(split, eventfd(0, flags).unwrap(), tracked);
        ring.set_enabled(true);
        for _ in 0..3 {
            ring.disable_notification();
            let first = ring.pop(&memory).unwrap();
            let second = ring.pop(&memory).unwrap();
            assert_eq!((first.head, second.head), (0, 2));
            ring.refuse(&second);
            ring.undo_pop(&first);
            ring.flush();
            assert_eq!(ring.counters(), (0, 0, 0));
        }
        ring.disable_notification();
        let first = ring.pop(&memory).unwrap();
        let second = ring.pop(&memory).unwrap();
        ring.refuse(&second);
        ring.add_used(first.head, 0);
        // Requests that were refused before it stay refused.
        let third = ring.pop(&memory).unwrap();
        ring.undo_pop(&third);
        ring.flush();
        assert_eq!(ring.counters(), (3, 3, 0));
        let used = |at: u64| memory.read_obj::<u32>(GuestAddress(USED + 4 + 8 * at));
        let mut heads = [0, 1, 2].map(|at| used(at).unwrap());
        heads.sort_unstable();
        assert_eq!(heads, [0, 1, 2]);
    }
}

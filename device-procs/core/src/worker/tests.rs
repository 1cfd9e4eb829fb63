//! A device that notes what it is told, and keeps requests in flight until it is drained.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::inflight::{InflightLayout, InflightTable, create};
use crate::memory::{MemoryTable, RegionInfo};
use crate::ring::RingAddresses;
use crate::{Device, DeviceContext};

const SIZE: u16 = 8;
const MEMORY: u64 = 0x1_0000;
/// Where the rings of a queue are, each queue's behind the one before.
const STRIDE: u64 = 0x4000;
const PLACE: RingAddresses = RingAddresses {
    descriptors: 0,
    available: 0x1000,
    used: 0x2000,
};

#[derive(Default)]
struct Notes {
    told: Vec<String>,
    refuse: bool,
    /// Nothing stays in flight.
    at_once: bool,
}

#[derive(Default)]
struct RecordingDevice {
    notes: Arc<Mutex<Notes>>,
    in_flight: Vec<(usize, u16)>,
    /// No more than so many requests at a time.
    depth: usize,
}

impl RecordingDevice {
    fn note(&self, what: String) {
        self.notes.lock().unwrap().told.push(what);
    }
}

impl Device for RecordingDevice {
    fn frontend_connected(&mut self, _socket: BorrowedFd<'_>) {
        self.note("connected".into());
    }

    fn start_queue(&mut self, queue: usize) -> io::Result<()> {
        self.note(format!("starting {queue}"));
        match self.notes.lock().unwrap().refuse {
            true => Err(io::Error::other("no medium")),
            false => Ok(()),
        }
    }

    fn stop_queue(&mut self, queue: usize) {
        assert!(self.in_flight.iter().all(|&(of, _)| of != queue));
        self.note(format!("stopped {queue}"));
    }

    fn process_queue(&mut self, queue: usize, cx: &mut DeviceContext<'_>) {
        let memory = cx.memory;
        let Some(ring) = cx.ring(queue) else { return };
        while self.in_flight.len() < self.depth
            && let Some(chain) = ring.pop(memory)
        {
            self.in_flight.push((queue, chain.head));
        }
        if self.notes.lock().unwrap().at_once {
            self.drain_queue(queue, cx);
        }
    }

    fn poll(&mut self, cx: &mut DeviceContext<'_>) -> bool {
        let found = !self.in_flight.is_empty();
        (0..2).for_each(|queue| self.drain_queue(queue, cx));
        found
    }

    fn drain_queue(&mut self, queue: usize, cx: &mut DeviceContext<'_>) {
        let done = self.in_flight.extract_if(.., |&mut (of, _)| of == queue);
        let done: Vec<(u16, u32)> = done.map(|(_, head)| (head, 0)).collect();
        if let Some(ring) = cx.ring(queue) {
            ring.add_used_batch(&done);
        }
    }

    fn frontend_disconnected(&mut self) {
        self.note("closed".into());
    }
}

/// A front end with a driver of two queues, and a worker whose thread does not run.
struct World {
    worker: Arc<Worker>,
    table: MemoryTable,
    notes: Arc<Mutex<Notes>>,
}

impl World {
    fn new(depth: usize) -> Self {
        let file: File = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap().into();
        file.set_len(MEMORY).unwrap();
        let region = RegionInfo {
            guest: 0,
            size: MEMORY,
            user: 0,
            offset: 0,
        };
        let recorder = RecordingDevice {
            depth,
            ..RecordingDevice::default()
        };
        let world = World {
            notes: Arc::clone(&recorder.notes),
            table: MemoryTable::new([(region, file)]).unwrap(),
            worker: Arc::new(Worker::new(Box::new(recorder), &[0, 1], 2, SIZE).unwrap()),
        };
        world.control(|state, poller| state.set_memory(&world.table, poller));
        for queue in 0..2 {
            world
                .control(|state, poller| {
                    let place = at(queue);
                    state.set_addresses(queue, place, &world.table, poller)?;
                    state.ring(queue)?.set_size(SIZE.into())?;
                    state.set_enabled(queue, true, poller)
                })
                .unwrap();
        }
        world
    }

    fn control<R>(&self, f: impl FnOnce(&mut WorkerState, &Poller) -> R) -> R {
        self.worker.control(f)
    }

    fn start_with(&self, queue: usize, inflight: Option<&Arc<InflightTable>>) -> Result<(), Error> {
        let kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        self.control(|state, poller| state.start(queue, kick, false, &self.table, inflight, poller))
    }

    fn start(&self, queue: usize) -> Result<(), Error> {
        self.start_with(queue, None)
    }

    fn stop(&self, queue: usize) -> u16 {
        self.control(|state, poller| state.stop(queue, poller))
            .unwrap()
    }

    /// The driver makes requests 0 to `count` available, which are nothing but a head.
    fn offer(&self, queue: usize, count: u16) {
        let memory = self.table.memory();
        let available = at(queue).available;
        for head in 0..SIZE {
            let entry = GuestAddress(available + 4 + 2 * u64::from(head));
            memory.write_obj(head, entry).unwrap();
        }
        memory
            .write_obj(count, GuestAddress(available + 2))
            .unwrap();
    }

    /// Serves what is pending as the thread would.
    fn batch(&self) {
        self.control(|state, poller| state.work(&[], poller, false));
    }

    /// Whether the driver is asked not to ring.
    fn is_doorbell_off(&self, queue: usize) -> bool {
        let flags: u16 = (self.table.memory())
            .read_obj(GuestAddress(at(queue).used))
            .unwrap();
        flags == 1
    }

    fn used_index(&self, queue: usize) -> u16 {
        let at = GuestAddress(at(queue).used + 2);
        self.table.memory().read_obj(at).unwrap()
    }

    /// What the device was told since the last time.
    fn told(&self) -> Vec<String> {
        std::mem::take(&mut self.notes.lock().unwrap().told)
    }
}

fn at(queue: usize) -> RingAddresses {
    let behind = queue as u64 * STRIDE;
    RingAddresses {
        descriptors: PLACE.descriptors + behind,
        available: PLACE.available + behind,
        used: PLACE.used + behind,
    }
}

#[test]
fn a_device_hears_of_each_start_and_stop_once() {
    let world = World::new(SIZE.into());
    let socket = memfd_create("socket", MemfdFlags::CLOEXEC).unwrap();
    world.control(|state, _| state.frontend_connected(socket.as_fd()));
    world.start(1).unwrap();
    assert_eq!(world.told(), ["connected", "starting 1"]);
    // Another doorbell for a ring that runs is no start.
    world.start(1).unwrap();
    assert!(world.told().is_empty());
    world.start(0).unwrap();
    world.stop(1);
    world.stop(1);
    assert_eq!(world.told(), ["starting 0", "stopped 1"]);
    world.start(1).unwrap();
    world.control(|state, poller| state.close(poller));
    assert_eq!(
        world.told(),
        ["starting 1", "stopped 0", "stopped 1", "closed"]
    );
}

#[test]
fn a_start_that_fails_is_none() {
    let world = World::new(SIZE.into());
    world.notes.lock().unwrap().refuse = true;
    let error = world.start(1).unwrap_err().to_string();
    assert_eq!(error, "queue 1: starting: no medium");
    assert_eq!(world.told(), ["starting 1"]);
    world.control(|state, _| assert!(!state.ring(1).unwrap().was_started()));

    // The device is not asked if the rest is wrong, and told if it turns out so later.
    world.notes.lock().unwrap().refuse = false;
    let regular = |queue| {
        let file: File = tempfile::tempfile().unwrap();
        world.control(|state, poller| {
            state.start(queue, file.into(), false, &world.table, None, poller)
        })
    };
    let error = regular(0).unwrap_err().to_string();
    assert!(
        error.starts_with("queue 0: watching its doorbell"),
        "{error}"
    );
    assert_eq!(world.told(), ["starting 0", "stopped 0"]);
    let nowhere = RingAddresses {
        used: MEMORY,
        ..PLACE
    };
    world
        .control(|state, poller| state.set_addresses(0, nowhere, &world.table, poller))
        .unwrap();
    assert!(world.start(0).is_err());
    world.stop(0);
    assert!(world.told().is_empty());
}

#[test]
fn what_is_in_work_is_completed_before_its_ring_is_gone() {
    type Way = fn(&World);
    let ways: [(&str, Way); 5] = [
        ("stopped", |world| assert_eq!(world.stop(0), 5)),
        ("disabled", |world| {
            world
                .control(|state, poller| state.set_enabled(0, false, poller))
                .unwrap();
        }),
        ("moved", |world| {
            world
                .control(|state, poller| state.set_addresses(0, at(1), &world.table, poller))
                .unwrap();
            assert_eq!(world.used_index(1), 0);
        }),
        ("without memory", |world| {
            let empty = MemoryTable::default();
            world.control(|state, poller| {
                state.set_memory(&empty, poller);
                assert!(!state.ring(0).unwrap().is_running());
            });
        }),
        ("left", |world| {
            world.control(|state, poller| state.close(poller));
        }),
    ];
    for (how, end) in ways {
        let world = World::new(SIZE.into());
        world.offer(0, 5);
        world.start(0).unwrap();
        world.batch();
        assert_eq!(world.used_index(0), 0, "{how}");
        end(&world);
        assert_eq!(world.used_index(0), 5, "{how}");
    }
}

#[test]
fn a_ring_that_broke_gets_nothing_and_starts_anew() {
    let world = World::new(SIZE.into());
    world.offer(0, 3);
    world.start(0).unwrap();
    world.batch();
    // More than it has entries.
    world.offer(0, 3 + SIZE + 1);
    world.control(|state, _| state.ring(0).unwrap().pending = true);
    world.batch();
    world.control(|state, _| {
        assert!(!state.ring(0).unwrap().is_running());
        state.ring(0).unwrap().add_used(0, 0);
    });
    assert_eq!(world.told(), ["starting 0"]);
    assert_eq!(world.used_index(0), 0);

    // Its requests are not completed in the new one, where a driver would not know them.
    world.offer(0, 0);
    world.control(|state, _| state.ring(0).unwrap().set_base(0));
    world.start(0).unwrap();
    assert_eq!(world.told(), ["stopped 0", "starting 0"]);
    world.batch();
    assert_eq!(world.used_index(0), 0);
    world.offer(0, 2);
    world.control(|state, _| state.ring(0).unwrap().pending = true);
    world.batch();
    world.stop(0);
    assert_eq!(world.used_index(0), 2);
    assert_eq!(world.told(), ["stopped 0"]);
}

#[test]
fn a_stop_takes_left_overs_that_come_in_several_turns() {
    let shape = InflightLayout {
        queues: 2,
        size: SIZE,
    };
    let (file, len) = create(shape, 2, SIZE).unwrap();
    let table = || {
        let file = file.try_clone().unwrap();
        Arc::new(InflightTable::map(shape, file, 0, len, 2, SIZE).unwrap())
    };
    let first = World::new(6);
    first.offer(0, 6);
    first.start_with(0, Some(&table())).unwrap();
    first.batch();
    // It dies; the next has no room for so many at a time.
    let second = World {
        table: first.table.clone(),
        ..World::new(2)
    };
    second.control(|state, poller| state.set_memory(&second.table, poller));
    second.start_with(0, Some(&table())).unwrap();
    assert_eq!(second.stop(0), 6);
    assert_eq!(second.used_index(0), 6);

    // One that takes none leaves them to the third.
    second.offer(0, 9);
    second.start_with(0, Some(&table())).unwrap();
    second.batch();
    let third = World {
        table: first.table.clone(),
        ..World::new(0)
    };
    third.control(|state, poller| state.set_memory(&third.table, poller));
    third.start_with(0, Some(&table())).unwrap();
    assert_eq!(third.stop(0), 8);
    assert_eq!(third.used_index(0), 6);
}

/// What a stop takes of the left-overs is in flight when the driver breaks the ring, and must
/// not be any more when the ring is gone and its memory with it.
#[test]
fn left_overs_of_a_ring_that_breaks_while_it_stops_are_completed() {
    let shape = InflightLayout {
        queues: 2,
        size: SIZE,
    };
    let (file, len) = create(shape, 2, SIZE).unwrap();
    let table = || {
        let file = file.try_clone().unwrap();
        Arc::new(InflightTable::map(shape, file, 0, len, 2, SIZE).unwrap())
    };
    let first = World::new(SIZE.into());
    first.offer(0, 2);
    first.start_with(0, Some(&table())).unwrap();
    first.batch();
    let second = World {
        table: first.table.clone(),
        ..World::new(SIZE.into())
    };
    second.control(|state, poller| state.set_memory(&second.table, poller));
    second.start_with(0, Some(&table())).unwrap();
    second.offer(0, 2 + SIZE + 1);
    // `stopped` looks that nothing is in flight.
    second.stop(0);
    assert_eq!(second.told(), ["starting 0", "stopped 0"]);
}

#[test]
fn doorbells_stay_off_until_a_last_look() {
    let world = World::new(SIZE.into());
    let look = || world.control(|state, poller| state.work(&[], poller, true));
    let rest = || world.control(|state, _| state.enable_notification());
    world.start(0).unwrap();
    assert_eq!(look(), WorkFound::Work);
    assert_eq!(look(), WorkFound::Nothing);
    assert!(world.is_doorbell_off(0));
    world.offer(0, 3);
    assert_eq!(look(), WorkFound::Work);
    assert_eq!(world.used_index(0), 0);
    // The device has completed them meanwhile.
    assert_eq!(look(), WorkFound::Work);
    assert_eq!((look(), world.used_index(0)), (WorkFound::Nothing, 3));
    assert!(world.is_doorbell_off(0));

    world.offer(0, 4);
    assert!(rest());
    assert!(!world.is_doorbell_off(0));
    assert_eq!(look(), WorkFound::Work);
    assert!(world.is_doorbell_off(0));
    assert!(!rest());
    assert!(!world.is_doorbell_off(0));
    // Whoever sleeps is not to look.
    assert_eq!(look(), WorkFound::Work);
    world.offer(0, 5);
    assert_eq!((look(), world.used_index(0)), (WorkFound::Nothing, 4));
}

/// What the kernel says of a thread: whether it sleeps, and how often it has been switched
/// to and from.
fn sleeps(thread: i32) -> (bool, Vec<String>) {
    let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap();
    let switches = status.lines().filter(|line| line.contains("ctxt_switches"));
    let switches = switches.map(str::to_owned).collect();
    (status.contains("State:\tS"), switches)
}

/// Runs the worker in a thread that ends with the process; returns its number.
fn run(worker: &Arc<Worker>, poll: Duration) -> i32 {
    let (send, thread) = std::sync::mpsc::channel();
    let worker = Arc::clone(worker);
    std::thread::spawn(move || {
        let number = rustix::thread::gettid().as_raw_nonzero().get();
        send.send(number).unwrap();
        worker.run(poll)
    });
    thread.recv().unwrap()
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn an_idle_worker_sleeps() {
    let world = World::new(SIZE.into());
    world.notes.lock().unwrap().at_once = true;
    let kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let doorbell = kick.try_clone().unwrap();
    world.control(|state, poller| {
        (state.start(0, kick, false, &world.table, None, poller)).unwrap();
    });
    let thread = run(&world.worker, Duration::from_micros(200));
    for count in 1..=20 {
        world.offer(0, count);
        rustix::io::write(&doorbell, &1u64.to_ne_bytes()).unwrap();
        until("completed", || world.used_index(0) == count);
    }
    // Asleep, and not switched to a hundred times in a row.
    let (mut last, mut same) = (sleeps(thread), 0);
    until("idle", || {
        let now = sleeps(thread);
        same = if now.0 && now == last { same + 1 } else { 0 };
        last = now;
        same == 100
    });
}

#[test]
fn whoever_looks_for_long_lets_others_in() {
    let world = World::new(SIZE.into());
    world.offer(0, 1);
    world.start(0).unwrap();
    run(&world.worker, Duration::from_secs(5));
    until("completed", || world.used_index(0) == 1);
    for count in 2..=20 {
        // Nobody rings, but somebody looks.
        world.offer(0, count);
        until("completed", || world.used_index(0) == count);
        world.control(|state, _| assert!(state.ring(0).unwrap().is_running()));
    }
    assert_eq!(world.stop(0), 20);
}

//! A worker with a device that records its calls and keeps requests in flight until it is
//! drained.

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
/// Distance between the rings of two queues.
const STRIDE: u64 = 0x4000;
const FIRST: RingAddresses = RingAddresses {
    descriptors: 0,
    available: 0x1000,
    used: 0x2000,
};

#[derive(Default)]
struct Recording {
    calls: Vec<String>,
    refuse_start: bool,
    /// The device completes requests at once.
    complete_at_once: bool,
}

#[derive(Default)]
struct RecordingDevice {
    recording: Arc<Mutex<Recording>>,
    in_flight: Vec<(usize, u16)>,
    /// The most requests in flight.
    depth: usize,
}

impl RecordingDevice {
    fn record(&self, call: String) {
        self.recording.lock().unwrap().calls.push(call);
    }
}

impl Device for RecordingDevice {
    fn frontend_connected(&mut self, _socket: BorrowedFd<'_>) {
        self.record("frontend_connected".into());
    }

    fn start_queue(&mut self, queue: usize) -> io::Result<()> {
        self.record(format!("start_queue {queue}"));
        match self.recording.lock().unwrap().refuse_start {
            true => Err(io::Error::other("no disk")),
            false => Ok(()),
        }
    }

    fn stop_queue(&mut self, queue: usize) {
        assert!(self.in_flight.iter().all(|&(of, _)| of != queue));
        self.record(format!("stop_queue {queue}"));
    }

    fn process_queue(&mut self, queue: usize, cx: &mut DeviceContext<'_>) {
        let memory = cx.memory;
        let Some(ring) = cx.ring(queue) else { return };
        while self.in_flight.len() < self.depth
            && let Some(chain) = ring.pop(memory)
        {
            self.in_flight.push((queue, chain.head));
        }
        if self.recording.lock().unwrap().complete_at_once {
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
        self.record("frontend_disconnected".into());
    }
}

/// A front end with a driver of two queues, and a worker whose thread does not run.
struct TestWorker {
    worker: Arc<Worker>,
    table: MemoryTable,
    recording: Arc<Mutex<Recording>>,
}

impl TestWorker {
    fn new(depth: usize) -> Self {
        let file: File = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap().into();
        file.set_len(MEMORY).unwrap();
        let region = RegionInfo {
            guest: 0,
            size: MEMORY,
            user: 0,
            offset: 0,
        };
        let device = RecordingDevice {
            depth,
            ..RecordingDevice::default()
        };
        let world = TestWorker {
            recording: Arc::clone(&device.recording),
            table: MemoryTable::new([(region, file)]).unwrap(),
            worker: Arc::new(Worker::new(Box::new(device), &[0, 1], 2, SIZE).unwrap()),
        };
        world.control(|state, poller| state.set_memory(&world.table, poller));
        for queue in 0..2 {
            world
                .control(|state, poller| {
                    state.set_addresses(queue, at(queue), &world.table, poller)?;
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

    /// The driver makes requests 0 to `count` available, which have empty chains.
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

    /// Processes what is pending, as the thread would.
    fn batch(&self) {
        self.control(|state, poller| state.process(&[], poller, false));
    }

    /// Whether the driver is asked not to notify.
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

    /// The calls of the device since the last time.
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.recording.lock().unwrap().calls)
    }
}

fn at(queue: usize) -> RingAddresses {
    let offset = queue as u64 * STRIDE;
    RingAddresses {
        descriptors: FIRST.descriptors + offset,
        available: FIRST.available + offset,
        used: FIRST.used + offset,
    }
}

#[test]
fn a_device_is_told_of_each_start_and_stop_once() {
    let world = TestWorker::new(SIZE.into());
    let socket = memfd_create("socket", MemfdFlags::CLOEXEC).unwrap();
    world.control(|state, _| state.frontend_connected(socket.as_fd()));
    world.start(1).unwrap();
    assert_eq!(world.calls(), ["frontend_connected", "start_queue 1"]);
    // Another doorbell for a running ring is not a start.
    world.start(1).unwrap();
    assert!(world.calls().is_empty());
    world.start(0).unwrap();
    world.stop(1);
    world.stop(1);
    assert_eq!(world.calls(), ["start_queue 0", "stop_queue 1"]);
    world.start(1).unwrap();
    world.control(|state, poller| state.close(poller));
    assert_eq!(
        world.calls(),
        [
            "start_queue 1",
            "stop_queue 0",
            "stop_queue 1",
            "frontend_disconnected"
        ]
    );
}

#[test]
fn a_queue_whose_start_fails_does_not_run() {
    let world = TestWorker::new(SIZE.into());
    world.recording.lock().unwrap().refuse_start = true;
    let error = world.start(1).unwrap_err().to_string();
    assert_eq!(error, "queue 1: starting: no disk");
    assert_eq!(world.calls(), ["start_queue 1"]);
    world.control(|state, _| assert!(state.ring(1).unwrap().is_stopped()));

    // The device is told that the queue stops if a later step fails, and not called if an
    // earlier step does.
    world.recording.lock().unwrap().refuse_start = false;
    let regular = |queue| {
        let file: File = tempfile::tempfile().unwrap();
        world.control(|state, poller| {
            state.start(queue, file.into(), false, &world.table, None, poller)
        })
    };
    let error = regular(0).unwrap_err().to_string();
    assert!(
        error.starts_with("queue 0: polling its doorbell"),
        "{error}"
    );
    assert_eq!(world.calls(), ["start_queue 0", "stop_queue 0"]);
    let nowhere = RingAddresses {
        used: MEMORY,
        ..FIRST
    };
    world
        .control(|state, poller| state.set_addresses(0, nowhere, &world.table, poller))
        .unwrap();
    assert!(world.start(0).is_err());
    world.stop(0);
    assert!(world.calls().is_empty());
}

#[test]
fn requests_in_flight_are_completed_before_their_ring_stops() {
    type StopRing = fn(&TestWorker);
    let cases: [(&str, StopRing); 5] = [
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
        ("front end left", |world| {
            world.control(|state, poller| state.close(poller));
        }),
    ];
    for (how, end) in cases {
        let world = TestWorker::new(SIZE.into());
        world.offer(0, 5);
        world.start(0).unwrap();
        world.batch();
        assert_eq!(world.used_index(0), 0, "{how}");
        end(&world);
        assert_eq!(world.used_index(0), 5, "{how}");
    }
}

#[test]
fn a_broken_ring_completes_nothing_and_can_start_again() {
    let world = TestWorker::new(SIZE.into());
    world.offer(0, 3);
    world.start(0).unwrap();
    world.batch();
    // More requests than the ring has entries.
    world.offer(0, 3 + SIZE + 1);
    world.control(|state, _| state.ring(0).unwrap().notified());
    world.batch();
    world.control(|state, _| {
        assert!(!state.ring(0).unwrap().is_running());
        state.ring(0).unwrap().add_used(0, 0);
    });
    assert_eq!(world.calls(), ["start_queue 0"]);
    assert_eq!(world.used_index(0), 0);

    // Its requests are not completed after the next start, whose driver does not know them.
    world.offer(0, 0);
    world.control(|state, _| state.ring(0).unwrap().set_base(0));
    world.start(0).unwrap();
    assert_eq!(world.calls(), ["stop_queue 0", "start_queue 0"]);
    world.batch();
    assert_eq!(world.used_index(0), 0);
    world.offer(0, 2);
    world.control(|state, _| state.ring(0).unwrap().notified());
    world.batch();
    world.stop(0);
    assert_eq!(world.used_index(0), 2);
    assert_eq!(world.calls(), ["stop_queue 0"]);
}

#[test]
fn a_stop_completes_requests_of_an_earlier_process_in_several_batches() {
    let shape = InflightLayout {
        queues: 2,
        size: SIZE,
    };
    let (file, len) = create(shape, 2, SIZE).unwrap();
    let table = || {
        let file = file.try_clone().unwrap();
        Arc::new(InflightTable::map(shape, file, 0, len, 2, SIZE).unwrap())
    };
    let first = TestWorker::new(6);
    first.offer(0, 6);
    first.start_with(0, Some(&table())).unwrap();
    first.batch();
    // The process dies. The next one handles fewer requests at a time.
    let second = TestWorker {
        table: first.table.clone(),
        ..TestWorker::new(2)
    };
    second.control(|state, poller| state.set_memory(&second.table, poller));
    second.start_with(0, Some(&table())).unwrap();
    assert_eq!(second.stop(0), 6);
    assert_eq!(second.used_index(0), 6);

    // A process that pops none of them leaves them to the next one.
    second.offer(0, 9);
    second.start_with(0, Some(&table())).unwrap();
    second.batch();
    let third = TestWorker {
        table: first.table.clone(),
        ..TestWorker::new(0)
    };
    third.control(|state, poller| state.set_memory(&third.table, poller));
    third.start_with(0, Some(&table())).unwrap();
    assert_eq!(third.stop(0), 8);
    assert_eq!(third.used_index(0), 6);
}

/// A stop pops requests of an earlier process, and the driver breaks the ring meanwhile. When
/// the ring has stopped, and its memory is gone, none of them may be in flight.
#[test]
fn resubmitted_requests_of_a_ring_that_breaks_while_it_stops_are_completed() {
    let shape = InflightLayout {
        queues: 2,
        size: SIZE,
    };
    let (file, len) = create(shape, 2, SIZE).unwrap();
    let table = || {
        let file = file.try_clone().unwrap();
        Arc::new(InflightTable::map(shape, file, 0, len, 2, SIZE).unwrap())
    };
    let first = TestWorker::new(SIZE.into());
    first.offer(0, 2);
    first.start_with(0, Some(&table())).unwrap();
    first.batch();
    let second = TestWorker {
        table: first.table.clone(),
        ..TestWorker::new(SIZE.into())
    };
    second.control(|state, poller| state.set_memory(&second.table, poller));
    second.start_with(0, Some(&table())).unwrap();
    second.offer(0, 2 + SIZE + 1);
    // The device checks in `stop_queue` that nothing is in flight.
    second.stop(0);
    assert_eq!(second.calls(), ["start_queue 0", "stop_queue 0"]);
}

#[test]
fn notifications_stay_disabled_until_the_last_check_before_a_sleep() {
    let world = TestWorker::new(SIZE.into());
    let process = || world.control(|state, poller| state.process(&[], poller, true));
    let enable = || world.control(|state, _| state.enable_notification());
    world.start(0).unwrap();
    assert_eq!(process(), WorkFound::Done);
    assert_eq!(process(), WorkFound::Nothing);
    assert!(world.is_doorbell_off(0));
    world.offer(0, 3);
    assert_eq!(process(), WorkFound::Done);
    assert_eq!(world.used_index(0), 0);
    // The device completes them now.
    assert_eq!(process(), WorkFound::Done);
    assert_eq!((process(), world.used_index(0)), (WorkFound::Nothing, 3));
    assert!(world.is_doorbell_off(0));

    world.offer(0, 4);
    assert!(enable());
    assert!(!world.is_doorbell_off(0));
    assert_eq!(process(), WorkFound::Done);
    assert!(world.is_doorbell_off(0));
    assert!(!enable());
    assert!(!world.is_doorbell_off(0));
    // A worker that sleeps does not see new requests without a notification.
    assert_eq!(process(), WorkFound::Done);
    world.offer(0, 5);
    assert_eq!((process(), world.used_index(0)), (WorkFound::Nothing, 4));
}

/// Whether a thread sleeps, and its numbers of context switches.
fn scheduler_state(thread: i32) -> (bool, Vec<String>) {
    let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap();
    let switches = status.lines().filter(|line| line.contains("ctxt_switches"));
    let switches = switches.map(str::to_owned).collect();
    (status.contains("State:\tS"), switches)
}

/// Runs the worker in a thread that ends with the process; returns the thread's ID.
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

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn an_idle_worker_sleeps() {
    let world = TestWorker::new(SIZE.into());
    world.recording.lock().unwrap().complete_at_once = true;
    let kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let doorbell = kick.try_clone().unwrap();
    world.control(|state, poller| {
        (state.start(0, kick, false, &world.table, None, poller)).unwrap();
    });
    let thread = run(&world.worker, Duration::from_micros(200));
    for count in 1..=20 {
        world.offer(0, count);
        rustix::io::write(&doorbell, &1u64.to_ne_bytes()).unwrap();
        wait_until("completed", || world.used_index(0) == count);
    }
    // A hundred times in a row it is asleep and was not switched to.
    let (mut last, mut same) = (scheduler_state(thread), 0);
    wait_until("idle", || {
        let now = scheduler_state(thread);
        same = if now.0 && now == last { same + 1 } else { 0 };
        last = now;
        same == 100
    });
}

#[test]
fn a_polling_worker_lets_the_main_thread_in() {
    let world = TestWorker::new(SIZE.into());
    world.offer(0, 1);
    world.start(0).unwrap();
    run(&world.worker, Duration::from_secs(5));
    wait_until("completed", || world.used_index(0) == 1);
    for count in 2..=20 {
        // Without a notification.
        world.offer(0, count);
        wait_until("completed", || world.used_index(0) == count);
        world.control(|state, _| assert!(state.ring(0).unwrap().is_running()));
    }
    assert_eq!(world.stop(0), 20);
}

//! device-disk dies at each fault point and at random times, and the next process gets the
//! in-flight table: each request is completed exactly once. The front end is that of crate
//! vhost, not our runner.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use device_vhost_user::fault;
use outrigger_tests::binaries::{binary, helper};
use outrigger_tests::disk::{Request, SECTOR, pattern_of};
use outrigger_tests::guest::{EVENT_IDX, Guest, PROTOCOL_FEATURES, VERSION_1, known};
use outrigger_tests::process::{Launch, Process, readable_within};
use outrigger_tests::queue::{Buffer, DriverQueue};
use outrigger_tests::ram::Ram;
use outrigger_tests::{DEADLINE, wait_until};
use rustix::process::Signal;
use tempfile::TempDir;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{Result, VhostBackend, VringConfigData};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

const QUEUES: usize = 2;
const QUEUE_SIZE: u16 = 64;
/// Sectors of each request.
const LENGTH: usize = 8;
/// Reads use the first half of the image, writes the second.
const HALF: usize = 1 << 20;

/// What outlives a disk process: image, guest, and in-flight table.
struct Survivors {
    directory: TempDir,
    ram: Arc<Ram>,
    queues: Vec<DriverQueue>,
    table: Option<(VhostUserInflight, File)>,
    outstanding: Vec<HashMap<u16, Pending>>,
    /// Offsets of the image that were written to.
    written: usize,
    completed: usize,
}

/// A request that is not completed yet.
struct Pending {
    status: u64,
    data: u64,
    /// Its offset on the disk in bytes.
    offset: usize,
    writes: bool,
}

/// Data that differ for each offset of the disk.
fn data_of(offset: usize) -> Vec<u8> {
    let words = (0..LENGTH * SECTOR / 8).flat_map(|at| ((offset + at) as u64).to_le_bytes());
    words.collect()
}

impl Survivors {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut image = pattern_of(0, HALF);
        image.resize(2 * HALF, 0);
        std::fs::write(directory.path().join("image"), image).unwrap();
        let ram = Arc::new(Ram::new(&[(0, 1 << 20), (1 << 32, 16 << 20)]));
        let queues = (0..QUEUES).map(|_| {
            let mut queue = DriverQueue::new(&ram, QUEUE_SIZE);
            queue.event_idx = true;
            queue
        });
        Survivors {
            directory,
            queues: queues.collect(),
            ram,
            table: None,
            outstanding: (0..QUEUES).map(|_| HashMap::new()).collect(),
            written: 0,
            completed: 0,
        }
    }

    fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// Starts a disk process that dies at the fault point `fault`.
    fn process(&self, fault: Option<&str>) -> Process {
        let program = match fault {
            Some(_) => helper("faulty-disk"),
            None => binary("device-disk"),
        };
        let mut launch = Launch::program(&program);
        if let Some(fault) = fault {
            launch.command().env("OUTRIGGER_FAULT", fault);
        }
        launch
            .args(["--queues=2", "--blk-file"])
            .args([self.image()])
            .listening()
    }

    /// The whole handshake, in the same order as in the runner.
    fn connect(&mut self, process: &Process) -> Result<Frontend> {
        let mut frontend = self.negotiate(process)?;
        if self.table.is_none() {
            let wish = VhostUserInflight::new(0, 0, QUEUES as u16, QUEUE_SIZE);
            self.table = Some(frontend.get_inflight_fd(&wish)?);
        }
        if let Some((shape, file)) = &self.table {
            frontend.set_inflight_fd(shape, file.as_raw_fd())?;
        }
        frontend.set_mem_table(&self.ram.regions())?;
        for index in 0..QUEUES {
            self.start(&mut frontend, index)?;
        }
        Ok(frontend)
    }

    /// The handshake up to SET_FEATURES.
    fn negotiate(&self, process: &Process) -> Result<Frontend> {
        let mut frontend = Frontend::from_stream(process.connect(), QUEUES as u64);
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let protocol = frontend.get_protocol_features()?;
        assert!(protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
        frontend.set_protocol_features(protocol & known())?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(frontend.get_queue_num()?, QUEUES as u64);
        frontend.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60])?;
        let features = VERSION_1 | PROTOCOL_FEATURES | EVENT_IDX | 1 << VIRTIO_BLK_F_FLUSH;
        assert_eq!(offered & features, features);
        frontend.set_features(features)?;
        Ok(frontend)
    }

    fn start(&self, frontend: &mut Frontend, index: usize) -> Result<()> {
        let queue = &self.queues[index];
        frontend.set_vring_num(index, queue.size)?;
        frontend.set_vring_base(index, queue.device_used_index())?;
        let addresses = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: self.ram.user(queue.descriptors),
            used_ring_addr: self.ram.user(queue.used_ring),
            avail_ring_addr: self.ram.user(queue.available),
            log_addr: None,
        };
        frontend.set_vring_addr(index, &addresses)?;
        frontend.set_vring_call(index, &queue.call)?;
        frontend.set_vring_kick(index, &queue.kick)?;
        frontend.set_vring_enable(index, true)
    }

    /// Makes up to `count` requests available in each queue, as many as it has room for.
    fn offer(&mut self, count: usize) {
        for index in 0..QUEUES {
            for _ in 0..count.min(self.queues[index].room() / 3) {
                let number = self.written + self.outstanding[index].len();
                let pending = if number.is_multiple_of(3) {
                    self.read(number)
                } else {
                    self.write()
                };
                let (buffers, pending) = pending;
                let head = self.queues[index].add(&buffers);
                assert!(self.outstanding[index].insert(head, pending).is_none());
            }
            self.queues[index].kick();
        }
    }

    fn request(&self, kind: u32, offset: usize, data: Buffer) -> (Vec<Buffer>, Pending) {
        let request = Request::new(&self.ram, kind, (offset / SECTOR) as u64, &[data]);
        let pending = Pending {
            status: request.status,
            data: data.address,
            offset,
            writes: kind == VIRTIO_BLK_T_OUT,
        };
        (request.buffers, pending)
    }

    fn read(&self, number: usize) -> (Vec<Buffer>, Pending) {
        let offset = number * LENGTH * SECTOR % HALF;
        let len = LENGTH * SECTOR;
        let at = self.ram.alloc(len as u64);
        self.request(VIRTIO_BLK_T_IN, offset, Buffer::writable(at, len as u32))
    }

    fn write(&mut self) -> (Vec<Buffer>, Pending) {
        let offset = HALF + self.written * LENGTH * SECTOR % HALF;
        self.written += 1;
        let data = data_of(offset);
        let at = self.ram.put(&data);
        let data = Buffer::readable(at, data.len() as u32);
        self.request(VIRTIO_BLK_T_OUT, offset, data)
    }

    /// Takes the completed requests and checks them.
    fn reap(&mut self) {
        let image = File::open(self.image()).unwrap();
        for (queue, outstanding) in self.queues.iter_mut().zip(&mut self.outstanding) {
            while let Some(used) = queue.take() {
                let pending = outstanding.remove(&used.head);
                let pending =
                    pending.unwrap_or_else(|| panic!("request {} comes twice", used.head));
                assert_eq!(self.ram.get(pending.status, 1), [0], "its status");
                let mut found = vec![0; LENGTH * SECTOR];
                image
                    .read_exact_at(&mut found, pending.offset as u64)
                    .unwrap();
                let wanted = if pending.writes {
                    data_of(pending.offset)
                } else {
                    let data = self.ram.get(pending.data, LENGTH * SECTOR);
                    assert!(data == found, "what was read at {}", pending.offset);
                    pattern_of(pending.offset, LENGTH * SECTOR)
                };
                assert!(found == wanted, "what is on disk at {}", pending.offset);
                self.completed += 1;
            }
        }
    }

    /// Waits until all requests are completed (true) or the process has died. Checks a ring
    /// only after an interrupt, so that a missing interrupt is noticed.
    fn settle(&mut self, process: &Process) -> bool {
        let start = Instant::now();
        self.arm();
        self.reap();
        loop {
            if self.outstanding.iter().all(HashMap::is_empty) {
                return true;
            }
            let mut interrupted = false;
            for queue in &self.queues {
                if readable_within(&queue.call, Duration::from_millis(1)) {
                    queue.interrupts();
                    interrupted = true;
                }
            }
            if interrupted {
                self.arm();
                self.reap();
            } else if !process.is_running() {
                return false;
            }
            assert!(
                start.elapsed() < DEADLINE,
                "{} and {} requests are lost, or their interrupt",
                self.outstanding[0].len(),
                self.outstanding[1].len()
            );
        }
    }

    fn arm(&self) {
        for queue in &self.queues {
            queue.set_used_event(queue.used_index);
        }
    }

    fn open_files(process: &Process) -> usize {
        std::fs::read_dir(process.proc("fd")).unwrap().count()
    }
}

#[test]
fn each_request_is_completed_once_for_a_death_at_every_fault_point() {
    // These are not sent here, or only while a ring stops.
    let others = [
        "GET_VRING_BASE",
        "SET_VRING_ERR",
        "SET_BACKEND_REQ_FD",
        "SET_CONFIG",
        "GET_MAX_MEM_SLOTS",
        "ADD_MEM_REG",
        "REM_MEM_REG",
    ];
    for point in fault::names().filter(|point| !others.contains(point)) {
        let step = point.chars().all(char::is_lowercase);
        let once_for_each_queue = point.starts_with("SET_VRING");
        let times: &[u32] = match (step, once_for_each_queue) {
            (true, _) if point == "interrupt" => &[1, 2],
            (true, _) => &[1, 2, 9, 30],
            (false, true) => &[1, 2],
            (false, false) => &[1],
        };
        for nth in times {
            let mut world = Survivors::new();
            let fault = format!("{point}:{nth}");
            // With requests in flight in both queues.
            let calm = world.process(None);
            let frontend = world.connect(&calm).unwrap();
            world.offer(4);
            assert!(world.settle(&calm));
            if point == "GET_INFLIGHT_FD" {
                world.table = None; // as after a driver's reset
            }
            drop((frontend, calm));

            world.offer(20);
            let doomed = world.process(Some(&fault));
            if let Ok(_frontend) = world.connect(&doomed) {
                while world.settle(&doomed) {
                    world.offer(5);
                }
            }
            assert_eq!(doomed.wait().code(), Some(fault::STATUS), "{fault}");

            let successor = world.process(None);
            let frontend = world.connect(&successor);
            let _frontend = frontend.unwrap_or_else(|e| panic!("{fault}: {e}"));
            world.offer(3);
            assert!(world.settle(&successor), "{fault}: {}", successor.log());
            assert!(world.completed >= 2 * (4 + 20), "{fault}");
        }
    }
}

#[test]
fn each_request_is_completed_once_for_kills_at_random_times() {
    const KILLS: u32 = 100;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seed = match std::env::var("OUTRIGGER_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => now.unwrap().as_nanos() as u64,
    };
    println!("OUTRIGGER_SEED={seed}");
    let mut random: u64 = seed | 1;
    let mut random = move |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let mut world = Survivors::new();
    let mut replayed = 0;
    for _ in 0..KILLS {
        // Guest memory is allocated and never freed, so this limits it.
        if world.completed > 1200 {
            assert!(world.outstanding.iter().all(HashMap::is_empty));
            world = Survivors::new();
        }
        let doomed = world.process(None);
        let _frontend = world.connect(&doomed).unwrap();
        world.offer(1 + random(20) as usize);
        // Shorter than a sleep, because the requests take microseconds.
        let moment = Duration::from_micros(random(200));
        let start = Instant::now();
        while start.elapsed() < moment {
            std::hint::spin_loop();
        }
        doomed.signal(Signal::KILL);
        doomed.wait();
        let successor = world.process(None);
        let _frontend = world.connect(&successor).unwrap();
        assert!(world.settle(&successor));
        replayed += u32::from(successor.log().contains("were in flight"));
    }
    println!("{replayed} of {KILLS} kills found requests in flight");
}

/// Requests that are in flight when a ring starts are completed before it has stopped, so
/// that a front end may then drop the table.
#[test]
fn a_stop_leaves_nothing_in_flight() {
    for round in 0..20 {
        let mut world = Survivors::new();
        world.offer(20);
        let doomed = world.process(Some("popped:1"));
        let _frontend = world.connect(&doomed);
        assert_eq!(doomed.wait().code(), Some(fault::STATUS));
        let successor = world.process(None);
        let frontend = world.connect(&successor).unwrap();
        std::thread::sleep(Duration::from_micros(20 * round));
        for index in 0..QUEUES {
            let base = frontend.get_vring_base(index).unwrap();
            assert_eq!(base, u32::from(world.queues[index].device_used_index()));
        }
        // The next process gets a new table.
        world.table = None;
        drop(frontend);
        let _frontend = world.connect(&successor).unwrap();
        assert!(world.settle(&successor));
    }
}

#[test]
fn only_a_disk_offers_an_inflight_table() {
    let socket = tempfile::tempdir().unwrap();
    let console = Launch::new("device-console")
        .args(["--unix".into(), socket.path().join("console")])
        .listening();
    let net = Launch::new("device-net").args(["--isolated"]).listening();
    for process in [&console, &net] {
        let mut guest = Guest::boot(process.connect(), EVENT_IDX, 2);
        let offered = guest.frontend.get_protocol_features().unwrap();
        assert!(!offered.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
    }
}

#[test]
fn repeated_requests_for_tables_leak_nothing() {
    let world = Survivors::new();
    let process = world.process(None);
    let mut frontend = world.negotiate(&process).unwrap();
    let wish = VhostUserInflight::new(0, 0, QUEUES as u16, QUEUE_SIZE);
    frontend.get_inflight_fd(&wish).unwrap();
    let (files, memory) = (Survivors::open_files(&process), process.resident());
    for _ in 0..10_000 {
        let (shape, file) = frontend.get_inflight_fd(&wish).unwrap();
        assert_eq!((shape.num_queues, shape.queue_size), (2, QUEUE_SIZE));
        assert!(file.metadata().unwrap().len() >= shape.mmap_size);
    }
    // SET_INFLIGHT_FD replaces the table.
    for _ in 0..1000 {
        let (shape, file) = frontend.get_inflight_fd(&wish).unwrap();
        frontend.set_inflight_fd(&shape, file.as_raw_fd()).unwrap();
    }
    // Answered after all of that is done.
    frontend.get_features().unwrap();
    // The current table may stay open.
    assert!(Survivors::open_files(&process) <= files + 1);
    assert!(process.resident() < memory + (8 << 20));
}

/// Waits until the log contains `what` so many times, and checks that it is no more. (A line
/// may be written after the reply that it belongs to.)
fn assert_logged(process: &Process, what: &str, times: usize) {
    let count = || process.log().matches(what).count();
    wait_until(what, || count() >= times);
    assert_eq!(count(), times, "{}", process.log());
}

#[test]
fn tables_of_the_wrong_size_are_refused() {
    let mut world = Survivors::new();
    let process = world.process(None);
    let mut frontend = world.negotiate(&process).unwrap();
    let wish = VhostUserInflight::new(0, 0, QUEUES as u16, QUEUE_SIZE);
    let (good, file) = frontend.get_inflight_fd(&wish).unwrap();
    let wrong = |change: &dyn Fn(&mut VhostUserInflight)| {
        let mut shape = good;
        change(&mut shape);
        shape
    };
    let wrong = [
        wrong(&|it| it.queue_size = 2048),
        wrong(&|it| it.queue_size = 65),
        wrong(&|it| it.num_queues = 3),
        wrong(&|it| it.num_queues = u16::MAX),
        wrong(&|it| it.mmap_size = 2 * 1088 - 1),
        wrong(&|it| it.mmap_size += 1),
        wrong(&|it| it.mmap_size = u64::MAX),
        wrong(&|it| it.mmap_offset = 4096),
        wrong(&|it| it.mmap_offset = u64::MAX),
    ];
    for shape in &wrong {
        let refused = frontend.set_inflight_fd(shape, file.as_raw_fd());
        assert!(refused.is_err());
    }
    let other = tempfile::tempfile().unwrap();
    other.set_len(good.mmap_size - 1).unwrap();
    assert!(frontend.set_inflight_fd(&good, other.as_raw_fd()).is_err());
    assert_logged(&process, "inflight table: ", 10);

    // A table that is too small for a ring is refused when the ring starts. (Tables that
    // the process makes have room for every ring.)
    let small = VhostUserInflight::new(2 * 576, 0, QUEUES as u16, QUEUE_SIZE / 2);
    frontend.set_inflight_fd(&small, other.as_raw_fd()).unwrap();
    frontend.set_mem_table(&world.ram.regions()).unwrap();
    assert!(world.start(&mut frontend, 1).is_err());
    let why = "inflight table: queue 1: 32 entries are too few for a ring of 64";
    assert_logged(&process, why, 1);
    drop(frontend);

    // The process still works.
    world.offer(5);
    let _frontend = world.connect(&process).unwrap();
    assert!(world.settle(&process));
}

#[test]
fn an_invalid_table_stops_only_its_queue() {
    let mut world = Survivors::new();
    let process = world.process(None);
    let frontend = world.connect(&process).unwrap();
    world.offer(5);
    assert!(world.settle(&process));
    drop(frontend);

    let (shape, file) = world.table.take().unwrap();
    let region = shape.mmap_size as usize / QUEUES;
    let mut garbage: Vec<u8> = (0..shape.mmap_size).map(|at| (at * 7) as u8 | 1).collect();
    for queue in 0..QUEUES {
        garbage[queue * region + 8..][..2].copy_from_slice(&1u16.to_ne_bytes());
    }
    file.write_all_at(&garbage, 0).unwrap();
    world.table = Some((shape, file));
    let frontend = world.connect(&process).unwrap();
    for queue in 0..QUEUES {
        assert_logged(
            &process,
            &format!("queue={queue} error=inflight table: "),
            1,
        );
    }
    // It still answers, and serves the next front end.
    frontend.get_features().unwrap();
    drop(frontend);
    world.table = None;
    world.offer(5);
    let _frontend = world.connect(&process).unwrap();
    assert!(world.settle(&process));
    assert_eq!(world.completed, 4 * 5);
}

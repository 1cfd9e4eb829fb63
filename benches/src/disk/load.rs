//! A front end that keeps a disk busy: crate virtio-driver's, with a thread for each queue that
//! sleeps until the device's interrupt.

use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use outrigger_tests::driver::{Driver, Queue};
use outrigger_tests::process::Process;

use super::cases::{Case, IMAGE};

/// Duration of a measurement, and of the warm-up before it.
pub const TIME: Duration = Duration::from_millis(500);
const BEFORE: Duration = Duration::from_millis(100);

/// Figures of one measurement, or the medians of several.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// Requests a second.
    pub iops: f64,
    /// Bytes a second.
    pub bytes: f64,
    /// From the request to its completion, in microseconds: half of them are faster.
    pub p50: f64,
    /// 99 of 100 are.
    pub p99: f64,
    /// Processor seconds that the back end spent on a million requests.
    pub cpu: f64,
    /// Its resident memory in bytes, with what it has touched of the guest's; `None` where
    /// there is no back end.
    pub resident: Option<f64>,
    /// The threads of the back end.
    pub back: Busy,
    /// The threads of the front end; zeros where there is none.
    pub front: Busy,
}

/// What a group of threads did, as shares of the elapsed time; 1 is one whole thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct Busy {
    /// Share of time in which they ran.
    pub ran: f64,
    /// Share of time in which they waited for a processor.
    pub waited: f64,
}

impl Busy {
    /// From seconds `before` to `after`, in a time of `seconds`.
    fn between(before: Busy, after: Busy, seconds: f64) -> Self {
        Busy {
            ran: (after.ran - before.ran) / seconds,
            waited: (after.waited - before.waited) / seconds,
        }
    }
}

/// What the thread of one queue did.
struct Work {
    times: Vec<u32>,
    busy: Busy,
}

/// Runs `case` on the disk that `process` serves.
pub fn measure(process: &Process, case: &Case) -> Figures {
    let socket = process.directory().join("socket");
    let block = case.pattern.block();
    let mut driver = Driver::connect(&socket, case.queues, case.depth, block);
    assert_eq!(driver.capacity(), IMAGE);
    // All have come up before the time begins, and it ends when all have ended.
    let (begin, end) = (Barrier::new(case.queues + 1), Barrier::new(case.queues + 1));
    let mut before = (Instant::now(), Busy::default());
    let mut after = before;
    let works: Vec<Work> = std::thread::scope(|scope| {
        let threads: Vec<_> = driver
            .queues
            .iter_mut()
            .enumerate()
            .map(|(number, queue)| {
                let (begin, end) = (&begin, &end);
                scope.spawn(move || {
                    let mut places = Places::new(case, number);
                    keep_busy(queue, case, &mut places, BEFORE);
                    begin.wait();
                    let (start, before) = (Instant::now(), of_thread("/proc/thread-self"));
                    let times = keep_busy(queue, case, &mut places, TIME);
                    let seconds = start.elapsed().as_secs_f64();
                    let busy = Busy::between(before, of_thread("/proc/thread-self"), seconds);
                    end.wait();
                    Work { times, busy }
                })
            })
            .collect();
        begin.wait();
        before = (Instant::now(), of_process(process));
        end.wait();
        after = (Instant::now(), of_process(process));
        threads
            .into_iter()
            .map(|it| it.join().expect("no request failed"))
            .collect()
    });
    let seconds = (after.0 - before.0).as_secs_f64();
    let back = Busy::between(before.1, after.1, seconds);
    let front = works.iter().fold(Busy::default(), |sum, work| Busy {
        ran: sum.ran + work.busy.ran,
        waited: sum.waited + work.busy.waited,
    });
    let mut times: Vec<u32> = works.into_iter().flat_map(|work| work.times).collect();
    times.sort_unstable();
    let at = |part: f64| f64::from(times[(times.len() as f64 * part) as usize]) / 1e3;
    let count = times.len() as f64;
    Figures {
        iops: count / seconds,
        bytes: count * block as f64 / seconds,
        p50: at(0.5),
        p99: at(0.99),
        cpu: back.ran * seconds / count * 1e6,
        resident: Some(process.resident() as f64),
        back,
        front,
    }
}

/// Offsets of the requests.
struct Places {
    random: u64,
    next: u64,
    block: u64,
    first: u64,
    blocks: u64,
    sequential: bool,
    reads: u64,
}

impl Places {
    /// For one of the queues; in sequence, each has a part of the disk of its own.
    fn new(case: &Case, queue: usize) -> Self {
        let block = case.pattern.block() as u64;
        let (all, queues) = (IMAGE / block, case.queues as u64);
        let (first, blocks) = match case.pattern.is_sequential() {
            true => (all / queues * queue as u64, all / queues),
            false => (0, all),
        };
        Places {
            random: 0x2545_f491_4f6c_dd1d ^ (queue as u64) << 17,
            next: 0,
            block,
            first,
            blocks,
            sequential: case.pattern.is_sequential(),
            reads: case.pattern.reads(),
        }
    }

    /// xorshift64
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// An offset in bytes, and whether to read there.
    fn next(&mut self) -> (u64, bool) {
        let random = self.random();
        let place = match self.sequential {
            true => self.next % self.blocks,
            false => random % self.blocks,
        };
        self.next += 1;
        let offset = (self.first + place) * self.block;
        // Other bits than those that say where.
        (offset, (random >> 40) % 10 < self.reads)
    }
}

/// Keeps `case.depth` requests in flight for `time`; returns their latencies in nanoseconds.
fn keep_busy(queue: &mut Queue, case: &Case, places: &mut Places, time: Duration) -> Vec<u32> {
    let start = Instant::now();
    let mut begun = vec![start; case.depth];
    let mut times = Vec::with_capacity(1 << 19);
    let mut offer = |queue: &mut Queue, buffer| match places.next() {
        (offset, true) => queue.read(buffer, offset),
        (offset, false) => queue.write(buffer, offset),
    };
    for buffer in 0..case.depth {
        offer(queue, buffer);
    }
    queue.kick();
    let mut busy = case.depth;
    while busy > 0 {
        let done = queue.wait();
        let now = Instant::now();
        let again = now - start < time;
        for (buffer, result) in done {
            assert_eq!(result, 0);
            let took = (now - begun[buffer]).as_nanos();
            times.push(u32::try_from(took).unwrap_or(u32::MAX));
            if again {
                begun[buffer] = now;
                offer(queue, buffer);
            } else {
                busy -= 1;
            }
        }
        queue.kick();
    }
    times
}

/// Seconds that a thread has run and waited, from Linux's account of nanoseconds
/// (Documentation/scheduler/sched-stats.rst).
fn of_thread(directory: impl AsRef<Path>) -> Busy {
    // One that has ended meanwhile has none.
    let text = std::fs::read_to_string(directory.as_ref().join("schedstat")).unwrap_or_default();
    let mut seconds = text.split(' ').map(|it| it.parse().unwrap_or(0.0) / 1e9);
    Busy {
        ran: seconds.next().unwrap_or(0.0),
        waited: seconds.next().unwrap_or(0.0),
    }
}

/// The same of all threads of a process. The time that it has run includes threads that have
/// ended. (clock_getcpuclockid(3) gives the number of a process's clock.)
fn of_process(process: &Process) -> Busy {
    const CPUCLOCK_SCHED: i32 = 2;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let clock = (!(process.pid() as i32)) << 3 | CPUCLOCK_SCHED;
    // SAFETY: `time` is there to be written to.
    let result = unsafe { libc::clock_gettime(clock, &mut time) };
    assert_eq!(result, 0, "a process that runs has a clock");
    let tasks = std::fs::read_dir(process.proc("task")).expect("it runs");
    let waited = tasks.flatten().map(|task| of_thread(task.path()).waited);
    Busy {
        ran: time.tv_sec as f64 + time.tv_nsec as f64 / 1e9,
        waited: waited.sum(),
    }
}

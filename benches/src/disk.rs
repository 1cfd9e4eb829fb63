//! A disk process and its front end, without a machine: 4 KiB random reads of an image
//! on tmpfs, ours beside qemu-storage-daemon's.

use std::path::Path;
use std::time::{Duration, Instant};

use outrigger_tests::driver::{Driver, Queue};
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::wait_until;

use crate::median;

const ROUNDS: usize = 7;
const IMAGE: u64 = 256 << 20;
const BLOCK: usize = 4096;
/// How long each measurement reads.
const TIME: Duration = Duration::from_millis(1000);

/// Figures of one round, or the medians of several.
#[derive(Clone, Copy)]
struct Figures {
    /// Requests a second.
    iops: f64,
    /// From doorbell to completion, in microseconds: half, and 99 of 100, are faster.
    p50: f64,
    p99: f64,
    /// Processor seconds that the back end spent on a million requests.
    cpu: f64,
}

pub fn run() {
    let directory = tempfile::tempdir_in("/dev/shm").expect("tmpfs at /dev/shm");
    let image = directory.path().join("image");
    fill(&image);
    println!("                              IOPS    p50 µs    p99 µs   CPU s per million");
    for depth in [1, 32] {
        let mut rounds: [Vec<Figures>; 3] = Default::default();
        // In turns, so that all see the same noise.
        for _ in 0..ROUNDS {
            for (peer, rounds) in rounds.iter_mut().enumerate() {
                rounds.push(match peer {
                    0 => measure(&ours(&image), depth),
                    1 => measure(&daemon(&image, "threads"), depth),
                    _ => measure(&daemon(&image, "io_uring"), depth),
                });
            }
        }
        let names = ["device-disk", "qsd, threads", "qsd, io_uring"];
        let all = rounds.map(|rounds| medians(&rounds));
        for (name, figures) in names.iter().zip(&all) {
            let Figures {
                iops,
                p50,
                p99,
                cpu,
            } = figures;
            println!("depth {depth:2}  {name:14} {iops:>9.0} {p50:>9.1} {p99:>9.1} {cpu:>9.2}");
        }
        // Beside the better of its two engines.
        let best = all[1].iops.max(all[2].iops);
        let reach = if depth == 32 {
            "    (reach: at least 1)"
        } else {
            ""
        };
        println!(
            "depth {depth:2}  ratio of IOPS  {:>9.2}{reach}",
            all[0].iops / best
        );
    }
}

fn fill(image: &Path) {
    let bytes: Vec<u8> = (0..BLOCK as u32).map(|i| i as u8).collect();
    let all = bytes.repeat(IMAGE as usize / BLOCK);
    std::fs::write(image, all).expect("room on tmpfs");
}

fn ours(image: &Path) -> Process {
    Launch::new("device-disk")
        .args([
            "--read-only".as_ref(),
            "--blk-file".as_ref(),
            image.as_os_str(),
        ])
        .listening()
}

/// qemu-storage-daemon with one of its engines; read-only as ours.
fn daemon(image: &Path, engine: &str) -> Process {
    let launch = Launch::program(Path::new("qemu-storage-daemon"));
    let socket = launch.directory().join("socket");
    let (image, path) = (image.display(), socket.display());
    let blockdev = format!("driver=file,node-name=disk,filename={image},aio={engine},read-only=on");
    let export =
        format!("type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={path}");
    let process = launch
        .args(["--blockdev", &blockdev, "--export", &export])
        .spawn();
    wait_until("qemu-storage-daemon listens", || {
        assert!(process.is_running(), "{}", process.log());
        socket.exists()
    });
    process
}

fn measure(process: &Process, depth: usize) -> Figures {
    let socket = process.directory().join("socket");
    let mut driver = Driver::connect(&socket, 1, depth, BLOCK);
    assert_eq!(driver.capacity(), IMAGE);
    let queue = &mut driver.queues[0];
    // Until everything that comes up at first use is up.
    read(queue, depth, TIME / 10);
    let before = process.ticks();
    let start = Instant::now();
    let mut times = read(queue, depth, TIME);
    let seconds = start.elapsed().as_secs_f64();
    let ticks = process.ticks() - before;
    times.sort_unstable();
    let at = |part: f64| times[(times.len() as f64 * part) as usize].as_secs_f64() * 1e6;
    // SAFETY: only asks.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    Figures {
        iops: times.len() as f64 / seconds,
        p50: at(0.5),
        p99: at(0.99),
        cpu: ticks as f64 / per_second / times.len() as f64 * 1e6,
    }
}

/// Keeps `depth` random reads going for `time`; returns how long each took.
fn read(queue: &mut Queue, depth: usize, time: Duration) -> Vec<Duration> {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % (IMAGE / BLOCK as u64) * BLOCK as u64
    };
    let start = Instant::now();
    let mut begun = vec![start; depth];
    let mut times = Vec::with_capacity(1 << 20);
    for buffer in 0..depth {
        queue.read(buffer, next());
    }
    queue.kick();
    let mut busy = depth;
    while busy > 0 {
        let done = queue.wait();
        let now = Instant::now();
        let again = now - start < time;
        for (buffer, result) in done {
            assert_eq!(result, 0);
            times.push(now - begun[buffer]);
            if again {
                begun[buffer] = now;
                queue.read(buffer, next());
            } else {
                busy -= 1;
            }
        }
        queue.kick();
    }
    times
}

fn medians(rounds: &[Figures]) -> Figures {
    let of = |get: fn(&Figures) -> f64| median(&mut rounds.iter().map(get).collect::<Vec<_>>());
    Figures {
        iops: of(|f| f.iops),
        p50: of(|f| f.p50),
        p99: of(|f| f.p99),
        cpu: of(|f| f.cpu),
    }
}

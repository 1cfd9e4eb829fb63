//! A disk process that is killed and restarted at the same socket path.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::binaries::{binary, helper, peer};
use crate::process::{Launch, Process};
use crate::wait_until;

/// Lifetime of a process, for the longest run.
pub const LIFETIME: Duration = Duration::from_secs(3600);

/// Starts the program.
type Start = Box<dyn Fn(&Path) -> Launch>;

/// The process, alive or not, and the path of its socket.
pub struct Victim {
    directory: TempDir,
    start: Start,
    process: Option<Process>,
    /// How often it was killed.
    pub kills: u64,
    /// The program reports when it listens.
    announces: bool,
}

impl Victim {
    /// device-disk with the raw image `image` and `queues` queues.
    pub fn device_disk(image: &Path, queues: u16) -> Self {
        Self::device_disk_with(image, queues, &[])
    }

    /// device-disk with further options.
    pub fn device_disk_with(image: &Path, queues: u16, options: &[&str]) -> Self {
        Self::ours(&binary("device-disk"), image, queues, options)
    }

    /// device-disk that exits at a point given by [`Victim::start_at`].
    pub fn faulty_disk(image: &Path, queues: u16, options: &[&str]) -> Self {
        Self::ours(&helper("faulty-disk"), image, queues, options)
    }

    fn ours(program: &Path, image: &Path, queues: u16, options: &[&str]) -> Self {
        let (program, image) = (program.to_owned(), image.to_owned());
        let options: Vec<String> = options.iter().map(|&it| it.to_owned()).collect();
        Self::new(true, move |socket| {
            Launch::program(&program)
                .args(["--log-level", "warn", "--lock", "off"])
                .args(["--queues", &queues.to_string()])
                .args(&options)
                .args(["--blk-file".as_ref(), image.as_os_str()])
                .args(["--socket-path".as_ref(), socket.as_os_str()])
        })
    }

    /// qemu-storage-daemon with `image`, which it does not lock.
    pub fn storage_daemon(image: &Path, queues: u16) -> Self {
        let image = image.to_owned();
        Self::new(false, move |socket| {
            let file = format!(
                "driver=file,node-name=image,locking=off,filename={}",
                image.display()
            );
            let export = format!(
                "type=vhost-user-blk,id=export,node-name=image,writable=on,num-queues={queues},\
                 addr.type=unix,addr.path={}",
                socket.display()
            );
            Launch::program(Path::new("qemu-storage-daemon")).args([
                "--blockdev",
                &file,
                "--export",
                &export,
            ])
        })
    }

    /// QEMU's vhost-user-blk (in OUTRIGGER_PEERS) with `image`: one queue.
    pub fn vhost_user_blk(image: &Path) -> Self {
        let image = image.to_owned();
        Self::new(false, move |socket| {
            peer("vhost-user-blk")
                .args(["-b".as_ref(), image.as_os_str()])
                .args(["-s".as_ref(), socket.as_os_str()])
        })
    }

    /// A program that `start` starts, listening on the given path. `announces`: it has
    /// `--ready-fd`.
    pub fn new(announces: bool, start: impl Fn(&Path) -> Launch + 'static) -> Self {
        let mut victim = Victim {
            directory: tempfile::tempdir().unwrap(),
            start: Box::new(start),
            process: None,
            kills: 0,
            announces,
        };
        victim.start();
        victim
    }

    /// The path of its socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// The process.
    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("it was started")
    }

    /// The runner's option for it, as `disk0`.
    pub fn device(&self) -> [String; 2] {
        let option = format!("disk0,type=block,socket={}", self.socket().display());
        ["--device".to_owned(), option]
    }

    /// Starts it and waits until it listens.
    pub fn start(&mut self) {
        let launch = self.launch();
        if self.announces {
            self.process = Some(launch.ready());
            return;
        }
        let socket = self.socket();
        // An existing socket is the one that the previous process left.
        let _ = std::fs::remove_file(&socket);
        let process = launch.spawn();
        wait_until("the socket is there", || {
            assert!(process.is_running(), "{}", process.log());
            socket.exists()
        });
        self.process = Some(process);
    }

    /// Starts it so that it exits at `point`, a fault point of faulty-disk.
    pub fn start_at(&mut self, point: &str) {
        let mut launch = self.launch();
        launch.command().env("OUTRIGGER_FAULT", point);
        self.process = Some(launch.ready());
    }

    fn launch(&self) -> Launch {
        (self.start)(&self.socket()).lifetime(LIFETIME)
    }

    /// Its exit status if it exits within `time`.
    pub fn ends_within(&mut self, time: Duration) -> Option<ExitStatus> {
        let start = Instant::now();
        while self.process().is_running() {
            if start.elapsed() > time {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Some(self.process().wait())
    }

    /// Kills it unless it is dead already; returns when it is gone.
    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            // This call reaps a process that has ended.
            if process.is_running() {
                process.signal(Signal::KILL);
                process.wait();
            }
            self.kills += 1;
        }
    }
}

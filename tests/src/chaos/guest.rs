//! A machine whose guest runs `disk-chaos`, and its image.

use std::cell::RefCell;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use outrigger_protocol::control::{DeviceState, MachineEvent};

use super::block::STOP;
use super::victim::LIFETIME;
use super::{Image, Random, Report};
use crate::images::{check_format, convert, place_of};
use crate::machine::{Machine, Running};

/// Bytes of its image; the guest uses the first blocks and the last.
pub const IMAGE: u64 = 16 << 20;
/// Blocks that it writes.
const BLOCKS: u64 = 512;
/// The guest prints this when it starts to work.
pub const READY: &str = "disk-chaos: ready";
/// Deadline for each step of the guest.
const PATIENCE: Duration = Duration::from_secs(120);

/// A machine that is not started yet, with an empty image.
pub struct Prepared {
    directory: tempfile::TempDir,
    /// The guest's seed.
    seed: u64,
    format: &'static str,
    /// Offset in the image at which the guest is told to stop.
    control: u64,
}

impl Prepared {
    /// With a seed that `random` chooses.
    pub fn new(random: &mut Random) -> Self {
        Self::formatted(random, "raw")
    }

    /// The same with an image in a format of qemu-img, almost without allocated clusters.
    pub fn formatted(random: &mut Random, format: &'static str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut prepared = Prepared {
            directory,
            seed: random.below(1 << 32),
            format,
            control: 0,
        };
        let raw = match format {
            "raw" => prepared.image(),
            _ => prepared.raw(),
        };
        let file = std::fs::File::create(&raw).unwrap();
        file.set_len(IMAGE).unwrap();
        // So that it is allocated from the start.
        let image = prepared.open_raw(&raw);
        image.mark();
        prepared.control = image.control();
        if format != "raw" {
            convert(("raw", &raw), (format, &prepared.image()));
        }
        prepared
    }

    /// A raw copy of an image in another format.
    fn raw(&self) -> PathBuf {
        self.directory.path().join("raw")
    }

    fn open_raw(&self, path: &Path) -> Image {
        Image::open(path, BLOCKS, self.seed).unwrap()
    }

    /// The image's path.
    pub fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// The raw image, to control its guest and to check it.
    pub fn open(&self) -> Image {
        self.open_raw(&self.image())
    }

    /// The guest's command line, with these options.
    pub fn cmdline(&self, words: &str) -> String {
        let seed = self.seed;
        format!("job=disk-chaos count=0 blocks={BLOCKS} seed={seed} {words}")
    }

    /// Boots a guest with these options on its command line and these options of the runner;
    /// waits until it works.
    pub fn start(self, words: &str, options: &[String]) -> Chaos {
        let cmdline = self.cmdline(words);
        let machine = Machine::embedded(&cmdline)
            .lifetime(LIFETIME)
            .args(["--memory", "64M", "--log-level", "warn"])
            .args(options)
            .start();
        let mut chaos = Chaos {
            image: self.image(),
            prepared: self,
            machine,
            begun: 0,
            events: RefCell::default(),
        };
        chaos.wait("the guest is ready", |chaos| {
            chaos.machine.serial().contains(READY)
        });
        chaos.begun = super::cycles();
        chaos
    }
}

/// Events that were read so far.
#[derive(Default)]
struct Events {
    read: u64,
    seen: Vec<MachineEvent>,
}

/// The machine at work.
pub struct Chaos {
    /// Current path of its image.
    pub image: PathBuf,
    /// The machine.
    pub machine: Running,
    /// TSC when the guest began to work, a few milliseconds late.
    pub begun: u64,
    events: RefCell<Events>,
    prepared: Prepared,
}

impl Chaos {
    /// Waits until `condition` holds, while the machine must run.
    ///
    /// # Panics
    /// It does not hold in time, or the machine ends.
    pub fn wait(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        loop {
            let running = self.machine.runner.is_running();
            if condition(self) {
                return;
            }
            assert!(
                running && start.elapsed() < PATIENCE,
                "still not: {what}\n{}",
                self.situation()
            );
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// Number of events of a kind so far.
    pub fn count(&self, wanted: impl Fn(&MachineEvent) -> bool) -> usize {
        self.read_events();
        let events = self.events.borrow();
        events.seen.iter().filter(|event| wanted(event)).count()
    }

    /// Sends a command to the runner's control socket, which must succeed.
    ///
    /// # Panics
    /// It fails.
    pub fn order(&self, command: &str) {
        let reply = self.machine.control(command);
        assert!(reply.ok, "{command}: {reply:?}\n{}", self.situation());
    }

    /// Sends a command that the runner refuses; returns the error.
    pub fn refused(&self, command: &str) -> String {
        let reply = self.machine.control(command);
        assert!(!reply.ok, "{command}\n{}", self.situation());
        reply.error.unwrap()
    }

    /// Swaps the disk to the process at `socket`; returns the outage.
    ///
    /// # Errors
    /// Why the old process goes on.
    pub fn swap(&self, socket: &Path) -> Result<Duration, String> {
        let line = format!(
            r#"{{"command":"swap","id":"disk0","socket":"{}"}}"#,
            socket.display()
        );
        let reply = self.machine.control_line(&line);
        match (reply.ok, reply.outage_us, reply.error) {
            (true, Some(outage), None) => Ok(Duration::from_micros(outage)),
            (false, None, Some(error)) => Err(error),
            other => panic!("{other:?}\n{}", self.situation()),
        }
    }

    /// The state of the disk.
    pub fn state(&self) -> DeviceState {
        self.machine.control("status").status.unwrap().devices[0].state
    }

    /// How often the disk was reconnected.
    pub fn returns(&self) -> usize {
        self.count(|event| matches!(event, MachineEvent::DeviceRunning { .. }))
    }

    /// All events of the machine so far.
    pub fn events(&self) -> Vec<MachineEvent> {
        self.read_events();
        self.events.borrow().seen.clone()
    }

    fn read_events(&self) {
        let mut events = self.events.borrow_mut();
        let path = self.machine.directory().join("events");
        let Ok(mut file) = std::fs::File::open(path) else {
            return;
        };
        let mut text = String::new();
        file.seek(SeekFrom::Start(events.read)).unwrap();
        file.read_to_string(&mut text).unwrap();
        // The last line may be incomplete.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        events.read += whole as u64;
        for line in text[..whole].lines() {
            events.seen.push(serde_json::from_str(line).unwrap());
        }
    }

    /// Copies the image to `path` in `format`, which the guest uses from the next swap on. The
    /// machine must be paused meanwhile.
    pub fn copy_to(&mut self, format: &'static str, path: &Path) {
        convert((self.prepared.format, &self.image), (format, path));
        self.prepared.format = format;
        self.image = path.to_owned();
    }

    /// Tells the guest to end.
    fn stop(&self) {
        let Prepared {
            format, control, ..
        } = self.prepared;
        if format == "raw" {
            return self.prepared.open_raw(&self.image).stop();
        }
        let at = place_of(format, &self.image, control);
        let file = std::fs::File::options().write(true).open(&self.image);
        let word = STOP.to_le_bytes();
        file.unwrap().write_all_at(&word, at).unwrap();
    }

    /// Tells the guest to end, waits for it, and checks the image.
    ///
    /// # Panics
    /// Anything is wrong.
    pub fn finish(self) -> Report {
        self.stop();
        let start = Instant::now();
        while self.machine.runner.is_running() && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(
            !self.machine.runner.is_running(),
            "the guest does not come to its end\n{}",
            self.situation()
        );
        assert_eq!(self.machine.wait(), 0, "{}", self.situation());
        assert!(self.machine.serial().contains("guest: pass"));
        let Prepared { format, .. } = self.prepared;
        let mut raw = self.image.clone();
        if format != "raw" {
            check_format(format, &self.image);
            raw = self.prepared.raw();
            convert((format, &self.image), ("raw", &raw));
        }
        match self.prepared.open_raw(&raw).check() {
            Ok(report) => report,
            Err(fault) => panic!("{fault}\n{}", self.situation()),
        }
    }

    /// Logs and events, for the message of a failed test.
    pub fn situation(&self) -> String {
        let events = self.events();
        let last = &events[events.len().saturating_sub(12)..];
        format!(
            "serial: {}\nrunner: {}\nlast events: {last:#?}",
            self.machine.serial(),
            self.machine.runner.log()
        )
    }
}

impl Report {
    /// A one-line summary.
    pub fn summary(&self) -> String {
        let ms = self.cycles as f64 / super::cycles_per_ms();
        let done = self.writes + self.reads + self.flushes;
        format!(
            "{} queues x {}: {} writes, {} reads, {} flushes in {:.1} s ({:.0}/s), \
             longest gap {:.1} ms",
            self.queues,
            self.depth,
            self.writes,
            self.reads,
            self.flushes,
            ms / 1e3,
            done as f64 / ms * 1e3,
            self.longest as f64 / super::cycles_per_ms()
        )
    }
}

//! The host side of the embedded guest's job `disk-chaos`. It checks the image against the
//! report on the disk, in which the guest recorded what was acknowledged.

// The format is defined once, in the guest's sources.
#[path = "../../../embedded-guest/src/logic/block.rs"]
pub mod block;
pub mod guest;
#[path = "../../../embedded-guest/src/logic/ledger.rs"]
pub mod ledger;
pub mod victim;

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use block::{Flaw, Label, Layout, REPORT, REPORT_WORDS, SIZE};
use ledger::{Ledger, Wrong};

/// The guest's summary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Writes that were acknowledged.
    pub writes: u64,
    /// Reads that were acknowledged and right.
    pub reads: u64,
    /// Flushes that were acknowledged.
    pub flushes: u64,
    /// How often the driver reset the device.
    pub rebinds: u64,
    /// Queues in use.
    pub queues: u64,
    /// Requests in flight in each queue.
    pub depth: u64,
    /// How long it worked, in TSC cycles.
    pub cycles: u64,
    /// The longest time between two completions, in TSC cycles.
    pub longest: u64,
    /// All gaps above the guest's limit, as far as there was room.
    pub gaps: Vec<Gap>,
}

/// A time without a completion, in TSC cycles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// When it ended, from the start of the guest's work.
    pub end: u64,
    /// How long it was.
    pub length: u64,
}

/// Why an image contradicts the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The image is not one of such a guest.
    TooSmall,
    /// A block of the report is missing or damaged.
    Report(u64, Flaw),
    /// Blocks of data are wrong, each for its own reason.
    Data(Vec<(u64, Wrong)>),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::TooSmall => write!(f, "the image is too small"),
            Fault::Report(block, flaw) => write!(f, "report, block {block}: {flaw}"),
            Fault::Data(wrong) => {
                write!(f, "{} blocks are wrong:", wrong.len())?;
                wrong
                    .iter()
                    .take(10)
                    .try_for_each(|(block, wrong)| write!(f, " block {block}: {wrong};"))
            }
        }
    }
}

/// An image that a guest uses or has used.
pub struct Image {
    file: File,
    layout: Layout,
    seed: u64,
}

impl Image {
    /// Opens `path`, on which a guest with this seed uses `blocks` blocks.
    ///
    /// # Errors
    /// It is too small for that.
    pub fn open(path: &Path, blocks: u64, seed: u64) -> Result<Self, Fault> {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let capacity = file.metadata().unwrap().len();
        let layout = Layout::new(capacity, blocks).ok_or(Fault::TooSmall)?;
        Ok(Image { file, layout, seed })
    }

    /// Offset of the control block in bytes.
    pub fn control(&self) -> u64 {
        self.layout.control * SIZE as u64
    }

    /// Writes to the control block, so that it is allocated.
    pub fn mark(&self) {
        let last = self.control() + SIZE as u64 - 1;
        self.file.write_all_at(&[1], last).unwrap();
    }

    /// Tells the guest of a raw image to end.
    pub fn stop(&self) {
        let word = block::STOP.to_le_bytes();
        self.file.write_all_at(&word, self.control()).unwrap();
    }

    /// Current content of block `block`.
    pub fn read(&self, block: u64) -> [u8; SIZE] {
        let mut data = [0; SIZE];
        let at = block * SIZE as u64;
        self.file.read_exact_at(&mut data, at).unwrap();
        data
    }

    /// Overwrites block `block`.
    pub fn write(&self, block: u64, data: &[u8; SIZE]) {
        let at = block * SIZE as u64;
        self.file.write_all_at(data, at).unwrap();
    }

    /// Checks every block against the guest's report.
    ///
    /// # Errors
    /// Lists the blocks that contradict it.
    pub fn check(&self) -> Result<Report, Fault> {
        let layout = self.layout;
        let summary = self.report(layout.report, REPORT_WORDS)?;
        if summary[0] != layout.data {
            return Err(Fault::Report(layout.report, Flaw::NoBlock));
        }
        let words = self.report(layout.gaps, 2 * summary[10] as usize)?;
        let gaps = words.as_chunks().0.iter();
        let report = Report {
            writes: summary[1],
            reads: summary[2],
            flushes: summary[3],
            rebinds: summary[4],
            queues: summary[5],
            depth: summary[6],
            cycles: summary[7],
            longest: summary[8],
            gaps: gaps.map(|&[end, length]| Gap { end, length }).collect(),
        };
        let table = self.report(layout.table, layout.data as usize)?;
        let ledger = Ledger::new(self.seed, table);
        let wrong: Vec<_> = (0..ledger.len())
            .filter_map(|block| Some((block, ledger.check(block, &self.read(block)).err()?)))
            .collect();
        if wrong.is_empty() {
            Ok(report)
        } else {
            Err(Fault::Data(wrong))
        }
    }

    /// `words` words of the report, from block `first` on.
    fn report(&self, first: u64, words: usize) -> Result<Vec<u64>, Fault> {
        let mut all = Vec::new();
        for block in (first..).take(words.div_ceil(REPORT_WORDS)) {
            let data = self.read(block);
            match Label::read(&data, block, self.seed) {
                Ok(label) if label.queue == REPORT => all.extend(block::payload(&data)),
                Ok(_) => return Err(Fault::Report(block, Flaw::NoBlock)),
                Err(flaw) => return Err(Fault::Report(block, flaw)),
            }
        }
        all.truncate(words);
        Ok(all)
    }
}

/// Random numbers that a seed repeats (xorshift64*, Vigna 2016).
pub struct Random(u64);

impl Random {
    /// With OUTRIGGER_SEED if that is set, otherwise with a new seed. The seed is printed, so
    /// that a failed run can be repeated.
    pub fn announced() -> Self {
        let seed = match std::env::var("OUTRIGGER_SEED") {
            Ok(text) => text.parse().expect("OUTRIGGER_SEED is a number"),
            Err(_) => {
                let now = std::time::SystemTime::now();
                let since = now.duration_since(std::time::UNIX_EPOCH).unwrap();
                since.as_nanos() as u64 % 1_000_000_000
            }
        };
        eprintln!("OUTRIGGER_SEED={seed}");
        println!("OUTRIGGER_SEED={seed}");
        Self::new(seed)
    }

    /// With this seed.
    pub fn new(seed: u64) -> Self {
        let mut random = Random(seed ^ 0x9e37_79b9_7f4a_7c15);
        random.next();
        random
    }

    /// The next number.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    /// A time below `limit`.
    pub fn time(&mut self, limit: Duration) -> Duration {
        Duration::from_micros(self.below(limit.as_micros() as u64))
    }
}

/// Whether this is the long run (`./test.sh --long`).
pub fn long() -> bool {
    std::env::var_os("OUTRIGGER_LONG").is_some_and(|value| value == "1")
}

/// This processor's TSC.
pub fn cycles() -> u64 {
    // SAFETY: every x86-64 processor has the counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// TSC cycles in a millisecond, measured.
pub fn cycles_per_ms() -> f64 {
    let (begin, start) = (cycles(), Instant::now());
    std::thread::sleep(Duration::from_millis(50));
    (cycles() - begin) as f64 / (start.elapsed().as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests;

//! `disk-chaos`: self-describing blocks are written and read on all queues at once, while the
//! host kills, stops and swaps the disk's process. Each acknowledged write must be on the disk,
//! and each request completed once. At the end the disk contains a report by which the host
//! checks the image (`logic::block::Layout`).

mod lane;
mod report;

use super::Guest;
use crate::irq;
use crate::line;
use crate::seconds;
use crate::virtio::BLOCK;
use crate::virtio::device::Device;
use crate::virtio::split::{SIZE, Split};
use crate::virtio::transport::{Completion, Transport, feature};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use lane::{Lane, Work};
use logic::block::{self, Layout};
use logic::ledger::Ledger;
use logic::pattern;

const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_MULTI_QUEUE: u64 = 1 << 12;
/// Descriptors that each request may take.
const CHAIN: u16 = lane::CHAIN;
/// How many blocks are tried to find one without a request in flight.
const PROBES: u64 = 8;
/// Number of gaps in a report; each takes two words.
const MOST_GAPS: usize = block::GAP_BLOCKS as usize * block::REPORT_WORDS / 2;

/// What the command line asks for.
struct Plan {
    seed: u64,
    /// Requests; 0: until the host says stop.
    count: u64,
    /// Until so much time is over; 0: no matter.
    seconds: u64,
    /// The device is reset and set up again every so many requests; 0: never.
    rebind: u64,
    /// Longer times between two completions are noted, in cycles.
    gap: u64,
    queues: u16,
    depth: u16,
    /// Whether the length that the device says it wrote must be right.
    lengths: bool,
}

/// What was done so far.
#[derive(Default)]
struct Counts {
    submitted: u64,
    done: u64,
    writes: u64,
    reads: u64,
    flushes: u64,
    controls: u64,
    rebinds: u64,
    /// When each ended, in cycles since the work began, and how long it was.
    gaps: Vec<[u64; 2]>,
    longest: u64,
}

struct Chaos {
    plan: Plan,
    layout: Layout,
    ledger: Ledger,
    counts: Counts,
    stop: bool,
    begin: u64,
    last: u64,
    /// First, so that the device is reset before its queues go.
    transport: Option<Transport>,
    lanes: Vec<Lane>,
}

/// Runs it.
///
/// # Errors
/// The first fault.
pub fn run(guest: &Guest) -> Result<(), String> {
    let device = guest.device(BLOCK)?;
    let options = &guest.options;
    let queues = options.number("queues", device.queues() as u64)?;
    let depth = options.number("qdepth", 8)?;
    let plan = Plan {
        seed: options.number("seed", irq::cycles())?,
        count: options.number("count", 20_000)?,
        seconds: options.number("seconds", 0)?,
        rebind: options.number("rebind", 0)?,
        gap: options.number("gap", 10_000_000)?,
        queues: queues.clamp(1, device.queues() as u64) as u16,
        depth: depth.clamp(1, u64::from(SIZE / CHAIN)) as u16,
        lengths: options.get("lengths") != Some("any"),
    };
    let blocks = options.number("blocks", 512)?;
    let mut chaos = Chaos::new(plan, blocks, device)?;
    chaos.drive(adopt(), true)?;
    line!(
        "disk-chaos: ready, seed {}, {} queues, {} requests in each",
        chaos.plan.seed,
        chaos.plan.queues,
        chaos.plan.depth
    );
    chaos.begin = irq::cycles();
    chaos.work()?;
    let cycles = irq::cycles() - chaos.begin;
    chaos.drive(verify(), true)?;
    let report = report::blocks(&chaos, cycles);
    chaos.drive(report::write(report), true)?;
    chaos.be_quiet()?;
    let Counts {
        writes,
        reads,
        flushes,
        rebinds,
        longest,
        ref gaps,
        ..
    } = chaos.counts;
    line!(
        "disk-chaos: {writes} writes, {reads} reads, {flushes} flushes, {rebinds} rebinds \
         in {cycles} cycles; longest gap {longest} cycles, {} above {}",
        gaps.len(),
        chaos.plan.gap
    );
    Ok(())
}

/// The blocks may contain data of an earlier run.
fn adopt() -> impl FnMut(&mut Chaos) -> Option<Work> {
    let mut blocks = 0..;
    move |chaos| {
        blocks
            .next()
            .filter(|block| *block < chaos.ledger.len())
            .map(Work::Adopt)
    }
}

/// Reads every block once more.
fn verify() -> impl FnMut(&mut Chaos) -> Option<Work> {
    let mut blocks = 0..;
    move |chaos| {
        let block = blocks.next()?;
        chaos.ledger.begin_read(block).then_some(Work::Read(block))
    }
}

impl Chaos {
    fn new(plan: Plan, blocks: u64, device: Device) -> Result<Self, String> {
        let name = device.name.clone();
        let mut chaos = Self {
            plan,
            layout: Layout {
                data: 0,
                report: 0,
                table: 0,
                gaps: 0,
                control: 0,
            },
            ledger: Ledger::new(0, []),
            counts: Counts::default(),
            stop: false,
            begin: u64::MAX,
            last: irq::cycles(),
            transport: None,
            lanes: Vec::new(),
        };
        chaos.start(device)?;
        chaos.layout = chaos
            .transport
            .as_ref()
            .map(|transport| transport.config::<[u32; 2]>(0))
            .transpose()?
            .map(|halves| u64::from(halves[0]) | u64::from(halves[1]) << 32)
            .and_then(|sectors| Layout::new(sectors * 512, blocks))
            .ok_or_else(|| format!("{name}: too small"))?;
        let sequences = (0..chaos.layout.data).map(|_| 0);
        chaos.ledger = Ledger::new(chaos.plan.seed, sequences);
        Ok(chaos)
    }

    /// Sets the device up, with rings that are empty.
    fn start(&mut self, device: Device) -> Result<(), String> {
        let wanted = FEATURE_FLUSH | FEATURE_MULTI_QUEUE;
        let mut transport = Transport::start(device, wanted, Completion::Interrupt)?;
        if !transport.has(FEATURE_MULTI_QUEUE) {
            self.plan.queues = 1;
        }
        let indirect = transport.has(feature::RING_INDIRECT_DESC);
        for queue in 0..self.plan.queues {
            let ring = Split::new(&mut transport, queue)?;
            match self.lanes.get_mut(usize::from(queue)) {
                Some(lane) => lane.start_again(ring),
                None => self.lanes.push(Lane::new(
                    ring,
                    self.plan.depth,
                    indirect,
                    self.plan.lengths,
                )),
            }
        }
        transport.finish();
        self.transport = Some(transport);
        Ok(())
    }

    /// Resets the device whatever it is at, and sets it up again.
    fn rebind(&mut self) -> Result<(), String> {
        let Some(transport) = self.transport.take() else {
            return Ok(());
        };
        let device = transport.device().clone();
        // Resets it.
        drop(transport);
        self.ledger.cut_off();
        self.counts.rebinds += 1;
        self.start(device)
    }

    /// The work itself, until it is enough.
    fn work(&mut self) -> Result<(), String> {
        let end = irq::ticks() + self.plan.seconds * irq::TICKS_PER_SECOND;
        self.last = self.begin;
        loop {
            let pause = match self.plan.rebind {
                0 => u64::MAX,
                every => self.counts.submitted + every,
            };
            let next = |chaos: &mut Self| {
                let timed = chaos.plan.seconds > 0 && irq::ticks() >= end;
                let counted = chaos.plan.count > 0 && chaos.counts.submitted >= chaos.plan.count;
                chaos.stop |= timed || counted;
                if chaos.stop || chaos.counts.submitted >= pause {
                    return None;
                }
                chaos.counts.submitted += 1;
                Some(chaos.choose())
            };
            self.drive(next, false)?;
            if self.stop {
                return self.drive(|_| None, true);
            }
            self.rebind()?;
        }
    }

    /// Chooses what to do next.
    fn choose(&mut self) -> Work {
        let random = pattern::word(self.plan.seed, 8 * self.counts.submitted);
        match random % 128 {
            0 | 1 => return Work::Flush,
            2 => return Work::Control,
            _ => {}
        }
        let reading = random >> 8 & 3 == 0;
        let first = random >> 16;
        for probe in 0..PROBES {
            let block = (first + probe) % self.ledger.len();
            if !reading && let Some(label) = self.ledger.begin_write(block, 0) {
                return Work::Write(label);
            }
            if self.ledger.begin_read(block) {
                return Work::Read(block);
            }
        }
        Work::Control
    }

    /// Keeps all queues full of what `next` says until it says nothing more; then, with
    /// `drain`, waits for what is under way.
    fn drive(
        &mut self,
        mut next: impl FnMut(&mut Self) -> Option<Work>,
        drain: bool,
    ) -> Result<(), String> {
        let mut more = true;
        loop {
            let mut idle = true;
            for index in 0..self.lanes.len() {
                while let Some((slot, work)) = self.lanes[index].take()? {
                    idle = false;
                    self.finish(index, slot, work)?;
                }
                while more && self.lanes[index].has_room() {
                    match next(self) {
                        Some(work) => self.lanes[index].submit(work, &self.layout)?,
                        None => more = false,
                    }
                }
                if let Some(transport) = &mut self.transport {
                    self.lanes[index].ring.tell(transport);
                }
            }
            let busy = self.lanes.iter().any(|lane| lane.ring.lent() > 0);
            let wanted = more || (drain && busy);
            if !wanted {
                return Ok(());
            }
            if idle && busy {
                self.wait()?;
            }
        }
    }

    fn wait(&mut self) -> Result<(), String> {
        let lanes = &mut self.lanes;
        let ready = || {
            lanes
                .iter_mut()
                .any(|lane| lane.ring.has_used())
                .then_some(())
        };
        irq::wait_until(seconds(), ready).map_err(|error| {
            let mut message = format!("requests are lost: {error}");
            for lane in &self.lanes {
                message += &format!("; {}: {} under way", lane.ring.name(), lane.ring.lent());
            }
            message
        })
    }

    /// A request is answered: its data must be right.
    fn finish(&mut self, lane: usize, slot: u16, work: Work) -> Result<(), String> {
        let now = irq::cycles();
        let gap = now - self.last;
        self.last = now;
        self.counts.done += 1;
        self.counts.longest = self.counts.longest.max(gap);
        if gap > self.plan.gap && self.counts.gaps.len() < MOST_GAPS {
            self.counts.gaps.push([now.saturating_sub(self.begin), gap]);
        }
        let data = self.lanes[lane].data(slot);
        let (block, result) = match work {
            Work::Write(label) => {
                self.ledger.end_write(label.address);
                self.counts.writes += 1;
                (label.address, Ok(()))
            }
            Work::Read(block) => {
                self.counts.reads += 1;
                (block, self.ledger.end_read(block, data))
            }
            Work::Adopt(block) => (block, self.ledger.adopt(block, data)),
            Work::Control => {
                self.counts.controls += 1;
                // Only while it counts: a machine that boots again is told again.
                self.stop |= block::says_stop(data);
                (0, Ok(()))
            }
            Work::Flush => {
                self.counts.flushes += 1;
                (0, Ok(()))
            }
            Work::Report(..) => (0, Ok(())),
        };
        self.lanes[lane].release(slot);
        result.map_err(|wrong| {
            format!(
                "{}: block {block}: {wrong} (request {} done)",
                self.lanes[lane].ring.name(),
                self.counts.done
            )
        })
    }

    /// With nothing under way, nothing comes any more.
    fn be_quiet(&mut self) -> Result<(), String> {
        let end = irq::ticks() + 2;
        irq::wait_until(seconds(), || (irq::ticks() >= end).then_some(()))?;
        for lane in &mut self.lanes {
            lane.check_at_rest()?;
        }
        Ok(())
    }
}

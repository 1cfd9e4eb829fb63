//! Random requests, and a model of the disk's content.

use std::ops::Range;

use outrigger_tests::driver::{Driver, Queue};

use crate::image_dir::{DEPTH, LARGEST, SIZE};

/// The disk is striped over the queues in this unit, which is not a multiple of a cluster.
const STRIPE: usize = 24 << 10;

/// Pseudo-random numbers, the same in every run (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    Read,
    Write(u8),
    Discard,
    Zero(bool),
    Flush,
}

/// A request for a range that no other request in flight uses.
#[derive(Clone, Debug)]
pub struct Step {
    pub kind: Kind,
    pub range: Range<usize>,
}

impl Step {
    pub fn random(random: &mut Random, within: Range<usize>) -> Self {
        let sectors = within.len() / 512;
        let count = match random.below(3) {
            0 => 1 + random.below(sectors.min(8)),
            1 => 1 + random.below(sectors),
            _ => sectors,
        };
        let first = random.below(sectors - count + 1);
        let start = within.start + first * 512;
        let kind = match random.below(20) {
            0..=6 => Kind::Read,
            7..=14 => Kind::Write(1 + random.below(255) as u8),
            15..=16 => Kind::Discard,
            17..=18 => Kind::Zero(random.below(2) == 0),
            _ => Kind::Flush,
        };
        Step {
            kind,
            range: start..start + count * 512,
        }
    }

    pub fn bytes(&self, key: u8) -> Vec<u8> {
        self.range.clone().map(|at| key ^ (at >> 9) as u8).collect()
    }

    pub fn offer(&self, queue: &mut Queue, number: usize, discards: bool) {
        let (at, len) = (self.range.start as u64, self.range.len());
        match self.kind {
            Kind::Read => queue.read_part(number, at, len),
            Kind::Write(key) => {
                queue.fill(number, &self.bytes(key));
                queue.write_part(number, at, len);
            }
            Kind::Discard if discards => queue.discard(number, at, len as u64),
            Kind::Zero(unmap) => queue.write_zeroes(number, at, len as u64, unmap),
            Kind::Discard | Kind::Flush => queue.flush(number),
        }
    }
}

/// Ranges that do not overlap: some stripes of this queue, or some with a part of the next.
pub fn ranges(random: &mut Random, queue: usize, queues: usize) -> Vec<Range<usize>> {
    let stripes = SIZE.div_ceil(STRIPE) / queues;
    let mut chosen: Vec<usize> = (0..DEPTH).map(|_| random.below(stripes)).collect();
    chosen.sort_unstable();
    chosen.dedup();
    let range = |stripe: usize| {
        // With one queue, a range may span several stripes.
        let long = if queues == 1 {
            STRIPE * stripes
        } else {
            STRIPE
        };
        let start = (stripe * queues + queue) * STRIPE;
        start..(start + long).min(SIZE).min(start + LARGEST)
    };
    let mut ranges: Vec<Range<usize>> = chosen.into_iter().map(range).collect();
    for index in 1..ranges.len() {
        let next = ranges[index].start;
        let end = ranges[index - 1].end.min(next);
        ranges[index - 1].end = end;
    }
    ranges
}

/// Runs rounds of random requests on all queues, and checks each of them.
pub fn exercise(driver: &mut Driver, model: &mut [u8], random: &mut Random, rounds: usize) {
    let discards = driver.discards();
    let queues = driver.queues.len();
    for round in 0..rounds {
        let mut steps: Vec<Vec<Step>> = Vec::new();
        for (index, queue) in driver.queues.iter_mut().enumerate() {
            let ranges = ranges(random, index, queues).into_iter();
            let all: Vec<Step> = ranges.map(|range| Step::random(random, range)).collect();
            for (number, step) in all.iter().enumerate() {
                step.offer(queue, number, discards);
            }
            queue.kick();
            steps.push(all);
        }
        for (queue, steps) in driver.queues.iter_mut().zip(&steps) {
            let mut left = steps.len();
            while left > 0 {
                for (number, result) in queue.wait() {
                    let step = &steps[number];
                    assert_eq!(result, 0, "round {round}: {step:?}");
                    if step.kind == Kind::Read {
                        let found = &queue.content(number)[..step.range.len()];
                        assert!(
                            *found == model[step.range.clone()],
                            "round {round}: {step:?}"
                        );
                    }
                    left -= 1;
                }
            }
        }
        for step in steps.iter().flatten() {
            let part = &mut model[step.range.clone()];
            match step.kind {
                Kind::Write(key) => part.copy_from_slice(&step.bytes(key)),
                Kind::Zero(_) => part.fill(0),
                // The range then reads as before or as zeros.
                Kind::Discard if discards => {
                    let now = read(driver, step.range.clone());
                    let mut pairs = now.iter().zip(part.iter());
                    assert!(
                        pairs.all(|(now, then)| *now == 0 || now == then),
                        "{step:?}"
                    );
                    part.copy_from_slice(&now);
                }
                _ => {}
            }
        }
    }
}

pub fn read(driver: &mut Driver, range: Range<usize>) -> Vec<u8> {
    let queue = &mut driver.queues[0];
    let mut bytes = Vec::new();
    for at in range.clone().step_by(LARGEST) {
        let len = LARGEST.min(range.end - at);
        queue.read_part(0, at as u64, len);
        assert_eq!(queue.run(), 0);
        bytes.extend(&queue.content(0)[..len]);
    }
    bytes
}

//! What a disk has acknowledged, block by block, and whether its content agrees with that.
//! The host compiles this file, too (tests/src/chaos.rs).

use super::block::{self, Flaw, Label};
use alloc::vec::Vec;
use core::fmt;

/// The request in flight on a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Busy {
    No,
    Reading,
    Writing,
    /// A write was cut off by a reset: it was done, or it was not.
    Unsure,
    /// As `Unsure`, and being read to find out.
    Settling,
}

/// What is known of a block.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// The last sequence number acknowledged; 0: it was never written.
    sequence: u64,
    busy: Busy,
}

/// The disk's content contradicts what it acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Never written, although this sequence number was acknowledged.
    Lost(u64),
    /// An older one than the one acknowledged.
    Stale {
        /// What was acknowledged.
        acknowledged: u64,
        /// What is there.
        found: u64,
    },
    /// A newer one than was ever written.
    Future {
        /// What was acknowledged.
        acknowledged: u64,
        /// What is there.
        found: u64,
    },
    /// Not a whole block of this place and run.
    Flawed(Flaw),
}

impl fmt::Display for Wrong {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Lost(acknowledged) => {
                write!(
                    formatter,
                    "lost: write {acknowledged} was acknowledged, and it is blank"
                )
            }
            Self::Stale {
                acknowledged,
                found,
            } => write!(
                formatter,
                "stale: write {acknowledged} was acknowledged, and it holds {found}"
            ),
            Self::Future {
                acknowledged,
                found,
            } => write!(
                formatter,
                "it holds write {found}, and {acknowledged} was the last"
            ),
            Self::Flawed(flaw) => write!(formatter, "{flaw}"),
        }
    }
}

/// All blocks of data.
pub struct Ledger {
    seed: u64,
    entries: Vec<Entry>,
}

impl Ledger {
    /// Blocks with these sequence numbers acknowledged, none under way.
    pub fn new(seed: u64, sequences: impl IntoIterator<Item = u64>) -> Self {
        let entry = |sequence| Entry {
            sequence,
            busy: Busy::No,
        };
        Self {
            seed,
            entries: sequences.into_iter().map(entry).collect(),
        }
    }

    /// How many blocks there are.
    pub fn len(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The last sequence number acknowledged of each block.
    pub fn sequences(&self) -> impl Iterator<Item = u64> + '_ {
        self.entries.iter().map(|entry| entry.sequence)
    }

    fn entry(&mut self, block: u64) -> Option<&mut Entry> {
        self.entries.get_mut(block as usize)
    }

    /// Begins a write unless something is under way on the block: what to write.
    pub fn begin_write(&mut self, block: u64, queue: u64) -> Option<Label> {
        let seed = self.seed;
        let entry = self.entry(block).filter(|entry| entry.busy == Busy::No)?;
        entry.busy = Busy::Writing;
        Some(Label {
            address: block,
            sequence: entry.sequence + 1,
            queue,
            seed,
        })
    }

    /// The write that was begun is acknowledged.
    pub fn end_write(&mut self, block: u64) {
        if let Some(entry) = self
            .entry(block)
            .filter(|entry| entry.busy == Busy::Writing)
        {
            entry.sequence += 1;
            entry.busy = Busy::No;
        }
    }

    /// Begins a read unless something is under way on the block; says whether.
    pub fn begin_read(&mut self, block: u64) -> bool {
        let Some(entry) = self.entry(block) else {
            return false;
        };
        entry.busy = match entry.busy {
            Busy::No => Busy::Reading,
            Busy::Unsure => Busy::Settling,
            _ => return false,
        };
        true
    }

    /// The read that was begun has returned `data`.
    ///
    /// # Errors
    /// That is not what was acknowledged.
    pub fn end_read(&mut self, block: u64, data: &[u8]) -> Result<(), Wrong> {
        let seed = self.seed;
        let Some(entry) = self.entry(block) else {
            return Ok(());
        };
        let found = check(seed, block, *entry, data)?;
        entry.sequence = found;
        entry.busy = Busy::No;
        Ok(())
    }

    /// The device was reset: nothing is under way any more, and of writes that were
    /// it is not known whether they were done.
    pub fn cut_off(&mut self) {
        for entry in &mut self.entries {
            entry.busy = match entry.busy {
                Busy::Writing | Busy::Unsure | Busy::Settling => Busy::Unsure,
                Busy::No | Busy::Reading => Busy::No,
            };
        }
    }

    /// Takes over what a block holds: what an earlier run left.
    ///
    /// # Errors
    /// It is neither blank nor a block of this run.
    pub fn adopt(&mut self, block: u64, data: &[u8]) -> Result<(), Wrong> {
        let seed = self.seed;
        if let Some(entry) = self.entry(block) {
            if !block::is_blank(data) {
                let label = Label::read(data, block, seed).map_err(Wrong::Flawed)?;
                entry.sequence = label.sequence;
            }
            entry.busy = Busy::No;
        }
        Ok(())
    }

    /// Whether `data` is what block `block` has to hold.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self, block: u64, data: &[u8]) -> Result<(), Wrong> {
        match self.entries.get(block as usize) {
            Some(entry) => check(self.seed, block, *entry, data).map(drop),
            None => Ok(()),
        }
    }
}

/// The sequence number of a block, if it is an allowed one.
fn check(seed: u64, block: u64, entry: Entry, data: &[u8]) -> Result<u64, Wrong> {
    let acknowledged = entry.sequence;
    let unsure = matches!(entry.busy, Busy::Unsure | Busy::Settling);
    if block::is_blank(data) {
        return match acknowledged {
            0 => Ok(0),
            _ => Err(Wrong::Lost(acknowledged)),
        };
    }
    let found = Label::read(data, block, seed)
        .map_err(Wrong::Flawed)?
        .sequence;
    if found < acknowledged {
        return Err(Wrong::Stale {
            acknowledged,
            found,
        });
    }
    if found > acknowledged + u64::from(unsure) {
        return Err(Wrong::Future {
            acknowledged,
            found,
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::block::SIZE;
    use super::*;

    const SEED: u64 = 5;

    /// Writes a block of the ledger as a disk would.
    fn write(ledger: &mut Ledger, block: u64) -> [u8; SIZE] {
        let mut data = [0; SIZE];
        ledger.begin_write(block, 0).unwrap().fill(&mut data);
        data
    }

    #[test]
    fn what_was_acknowledged_reads_back() {
        let mut ledger = Ledger::new(SEED, [0; 4]);
        assert!(ledger.begin_read(2));
        assert_eq!(ledger.end_read(2, &[0; SIZE]), Ok(()));
        let first = write(&mut ledger, 2);
        assert!(!ledger.begin_read(2), "nothing overlaps a write");
        assert!(ledger.begin_write(2, 1).is_none());
        ledger.end_write(2);
        let second = write(&mut ledger, 2);
        ledger.end_write(2);
        assert!(ledger.begin_read(2));
        let stale = Wrong::Stale {
            acknowledged: 2,
            found: 1,
        };
        assert_eq!(ledger.end_read(2, &first), Err(stale));
        assert_eq!(ledger.end_read(2, &[0; SIZE]), Err(Wrong::Lost(2)));
        assert_eq!(ledger.end_read(2, &second), Ok(()));
        assert_eq!(ledger.sequences().collect::<Vec<_>>(), [0, 0, 2, 0]);
    }

    #[test]
    fn what_was_never_written_is_not_there() {
        let mut ledger = Ledger::new(SEED, [0; 4]);
        let data = write(&mut ledger, 1);
        let future = Wrong::Future {
            acknowledged: 0,
            found: 1,
        };
        assert_eq!(ledger.check(1, &data), Err(future));
        assert_eq!(
            ledger.check(3, &data),
            Err(Wrong::Flawed(Flaw::Misplaced(1)))
        );
    }

    #[test]
    fn a_write_that_a_reset_cuts_off_was_done_or_was_not() {
        for done in [false, true] {
            let mut ledger = Ledger::new(SEED, [0; 2]);
            let first = write(&mut ledger, 0);
            ledger.end_write(0);
            let second = write(&mut ledger, 0);
            ledger.cut_off();
            assert!(ledger.begin_write(0, 0).is_none(), "first it is read");
            assert!(ledger.begin_read(0));
            let data = if done { second } else { first };
            assert_eq!(ledger.end_read(0, &data), Ok(()));
            assert_eq!(ledger.sequences().next(), Some(1 + u64::from(done)));
            // From now on it is as it was found.
            assert_eq!(ledger.check(0, &data), Ok(()));
            let other = if done { first } else { second };
            assert!(ledger.check(0, &other).is_err());
        }
    }

    #[test]
    fn an_earlier_run_is_taken_over() {
        let mut ledger = Ledger::new(SEED, [0; 1]);
        let mut data = [0; SIZE];
        let label = Label {
            address: 0,
            sequence: 9,
            queue: 0,
            seed: SEED,
        };
        label.fill(&mut data);
        assert_eq!(ledger.adopt(0, &data), Ok(()));
        assert_eq!(ledger.begin_write(0, 0).unwrap().sequence, 10);
        data[4000] ^= 1;
        assert!(ledger.adopt(0, &data).is_err());
    }
}

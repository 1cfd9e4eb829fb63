//! Self-describing blocks: each contains its block number, a sequence number and the run, with
//! a checksum. Also the layout of the disk, so that the host can check an image by what its
//! guest was told (tests/src/chaos.rs).
//!
//! The host compiles this file, too, so it uses only core.

use core::fmt;

/// Bytes of a block.
pub const SIZE: usize = 4096;

const WORDS: usize = SIZE / 8;
/// First word of a block of data: "outrigB1".
const MAGIC: u64 = 0x3142_6769_7274_756f;
/// Indices of the header's words.
const ADDRESS: usize = 1;
const SEQUENCE: usize = 2;
const QUEUE: usize = 3;
const SEED: usize = 4;
const PAYLOAD: usize = 5;
const CHECKSUM: usize = WORDS - 1;

/// Words of payload that a block of a report holds.
pub const REPORT_WORDS: usize = CHECKSUM - PAYLOAD;
/// Used instead of a queue number: this block belongs to the report.
pub const REPORT: u64 = 0x7265_706f_7274;
/// First word of the control block that makes the guest end: "outrStop".
pub const STOP: u64 = 0x706f_7453_7274_756f;

/// The header of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// Which block of the disk it is.
    pub address: u64,
    /// How often the block was written, this time included.
    pub sequence: u64,
    /// By which queue.
    pub queue: u64,
    /// In which run.
    pub seed: u64,
}

/// Why a block is not one that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// It does not begin like a block.
    NoBlock,
    /// Its words do not belong together; at this byte if that is known.
    Corrupt(Option<usize>),
    /// It is a block of another place.
    Misplaced(u64),
    /// It is of another run.
    Foreign(u64),
}

impl fmt::Display for Flaw {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::NoBlock => write!(formatter, "it holds no block"),
            Self::Corrupt(Some(byte)) => write!(formatter, "it is corrupt from byte {byte} on"),
            Self::Corrupt(None) => write!(formatter, "it is corrupt: wrong checksum"),
            Self::Misplaced(address) => write!(formatter, "it holds block {address}"),
            Self::Foreign(seed) => write!(formatter, "it is of the run with seed {seed}"),
        }
    }
}

impl Label {
    /// Word `index` of the payload of data.
    fn word(&self, index: usize) -> u64 {
        // Each part counts in each word: multiplied by odd constants that share no
        // pattern, then stirred once.
        let mixed = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
            ^ self.address.wrapping_mul(0xd1b5_4a32_d192_ed03)
            ^ self.sequence.wrapping_mul(0x8cb9_2ba7_2f3d_8dd7)
            ^ (index as u64).wrapping_mul(0xaef1_7502_108e_f2d9);
        mixed ^ (mixed >> 29)
    }

    fn write_header(&self, data: &mut [u8]) {
        for (index, word) in [MAGIC, self.address, self.sequence, self.queue, self.seed]
            .into_iter()
            .enumerate()
        {
            put(data, index, word);
        }
    }

    /// Makes `data`, of [`SIZE`] bytes, the block with this label.
    pub fn fill(&self, data: &mut [u8]) {
        self.write_header(data);
        for index in PAYLOAD..CHECKSUM {
            put(data, index, self.word(index));
        }
        put(data, CHECKSUM, checksum(data));
    }

    /// Makes `data` a block of a report with this payload, and zeros behind it.
    pub fn fill_report(&self, payload: &[u64], data: &mut [u8]) {
        self.write_header(data);
        for index in PAYLOAD..CHECKSUM {
            put(
                data,
                index,
                payload.get(index - PAYLOAD).copied().unwrap_or(0),
            );
        }
        put(data, CHECKSUM, checksum(data));
    }

    /// Reads the label of `data`, of [`SIZE`] bytes, which is to be block `address` of
    /// the run `seed`, and checks every word.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(data: &[u8], address: u64, seed: u64) -> Result<Self, Flaw> {
        let label = Self::read_header(data, address, seed)?;
        for index in PAYLOAD..CHECKSUM {
            if label.queue != REPORT && get(data, index) != label.word(index) {
                return Err(Flaw::Corrupt(Some(8 * index)));
            }
        }
        Ok(label)
    }

    fn read_header(data: &[u8], address: u64, seed: u64) -> Result<Self, Flaw> {
        if get(data, 0) != MAGIC {
            return Err(Flaw::NoBlock);
        }
        if get(data, CHECKSUM) != checksum(data) {
            return Err(Flaw::Corrupt(None));
        }
        let label = Self {
            address: get(data, ADDRESS),
            sequence: get(data, SEQUENCE),
            queue: get(data, QUEUE),
            seed: get(data, SEED),
        };
        if label.seed != seed {
            return Err(Flaw::Foreign(label.seed));
        }
        if label.address != address {
            return Err(Flaw::Misplaced(label.address));
        }
        Ok(label)
    }
}

/// The payload of a block of a report.
pub fn payload(data: &[u8]) -> impl Iterator<Item = u64> + '_ {
    (PAYLOAD..CHECKSUM).map(|index| get(data, index))
}

/// Whether a block was never written.
pub fn is_blank(data: &[u8]) -> bool {
    data.iter().all(|byte| *byte == 0)
}

/// Whether the control block makes the guest end.
pub fn says_stop(data: &[u8]) -> bool {
    get(data, 0) == STOP
}

/// Checksum of all words but the last; depends on their order.
fn checksum(data: &[u8]) -> u64 {
    (0..CHECKSUM).fold(0x6f75_7472, |sum: u64, index| {
        (sum ^ get(data, index))
            .wrapping_mul(0x0000_0100_0000_01b3)
            .rotate_left(23)
    })
}

fn get(data: &[u8], index: usize) -> u64 {
    data[8 * index..]
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn put(data: &mut [u8], index: usize, word: u64) {
    data[8 * index..8 * index + 8].copy_from_slice(&word.to_le_bytes());
}

/// The layout of the disk: data from block 0 on, then the report (a summary, the sequence
/// number of each block, the longest gaps), and the control block, which the host writes, last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Blocks of data.
    pub data: u64,
    /// The report's first block: the summary.
    pub report: u64,
    /// The first block of the table of sequence numbers.
    pub table: u64,
    /// The first block of the gaps.
    pub gaps: u64,
    /// The control block.
    pub control: u64,
}

/// Blocks of gaps in a report.
pub const GAP_BLOCKS: u64 = 16;

impl Layout {
    /// On a disk of `capacity` bytes, with `data` blocks of data or as many as fit;
    /// `None` if that is none.
    pub fn new(capacity: u64, data: u64) -> Option<Self> {
        let total = capacity / SIZE as u64;
        let tables = |data: u64| data.div_ceil(REPORT_WORDS as u64);
        let room = total.checked_sub(2 + GAP_BLOCKS)?;
        let data = data.min(room - tables(room).min(room));
        let table = data + 1;
        (data > 0).then(|| Self {
            data,
            report: data,
            table,
            gaps: table + tables(data),
            control: total - 1,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABEL: Label = Label {
        address: 7,
        sequence: 3,
        queue: 1,
        seed: 99,
    };

    #[test]
    fn a_block_tells_where_it_belongs_and_every_bit_counts() {
        let mut data = [0; SIZE];
        assert_eq!(Label::read(&data, 7, 99), Err(Flaw::NoBlock));
        LABEL.fill(&mut data);
        assert_eq!(Label::read(&data, 7, 99), Ok(LABEL));
        assert_eq!(Label::read(&data, 8, 99), Err(Flaw::Misplaced(7)));
        assert_eq!(Label::read(&data, 7, 98), Err(Flaw::Foreign(99)));
        for byte in 0..SIZE {
            data[byte] ^= 0x10;
            assert!(Label::read(&data, 7, 99).is_err(), "byte {byte}");
            data[byte] ^= 0x10;
        }
    }

    #[test]
    fn a_block_of_two_writes_is_corrupt() {
        let (mut old, mut new) = ([0; SIZE], [0; SIZE]);
        LABEL.fill(&mut old);
        Label {
            sequence: 4,
            ..LABEL
        }
        .fill(&mut new);
        for cut in (512..SIZE).step_by(512) {
            new[cut..].copy_from_slice(&old[cut..]);
            let flaw = Label::read(&new, 7, 99);
            assert!(matches!(flaw, Err(Flaw::Corrupt(_))), "{flaw:?}");
        }
    }

    #[test]
    fn a_report_holds_its_payload() {
        let mut data = [0xff; SIZE];
        let label = Label {
            queue: REPORT,
            ..LABEL
        };
        label.fill_report(&[5, 6], &mut data);
        assert_eq!(Label::read(&data, 7, 99), Ok(label));
        let payload: Vec<u64> = payload(&data).collect();
        assert_eq!(payload.len(), REPORT_WORDS);
        assert_eq!(payload[..3], [5, 6, 0]);
        data[100] = 1;
        assert_eq!(Label::read(&data, 7, 99), Err(Flaw::Corrupt(None)));
    }

    #[test]
    fn nothing_overlaps_on_any_disk() {
        for blocks in 0..2000u64 {
            let Some(layout) = Layout::new(blocks * SIZE as u64, 1000) else {
                assert!(blocks < 5 + GAP_BLOCKS, "{blocks}");
                continue;
            };
            let Layout {
                data,
                report,
                table,
                gaps,
                control,
            } = layout;
            assert!(data <= report && report < table && table < gaps);
            assert!((gaps - table) * REPORT_WORDS as u64 >= data);
            assert!(gaps + GAP_BLOCKS <= control && control < blocks);
        }
        assert_eq!(Layout::new(1 << 20, 100).unwrap().data, 100);
    }
}

//! Tests of the checker: each kind of failure is made once in an image that is right
//! otherwise.

use super::block::{GAP_BLOCKS, Label, Layout, REPORT, REPORT_WORDS, SIZE};
use super::ledger::{Ledger, Wrong};
use super::*;

const SEED: u64 = 77;
const BLOCKS: u64 = 40;

/// A simulated guest: writes blocks in random order to an image, records each as
/// acknowledged, and leaves its report.
struct Model {
    path: tempfile::NamedTempFile,
    image: Image,
    ledger: Ledger,
    /// Content of each block before its last write.
    before: Vec<[u8; SIZE]>,
}

impl Model {
    fn run(writes: u64) -> Self {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(1 << 20).unwrap();
        let image = Image::open(path.path(), BLOCKS, SEED).unwrap();
        let mut model = Model {
            path,
            image,
            ledger: Ledger::new(SEED, (0..BLOCKS).map(|_| 0)),
            before: vec![[0; SIZE]; BLOCKS as usize],
        };
        let mut random = Random::new(1);
        for _ in 0..writes {
            let block = random.below(BLOCKS);
            let mut data = [0; SIZE];
            model.ledger.begin_write(block, 0).unwrap().fill(&mut data);
            model.before[block as usize] = model.image.read(block);
            model.image.write(block, &data);
            model.ledger.end_write(block);
        }
        model.leave_report(writes);
        model
    }

    fn leave_report(&self, writes: u64) {
        let layout = self.image.layout;
        let table: Vec<u64> = self.ledger.sequences().collect();
        let summary = [layout.data, writes, 0, 0, 0, 4, 8, 1000, 50, 10, 3];
        for (first, words) in [
            (layout.report, &summary[..]),
            (layout.table, &table),
            (layout.gaps, &[100, 20, 200, 30, 300, 50]),
        ] {
            for (block, payload) in (first..).zip(words.chunks(REPORT_WORDS)) {
                let label = Label {
                    address: block,
                    sequence: 1,
                    queue: REPORT,
                    seed: SEED,
                };
                let mut data = [0; SIZE];
                label.fill_report(payload, &mut data);
                self.image.write(block, &data);
            }
        }
    }

    /// A block that was written at least twice.
    fn often_written(&self) -> u64 {
        let mut sequences = self.ledger.sequences();
        sequences.position(|sequence| sequence > 1).unwrap() as u64
    }

    fn wrong(&self) -> Vec<(u64, Wrong)> {
        match self.image.check() {
            Err(Fault::Data(wrong)) => wrong,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_image_that_is_right_passes() {
    let model = Model::run(500);
    let report = model.image.check().unwrap();
    assert_eq!((report.writes, report.gaps.len()), (500, 3));
    let last = Gap {
        end: 300,
        length: 50,
    };
    assert_eq!(report.gaps[2], last);
    // Also with blocks that were never written.
    assert!(Model::run(5).image.check().is_ok());
}

#[test]
fn a_lost_write_is_caught() {
    let model = Model::run(500);
    let block = model.often_written();
    model.image.write(block, &[0; SIZE]);
    let sequence = model.ledger.sequences().nth(block as usize).unwrap();
    assert_eq!(model.wrong(), [(block, Wrong::Lost(sequence))]);
}

#[test]
fn a_stale_block_is_caught() {
    let model = Model::run(500);
    let block = model.often_written();
    model.image.write(block, &model.before[block as usize]);
    let acknowledged = model.ledger.sequences().nth(block as usize).unwrap();
    let stale = Wrong::Stale {
        acknowledged,
        found: acknowledged - 1,
    };
    assert_eq!(model.wrong(), [(block, stale)]);
}

#[test]
fn a_write_that_nobody_made_is_caught() {
    let model = Model::run(500);
    let block = model.often_written();
    let acknowledged = model.ledger.sequences().nth(block as usize).unwrap();
    let mut data = [0; SIZE];
    let label = Label {
        address: block,
        sequence: acknowledged + 1,
        queue: 0,
        seed: SEED,
    };
    label.fill(&mut data);
    model.image.write(block, &data);
    let future = Wrong::Future {
        acknowledged,
        found: acknowledged + 1,
    };
    assert_eq!(model.wrong(), [(block, future)]);
}

#[test]
fn corrupt_torn_and_misplaced_blocks_are_caught() {
    let model = Model::run(500);
    let block = model.often_written();
    let good = model.image.read(block);
    let caught = |data: &[u8; SIZE]| {
        model.image.write(block, data);
        let wrong = model.wrong();
        model.image.write(block, &good);
        assert_eq!(wrong.len(), 1);
        assert_eq!(wrong[0].0, block);
        wrong[0].1
    };
    let mut corrupt = good;
    corrupt[3000] ^= 4;
    assert!(matches!(caught(&corrupt), Wrong::Flawed(Flaw::Corrupt(_))));
    let mut torn = good;
    torn[2048..].copy_from_slice(&model.before[block as usize][2048..]);
    assert!(matches!(caught(&torn), Wrong::Flawed(Flaw::Corrupt(_))));
    let misplaced = model.image.read(block + 1);
    assert_eq!(
        caught(&misplaced),
        Wrong::Flawed(Flaw::Misplaced(block + 1))
    );
    assert!(model.image.check().is_ok());
}

#[test]
fn a_report_that_is_not_there_is_no_pass() {
    let model = Model::run(500);
    let Layout { report, table, .. } = model.image.layout;
    for block in [report, table] {
        let good = model.image.read(block);
        model.image.write(block, &[0; SIZE]);
        assert_eq!(
            model.image.check(),
            Err(Fault::Report(block, Flaw::NoBlock))
        );
        let mut bad = good;
        bad[200] ^= 1;
        model.image.write(block, &bad);
        let flaw = Flaw::Corrupt(None);
        assert_eq!(model.image.check(), Err(Fault::Report(block, flaw)));
        model.image.write(block, &good);
    }
    // A report of another run does not count.
    let other = Image::open(model.path.path(), BLOCKS, SEED + 1).unwrap();
    assert!(other.check().is_err());
}

#[test]
fn an_image_without_room_for_a_report_is_none() {
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file()
        .set_len((GAP_BLOCKS + 3) * SIZE as u64)
        .unwrap();
    let image = Image::open(path.path(), BLOCKS, SEED);
    assert_eq!(image.err(), Some(Fault::TooSmall));
}

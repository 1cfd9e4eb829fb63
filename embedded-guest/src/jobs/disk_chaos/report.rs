//! The report of `disk-chaos` on the disk: a summary, the last acknowledged sequence number of
//! each block, and the longest gaps (`logic::block::Layout`).

use super::Chaos;
use super::lane::Work;
use alloc::boxed::Box;
use alloc::vec::Vec;
use logic::block::{Label, REPORT, REPORT_WORDS, SIZE};

/// The blocks of the report and where they belong.
pub fn blocks(chaos: &Chaos, cycles: u64) -> Vec<Work> {
    let (counts, plan, layout) = (&chaos.counts, &chaos.plan, &chaos.layout);
    let summary = [
        layout.data,
        counts.writes,
        counts.reads,
        counts.flushes,
        counts.rebinds,
        plan.queues.into(),
        plan.depth.into(),
        cycles,
        counts.longest,
        plan.gap,
        counts.gaps.len() as u64,
    ];
    let table: Vec<u64> = chaos.ledger.sequences().collect();
    [
        (layout.report, &summary[..]),
        (layout.table, &table[..]),
        (layout.gaps, counts.gaps.as_flattened()),
    ]
    .into_iter()
    .flat_map(|(first, words)| {
        (first..)
            .zip(words.chunks(REPORT_WORDS))
            .map(|(address, payload)| {
                let mut data = Box::new([0; SIZE]);
                let label = Label {
                    address,
                    sequence: 1,
                    queue: REPORT,
                    seed: plan.seed,
                };
                label.fill_report(payload, &mut data[..]);
                Work::Report(address, data)
            })
    })
    .collect()
}

/// Writes them.
pub fn write(blocks: Vec<Work>) -> impl FnMut(&mut Chaos) -> Option<Work> {
    let mut blocks = blocks.into_iter();
    move |_| blocks.next()
}

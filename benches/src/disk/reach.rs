//! What was to be reached, and whether it is.

use super::Row;
use super::cases::{Case, Format, Medium};
use super::load::{Busy, Figures};
use super::peers::Peer;

/// One figure beside another.
pub struct Reach {
    /// What is compared.
    pub what: String,
    /// The one by the other.
    pub ratio: f64,
    /// The least that was to be reached, or the most.
    pub wanted: Wanted,
    /// Who is busy, of both that are compared: what bounds it.
    pub bound: String,
}

/// A limit.
#[derive(Clone, Copy)]
pub enum Wanted {
    /// At least this.
    Least(f64),
    /// At most this.
    Most(f64),
}

impl Reach {
    /// Whether it is reached.
    pub fn is_met(&self) -> bool {
        match self.wanted {
            Wanted::Least(least) => self.ratio >= least,
            Wanted::Most(most) => self.ratio <= most,
        }
    }
}

/// The share of its time at which a thread counts as busy.
const BUSY: f64 = 0.9;

/// Who of `row` has no time left.
fn bound(row: &Row) -> String {
    let Figures { front, back, .. } = row.figures;
    let threads = row.case.queues as f64;
    // Whether it had no time left, and why: also those who wake each other up stand in each
    // other's way when they are on one processor.
    let state = |it: Busy| match (it.ran, it.ran + it.waited) {
        (BUSY.., _) => Some("is busy"),
        (_, BUSY..) => Some("lacks a processor"),
        _ => None,
    };
    let state = |it: Busy| {
        state(Busy {
            ran: it.ran / threads,
            waited: it.waited / threads,
        })
    };
    let who = match (state(front), state(back)) {
        (Some(front), Some(back)) => format!("the front end {front}, the back end {back}"),
        (Some(front), None) => format!("the front end {front}"),
        (None, Some(back)) => format!("the back end {back}"),
        (None, None) if row.case.medium == Medium::Direct => {
            "no side is busy: the medium, and wake-ups".into()
        }
        (None, None) => "no side is busy: wake-ups".into(),
    };
    let share = |it: Busy| {
        let percent = |part: f64| part / threads * 100.0;
        format!(
            "runs {:.0} %, waits for a processor {:.0} %",
            percent(it.ran),
            percent(it.waited)
        )
    };
    format!(
        "{who}; front end {}; back end {}",
        share(front),
        share(back)
    )
}

fn iops(figures: &Figures) -> f64 {
    figures.iops
}

fn cpu(figures: &Figures) -> f64 {
    figures.cpu
}

/// All that can be told from `rows`.
pub fn all(rows: &[Row]) -> Vec<Reach> {
    let find = |case: &Case, peer| rows.iter().find(|it| it.case == *case && it.peer == peer);
    let mut reaches = Vec::new();
    for row in rows {
        let case = &row.case;
        let mut compare = |what: &str, other: Option<&Row>, get: fn(&Figures) -> f64, wanted| {
            if let Some(other) = other {
                reaches.push(Reach {
                    what: format!("{}, {}: {what}", case.place(), case.work()),
                    ratio: row.by(other, get),
                    wanted,
                    bound: format!(
                        "{}; p50 {:.1} us beside {:.1} us",
                        bound(row),
                        row.figures.p50,
                        other.figures.p50
                    ),
                });
            }
        };
        let small = !case.pattern.is_sequential() && case.queues == 1;
        let daemon = find(case, Peer::Daemon);
        match (case.medium, case.format, case.depth, row.peer) {
            (Medium::Memory, Format::Raw, 32, Peer::Ours) if small => {
                compare("IOPS by qsd's", daemon, iops, Wanted::Least(2.2));
                compare("CPU by qsd's", daemon, cpu, Wanted::Most(0.5));
            }
            (Medium::Memory, Format::Raw, 1, Peer::Ours) if small => {
                compare("IOPS by qsd's", daemon, iops, Wanted::Least(1.0));
            }
            (Medium::Memory, Format::Raw, 1, Peer::Polling) if small => {
                compare("IOPS, polling, by qsd's", daemon, iops, Wanted::Least(2.5));
            }
            (Medium::Memory, Format::Qcow2, 32, Peer::Ours) if small => {
                compare(
                    "IOPS by our raw",
                    find(case, Peer::Raw),
                    iops,
                    Wanted::Least(0.9),
                );
            }
            (Medium::Direct, Format::Raw, 32, Peer::Ours) if case.queues == 1 => {
                compare(
                    "IOPS by fio's",
                    find(case, Peer::Fio),
                    iops,
                    Wanted::Least(0.95),
                );
            }
            (Medium::Direct, Format::Raw, 32, Peer::Polling) if case.queues == 1 => {
                let fio = find(case, Peer::Fio);
                compare("IOPS, polling, by fio's", fio, iops, Wanted::Least(0.95));
            }
            _ => {}
        }
    }
    reaches
}

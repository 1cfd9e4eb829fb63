//! Targets, and whether they are met.

use super::Row;
use super::cases::{Case, Format, Medium};
use super::load::{Busy, Figures};
use super::peers::Peer;

/// The ratio of two figures, with its target.
pub struct Target {
    /// The case and the figure that is compared.
    pub what: String,
    /// The one by the other.
    pub ratio: f64,
    /// The target.
    pub limit: Limit,
    /// What bounds the figure: which side is busy.
    pub bound: String,
}

/// A limit.
#[derive(Clone, Copy)]
pub enum Limit {
    /// At least this.
    Least(f64),
    /// At most this.
    Most(f64),
}

impl Target {
    /// Whether the target is met.
    pub fn is_met(&self) -> bool {
        match self.limit {
            Limit::Least(least) => self.ratio >= least,
            Limit::Most(most) => self.ratio <= most,
        }
    }
}

/// Share of time above which a thread counts as busy.
const BUSY: f64 = 0.9;

/// Which side of `row` is busy.
fn bound(row: &Row) -> String {
    let Figures { front, back, .. } = row.figures;
    let threads = row.case.queues as f64;
    // Whether it had no time left, and why: also those who wake each other up stand in each
    // other's way when they are on one processor.
    let state = |it: Busy| match (it.ran, it.ran + it.waited) {
        (BUSY.., _) => Some("is busy"),
        (_, BUSY..) => Some("waits for a processor"),
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

/// All targets that `rows` contain the figures for.
pub fn all(rows: &[Row]) -> Vec<Target> {
    let find = |case: &Case, peer| rows.iter().find(|it| it.case == *case && it.peer == peer);
    let mut targets = Vec::new();
    for row in rows {
        let case = &row.case;
        let mut compare = |what: &str, other: Option<&Row>, get: fn(&Figures) -> f64, limit| {
            if let Some(other) = other {
                targets.push(Target {
                    what: format!("{}, {}: {what}", case.place(), case.work()),
                    ratio: row.by(other, get),
                    limit,
                    bound: format!(
                        "{}; p50 {:.1} us, peer {:.1} us",
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
                compare("IOPS, ratio to qsd", daemon, iops, Limit::Least(2.2));
                compare("CPU, ratio to qsd", daemon, cpu, Limit::Most(0.5));
            }
            (Medium::Memory, Format::Raw, 1, Peer::Ours) if small => {
                compare("IOPS, ratio to qsd", daemon, iops, Limit::Least(1.0));
            }
            (Medium::Memory, Format::Raw, 1, Peer::Polling) if small => {
                compare(
                    "IOPS with polling, ratio to qsd",
                    daemon,
                    iops,
                    Limit::Least(2.5),
                );
            }
            (Medium::Memory, Format::Qcow2, 32, Peer::Ours) if small => {
                compare(
                    "IOPS, ratio to our raw",
                    find(case, Peer::Raw),
                    iops,
                    Limit::Least(0.9),
                );
            }
            (Medium::Direct, Format::Raw, 32, Peer::Ours) if case.queues == 1 => {
                compare(
                    "IOPS, ratio to fio",
                    find(case, Peer::Fio),
                    iops,
                    Limit::Least(0.95),
                );
            }
            (Medium::Direct, Format::Raw, 32, Peer::Polling) if case.queues == 1 => {
                let fio = find(case, Peer::Fio);
                compare(
                    "IOPS with polling, ratio to fio",
                    fio,
                    iops,
                    Limit::Least(0.95),
                );
            }
            _ => {}
        }
    }
    targets
}

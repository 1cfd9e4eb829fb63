//! A disk process and its front end, without a virtual machine: device-disk beside
//! qemu-storage-daemon, and fio on the file itself.
//!
//! [`cases`] lists the cases, [`peers`] the programs; [`load`] submits requests to a
//! vhost-user queue; [`target`] compares, and [`table`], [`json`] and [`svg`] show.

mod cases;
mod fio;
mod json;
mod load;
mod media;
mod peers;
mod svg;
mod table;
mod target;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

use self::cases::Case;
use self::load::Figures;
use self::media::Media;
use self::peers::Peer;
use crate::{QUICK, median};

/// Figures of one peer in one case.
pub struct Row {
    /// The case.
    pub case: Case,
    /// The program that was measured.
    pub peer: Peer,
    /// Medians of all rounds.
    pub figures: Figures,
    rounds: Vec<Figures>,
}

impl Row {
    /// How this compares with `other`: the median of all rounds, in each of which both were
    /// measured one after the other and saw about the same noise.
    pub fn by(&self, other: &Row, get: fn(&Figures) -> f64) -> f64 {
        let pairs = self.rounds.iter().zip(&other.rounds);
        median(&mut pairs.map(|(a, b)| get(a) / get(b)).collect::<Vec<_>>())
    }
}

pub fn run() {
    let quick = QUICK.load(Ordering::Relaxed);
    let rounds = if quick { 5 } else { 3 };
    let start = Instant::now();
    let directory = results();
    let media = Media::new(&directory);
    let present = Peer::present();
    let plan: Vec<(Case, Vec<Peer>)> = cases::all(quick)
        .into_iter()
        .filter(|case| media.has(case))
        .map(|case| (case, Peer::of(&case, &present)))
        .collect();
    let mut measured: Vec<Vec<Vec<Figures>>> = plan
        .iter()
        .map(|(_, peers)| vec![Vec::new(); peers.len()])
        .collect();
    // In turns, so that all see the same noise.
    for round in 1..=rounds {
        eprintln!(
            "round {round} of {rounds}, {:.0} s",
            start.elapsed().as_secs_f64()
        );
        for ((case, peers), measured) in plan.iter().zip(&mut measured) {
            for (peer, measured) in peers.iter().zip(measured) {
                measured.push(peer.measure(case, &media));
            }
        }
    }
    let rows: Vec<Row> = plan
        .iter()
        .zip(measured)
        .flat_map(|((case, peers), measured)| {
            peers.iter().zip(measured).map(|(peer, rounds)| Row {
                case: *case,
                peer: *peer,
                figures: medians(&rounds),
                rounds,
            })
        })
        .collect();
    let targets = target::all(&rows);
    table::print(&rows, &targets);
    for (name, content) in [
        ("disk.json", json::text(&rows, &targets, rounds)),
        ("disk.svg", svg::text(&rows)),
    ] {
        let path = directory.join(name);
        std::fs::write(&path, content).expect("the target directory can be written to");
        println!("{}", path.display());
    }
    println!("{:.0} s", start.elapsed().as_secs_f64());
}

/// The directory `benches` in the target directory.
fn results() -> PathBuf {
    let program = std::env::current_exe().expect("this program has a path");
    let target = program
        .ancestors()
        .nth(2)
        .expect("it lies in target/PROFILE");
    let directory = target.join("benches");
    std::fs::create_dir_all(&directory).expect("the target directory can be written to");
    directory
}

fn medians(rounds: &[Figures]) -> Figures {
    let of = |get: fn(&Figures) -> f64| median(&mut rounds.iter().map(get).collect::<Vec<_>>());
    Figures {
        iops: of(|f| f.iops),
        bytes: of(|f| f.bytes),
        p50: of(|f| f.p50),
        p99: of(|f| f.p99),
        cpu: of(|f| f.cpu),
        resident: median(&mut rounds.iter().map(|f| f.resident).collect::<Vec<_>>()),
        back: median(&mut rounds.iter().map(|f| f.back).collect::<Vec<_>>()),
        front: median(&mut rounds.iter().map(|f| f.front).collect::<Vec<_>>()),
    }
}

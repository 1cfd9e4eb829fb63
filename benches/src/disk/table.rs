//! The figures as a text table.

use super::Row;
use super::peers::Peer;
use super::target::{Limit, Target};

/// Prints all figures and targets.
pub fn print(rows: &[Row], targets: &[Target]) {
    println!("Medians. Each queue has a thread of the front end, which sleeps until it is");
    println!("interrupted; CPU: processor seconds of the back end for a million requests.");
    let mut place = "";
    let mut first = None;
    for row in rows {
        let (case, figures) = (&row.case, &row.figures);
        if place != case.place() {
            place = case.place();
            println!("\n{place}");
            println!(
                "{:50}{:>9}{:>9}{:>10}{:>10}{:>8}{:>9}{:>8}",
                "", "IOPS", "MB/s", "p50 us", "p99 us", "CPU", "RSS MiB", "ratio"
            );
        }
        let of_case = |peer| rows.iter().find(|it| it.case == *case && it.peer == peer);
        // Beside qemu-storage-daemon's.
        let ratio = match of_case(Peer::Daemon) {
            Some(other) if row.peer != Peer::Daemon => {
                format!("{:.2}", row.by(other, |figures| figures.iops))
            }
            _ => String::new(),
        };
        let mib = |bytes: f64| format!("{:.1}", bytes / f64::from(1 << 20));
        let resident = figures.resident.map(mib).unwrap_or_default();
        let work = match first {
            Some(shown) if shown == *case => String::new(),
            _ => case.work(),
        };
        first = Some(*case);
        println!(
            "{work:29} {:20}{:>9.0}{:>9.0}{:>10.1}{:>10.1}{:>8.2}{resident:>9}{ratio:>8}",
            row.peer.name(),
            figures.iops,
            figures.bytes / 1e6,
            figures.p50,
            figures.p99,
            figures.cpu,
        );
    }
    println!();
    for target in targets {
        let limit = match target.limit {
            Limit::Least(least) => format!("at least {least}"),
            Limit::Most(most) => format!("at most {most}"),
        };
        let met = if target.is_met() { "met" } else { "NOT MET" };
        println!("{:75} {:>6.2}  {limit}: {met}", target.what, target.ratio);
        println!("    {}", target.bound);
    }
}

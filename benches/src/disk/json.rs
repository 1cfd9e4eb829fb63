//! The figures as JSON.

use serde_json::{Value, json};

use super::Row;
use super::target::{Limit, Target};

/// All figures as one object.
pub fn text(rows: &[Row], targets: &[Target], rounds: usize) -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let all = json!({
        "kernel": kernel.trim(),
        "cpus": cpus,
        "rounds": rounds,
        "rows": rows.iter().map(row).collect::<Vec<_>>(),
        "reaches": targets.iter().map(target).collect::<Vec<_>>(),
    });
    format!("{all:#}\n")
}

fn row(row: &Row) -> Value {
    let (case, figures) = (&row.case, &row.figures);
    json!({
        "place": case.place(),
        "pattern": case.pattern.name(),
        "depth": case.depth,
        "queues": case.queues,
        "peer": row.peer.name(),
        "iops": figures.iops,
        "mb_per_s": figures.bytes / 1e6,
        "p50_us": figures.p50,
        "p99_us": figures.p99,
        "cpu_s_per_million": figures.cpu,
        "rss_bytes": figures.resident,
        "back_ran": figures.back.ran,
        "back_waited": figures.back.waited,
        "front_ran": figures.front.ran,
        "front_waited": figures.front.waited,
    })
}

fn target(target: &Target) -> Value {
    let (limit, value) = match target.limit {
        Limit::Least(least) => ("at_least", least),
        Limit::Most(most) => ("at_most", most),
    };
    json!({
        "what": target.what,
        "ratio": target.ratio,
        limit: value,
        "met": target.is_met(),
        "bound": target.bound,
    })
}

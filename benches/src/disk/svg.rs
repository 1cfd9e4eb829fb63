//! The figures as a bar chart: for each case a bar for each peer, whose length is its IOPS
//! relative to qemu-storage-daemon's.

use std::fmt::Write;

use super::Row;
use super::peers::Peer;

const WIDTH: f64 = 900.0;
/// X coordinate at which bars start.
const LEFT: f64 = 230.0;
/// Length of the longest bar.
const LENGTH: f64 = 440.0;
const BAR: f64 = 12.0;
const GAP: f64 = 6.0;

fn colour(peer: Peer) -> &'static str {
    match peer {
        Peer::Ours => "#1f6f8b",
        Peer::Polling => "#6cc3d5",
        Peer::Raw => "#7a9e7e",
        Peer::Daemon => "#c9a227",
        Peer::Fio => "#9a9a9a",
    }
}

/// The ratio of each row to qemu-storage-daemon in the same case, if that was measured.
fn ratio(rows: &[Row], row: &Row) -> Option<f64> {
    let other = rows
        .iter()
        .find(|it| it.case == row.case && it.peer == Peer::Daemon)?;
    Some(row.by(other, |figures| figures.iops))
}

/// Draws the chart.
pub fn text(rows: &[Row]) -> String {
    let ratios = rows.iter().filter_map(|row| ratio(rows, row));
    let longest = ratios.fold(1.0, f64::max);
    let scale = LENGTH / longest;
    let mut body = String::new();
    let mut y = legend(&mut body);
    let (mut place, mut last) = ("", None);
    for row in rows {
        let Some(ratio) = ratio(rows, row) else {
            continue;
        };
        if place != row.case.place() {
            place = row.case.place();
            y += 24.0;
            label(
                &mut body,
                12.0,
                y,
                "start",
                &format!("<tspan font-weight=\"bold\">{place}</tspan>"),
            );
            y += 8.0;
        }
        if last != Some(row.case) {
            last = Some(row.case);
            y += GAP;
            label(
                &mut body,
                LEFT - 8.0,
                y + BAR - 2.0,
                "end",
                &row.case.work(),
            );
        }
        let figures = &row.figures;
        let _ = writeln!(
            body,
            "<rect x=\"{LEFT}\" y=\"{y:.0}\" width=\"{:.1}\" height=\"{}\" fill=\"{}\"/>",
            ratio * scale,
            BAR - 1.0,
            colour(row.peer)
        );
        let said = format!(
            "{ratio:.2}   {}   {:.0} us   {:.1} s CPU",
            rate(figures.iops),
            figures.p99,
            figures.cpu
        );
        label(
            &mut body,
            LEFT + ratio * scale + 6.0,
            y + BAR - 2.0,
            "start",
            &said,
        );
        y += BAR;
    }
    let height = y + 20.0;
    let one = LEFT + scale;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {WIDTH} {height:.0}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <line x1=\"{one:.1}\" x2=\"{one:.1}\" y1=\"62\" y2=\"{:.0}\" stroke=\"#444\" \
         stroke-dasharray=\"3 3\"/>\n{body}</svg>\n",
        height - 10.0
    )
}

/// Draws the legend; returns its right edge.
fn legend(body: &mut String) -> f64 {
    let title = "IOPS relative to qemu-storage-daemon (1: equal); then IOPS, \
                 99th percentile, back-end CPU seconds for a million";
    label(body, 12.0, 24.0, "start", title);
    let mut x = 12.0;
    for peer in [
        Peer::Ours,
        Peer::Polling,
        Peer::Raw,
        Peer::Daemon,
        Peer::Fio,
    ] {
        let _ = writeln!(
            body,
            "<rect x=\"{x}\" y=\"38\" width=\"12\" height=\"12\" fill=\"{}\"/>",
            colour(peer)
        );
        label(body, x + 18.0, 48.0, "start", peer.name());
        x += 170.0;
    }
    56.0
}

fn label(body: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = writeln!(
        body,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" stroke=\"white\" \
         stroke-width=\"3\" paint-order=\"stroke\" xml:space=\"preserve\">{text}</text>"
    );
}

fn rate(iops: f64) -> String {
    match iops {
        1e6.. => format!("{:.2} M/s", iops / 1e6),
        1e3.. => format!("{:.1} k/s", iops / 1e3),
        _ => format!("{iops:.0}/s"),
    }
}

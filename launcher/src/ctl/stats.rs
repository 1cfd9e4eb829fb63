//! Formats disk statistics.

use std::collections::BTreeMap;

use outrigger_protocol::device::{DeviceStats, QueueStats};

/// Formats the statistics of `disks` as a table with a line for each type of request that
/// occurred, or as JSON.
///
/// # Errors
/// The statistics cannot be represented in JSON.
pub fn show(disks: &BTreeMap<String, DeviceStats>, json: bool) -> anyhow::Result<String> {
    if json {
        return Ok(serde_json::to_string(disks)? + "\n");
    }
    let mut text = String::new();
    let mut row = |cells: [&str; 10]| {
        let mut line = format!("{:<10}{:<6}{:<14}", cells[0], cells[1], cells[2]);
        line += &cells[3..]
            .iter()
            .map(|cell| format!("{cell:>11}"))
            .collect::<String>();
        text += line.trim_end();
        text.push('\n');
    };
    row([
        "DISK", "QUEUE", "", "REQUESTS", "MIB", "ERRORS", "P50 us", "P99 us", "P99.9 us", "MAX us",
    ]);
    for (disk, stats) in disks {
        for (number, queue) in stats.queues.iter().enumerate() {
            let QueueStats { latency, .. } = queue;
            let number = number.to_string();
            let us = |time: f64| format!("{time:.1}");
            row([
                disk,
                &number,
                "all",
                &latency.samples.to_string(),
                "",
                "",
                &us(latency.p50_us),
                &us(latency.p99_us),
                &us(latency.p999_us),
                &us(latency.max_us),
            ]);
            for (kind, count) in queue.requests.by_type() {
                if count.count > 0 {
                    let mib = format!("{:.1}", count.bytes as f64 / f64::from(1 << 20));
                    let (requests, errors) = (count.count.to_string(), count.errors.to_string());
                    row([
                        disk, &number, kind, &requests, &mib, &errors, "", "", "", "",
                    ]);
                }
            }
            let (now, most) = (queue.in_flight.to_string(), queue.in_flight_max.to_string());
            row([disk, &number, "in flight", &now, "", "", "", "", "", ""]);
            row([
                disk,
                &number,
                "max in flight",
                &most,
                "",
                "",
                "",
                "",
                "",
                "",
            ]);
            if let Some(cpu) = queue.cpu_us {
                let cpu = format!("{:.1}", cpu as f64 / 1e3);
                row([disk, &number, "CPU ms", &cpu, "", "", "", "", "", ""]);
            }
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use outrigger_protocol::device::{LatencyStats, OperationStats, RequestStats};

    use super::*;

    #[test]
    fn only_types_of_requests_that_occurred_have_a_line() {
        let read = OperationStats {
            count: 3,
            bytes: 3 << 20,
            errors: 1,
        };
        let queue = QueueStats {
            requests: RequestStats {
                read,
                ..RequestStats::default()
            },
            in_flight: 2,
            in_flight_max: 7,
            latency: LatencyStats {
                samples: 3,
                p50_us: 1.5,
                p99_us: 2.0,
                p999_us: 2.0,
                max_us: 2.0,
            },
            cpu_us: Some(2500),
        };
        let stats = DeviceStats {
            queues: vec![queue],
        };
        let disks = BTreeMap::from([("disk0".to_owned(), stats)]);
        let text = show(&disks, false).unwrap();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            lines[1],
            ["disk0", "0", "all", "3", "1.5", "2.0", "2.0", "2.0"]
        );
        assert_eq!(lines[2], ["disk0", "0", "read", "3", "3.0", "1"]);
        assert_eq!(lines[3], ["disk0", "0", "in", "flight", "2"]);
        assert_eq!(lines[4][2..], ["max", "in", "flight", "7"]);
        assert_eq!(lines[5][2..], ["CPU", "ms", "2.5"]);
        assert_eq!(lines.len(), 6);
        let json = show(&disks, true).unwrap();
        assert_eq!(
            serde_json::from_str::<BTreeMap<String, DeviceStats>>(&json).unwrap(),
            disks
        );
    }
}

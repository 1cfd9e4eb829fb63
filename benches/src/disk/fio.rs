//! fio with io_uring directly on the file: the limit of the medium.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::cases::{Case, IMAGE, Pattern};
use super::load::{Busy, Figures, TIME};

/// Runs `case` with fio once.
pub fn measure(case: &Case, image: &Path) -> Figures {
    let rw = match case.pattern {
        Pattern::Read => "randread",
        Pattern::Write => "randwrite",
        Pattern::Mixed => "randrw",
        Pattern::ReadOn => "read",
        Pattern::WriteOn => "write",
    };
    // In sequence, each job has a part of the disk of its own.
    let jobs = case.queues as u64;
    let (size, step) = match case.pattern.is_sequential() {
        true => (IMAGE / jobs, IMAGE / jobs),
        false => (IMAGE, 0),
    };
    let output = Command::new("fio")
        .args([
            "--name=bench",
            "--direct=1",
            "--ioengine=io_uring",
            "--thread",
        ])
        .args(["--norandommap", "--time_based", "--group_reporting"])
        .args(["--unified_rw_reporting=1", "--output-format=json"])
        .arg(format!("--filename={}", image.display()))
        .arg(format!("--rw={rw}"))
        .arg("--rwmixread=70")
        .arg(format!("--bs={}", case.pattern.block()))
        .arg(format!("--iodepth={}", case.depth))
        .arg(format!("--numjobs={jobs}"))
        .arg(format!("--size={size}"))
        .arg(format!("--offset_increment={step}"))
        .arg("--ramp_time=100ms")
        .arg(format!("--runtime={}ms", TIME.as_millis()))
        .output()
        .expect("fio was there a moment ago");
    let said = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "fio: {error}");
    // Notes may come before the report.
    let report = said.find('{').map_or("", |at| &said[at..]);
    let report: Value = serde_json::from_str(report).expect("fio reports in JSON");
    let job = &report["jobs"][0];
    let number = |value: &Value| value.as_f64().expect("fio reports numbers");
    let all = &job["mixed"];
    let at = |part| number(&all["clat_ns"]["percentile"][part]) / 1e3;
    let iops = number(&all["iops"]);
    // Percent of its running time, of all jobs together.
    let cpu = (number(&job["usr_cpu"]) + number(&job["sys_cpu"])) / 100.0 * jobs as f64;
    Figures {
        iops,
        bytes: number(&all["bw_bytes"]),
        p50: at("50.000000"),
        p99: at("99.000000"),
        cpu: cpu / iops * 1e6,
        resident: None,
        back: Busy {
            ran: cpu,
            waited: 0.0,
        },
        front: Busy::default(),
    }
}

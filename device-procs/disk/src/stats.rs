//! The statistics of a queue: its worker records them, the control thread reads them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use outrigger_protocol::device::{LatencyStats, OperationStats, QueueStats, RequestStats};

/// The largest value of the histogram in nanoseconds, 137 s; longer times count as this.
const MAX_LATENCY_NS: u64 = 1 << 37;
/// Significant digits of the histogram, which then takes 32 KiB.
const SIGNIFICANT_DIGITS: u8 = 2;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// VIRTIO_BLK_T_IN.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_DISCARD.
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    WriteZeroes,
    /// VIRTIO_BLK_T_GET_ID, an unknown type, or a request without a header.
    Other,
}

impl RequestKind {
    /// Its name in log lines.
    pub fn name(self) -> &'static str {
        match self {
            RequestKind::Read => "read",
            RequestKind::Write => "write",
            RequestKind::Flush => "flush",
            RequestKind::Discard => "discard",
            RequestKind::WriteZeroes => "write-zeroes",
            RequestKind::Other => "other",
        }
    }
}

/// Records what one queue does. Clones share the counters. Only the queue's worker takes
/// the lock, except for the moment of a [`StatsRecorder::snapshot`].
#[derive(Clone)]
pub struct StatsRecorder(Arc<Mutex<QueueCounters>>);

struct QueueCounters {
    requests: RequestStats,
    /// The number that the worker reported last.
    in_flight: u64,
    in_flight_max: u64,
    /// Latencies in nanoseconds.
    latencies: Histogram<u64>,
    max_latency: Duration,
}

impl Default for StatsRecorder {
    fn default() -> Self {
        let latencies = Histogram::new_with_bounds(1, MAX_LATENCY_NS, SIGNIFICANT_DIGITS);
        StatsRecorder(Arc::new(Mutex::new(QueueCounters {
            requests: RequestStats::default(),
            in_flight: 0,
            in_flight_max: 0,
            latencies: latencies.expect("the bounds are in order"),
            max_latency: Duration::ZERO,
        })))
    }
}

impl StatsRecorder {
    fn lock(&self) -> MutexGuard<'_, QueueCounters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request was popped; `in_flight` requests are in flight now.
    pub fn started(&self, in_flight: usize) {
        let mut counters = self.lock();
        counters.in_flight = in_flight as u64;
        counters.in_flight_max = counters.in_flight_max.max(counters.in_flight);
    }

    /// A request for `bytes` bytes has ended, `latency` after it was popped; `in_flight`
    /// requests are in flight now.
    pub fn completed(
        &self,
        kind: RequestKind,
        bytes: u64,
        ok: bool,
        latency: Duration,
        in_flight: usize,
    ) {
        let mut counters = self.lock();
        counters.in_flight = in_flight as u64;
        let stats = match kind {
            RequestKind::Read => &mut counters.requests.read,
            RequestKind::Write => &mut counters.requests.write,
            RequestKind::Flush => &mut counters.requests.flush,
            RequestKind::Discard => &mut counters.requests.discard,
            RequestKind::WriteZeroes => &mut counters.requests.write_zeroes,
            RequestKind::Other => &mut counters.requests.other,
        };
        *stats = OperationStats {
            count: stats.count.saturating_add(1),
            bytes: stats.bytes.saturating_add(if ok { bytes } else { 0 }),
            errors: stats.errors.saturating_add(u64::from(!ok)),
        };
        counters.max_latency = counters.max_latency.max(latency);
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        counters.latencies.saturating_record(nanoseconds);
    }

    /// The statistics so far, without the CPU time.
    pub fn snapshot(&self) -> QueueStats {
        let counters = self.lock();
        let max = microseconds(counters.max_latency);
        // The histogram returns the upper end of a bucket, which may be above the maximum.
        let quantile = |quantile| {
            let latency = Duration::from_nanos(counters.latencies.value_at_quantile(quantile));
            microseconds(latency).min(max)
        };
        QueueStats {
            requests: counters.requests.clone(),
            in_flight: counters.in_flight,
            in_flight_max: counters.in_flight_max,
            latency: LatencyStats {
                samples: counters.latencies.len(),
                p50_us: quantile(0.5),
                p99_us: quantile(0.99),
                p999_us: quantile(0.999),
                max_us: max,
            },
            cpu_us: None,
        }
    }
}

fn microseconds(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn an_unused_recorder_has_no_latencies() {
        assert_eq!(StatsRecorder::default().snapshot(), QueueStats::default());
    }

    #[test]
    fn requests_are_counted_by_kind() {
        let recorder = StatsRecorder::default();
        let other = recorder.clone();
        recorder.started(3);
        recorder.completed(RequestKind::Read, 4096, true, US, 2);
        recorder.started(3);
        recorder.completed(RequestKind::Read, 512, false, US, 2);
        other.completed(RequestKind::Flush, 0, true, US, 1);
        let stats = other.snapshot();
        let (bytes, errors) = (4096, 1);
        let read = OperationStats {
            count: 2,
            bytes,
            errors,
        };
        assert_eq!(stats.requests.read, read);
        assert_eq!(stats.requests.flush.count, 1);
        assert_eq!(stats.requests.write, OperationStats::default());
        assert_eq!((stats.in_flight, stats.in_flight_max), (1, 3));
        assert_eq!(stats.latency.samples, 3);
    }

    #[test]
    fn percentiles_are_within_one_percent() {
        let recorder = StatsRecorder::default();
        for time in 1..=10_000 {
            recorder.completed(RequestKind::Write, 1, true, time * US, 0);
        }
        let latency = recorder.snapshot().latency;
        for (got, exact) in [
            (latency.p50_us, 5_000.0),
            (latency.p99_us, 9_900.0),
            (latency.p999_us, 9_990.0),
        ] {
            assert!((exact..exact * 1.01).contains(&got), "{got}, not {exact}");
        }
        assert_eq!(latency.max_us, 10_000.0);
    }

    #[test]
    fn memory_is_bounded_for_any_latency() {
        let recorder = StatsRecorder::default();
        for time in [Duration::ZERO, US, Duration::from_secs(3600), Duration::MAX] {
            recorder.completed(RequestKind::Other, u64::MAX, true, time, 0);
        }
        let (stats, counters) = (recorder.snapshot(), recorder.lock());
        let size =
            counters.latencies.distinct_values() * size_of::<u64>() + size_of::<QueueCounters>();
        assert!(size < 48 << 10, "{size} bytes");
        assert_eq!(stats.latency.samples, 4);
        assert_eq!(stats.requests.other.bytes, u64::MAX);
        assert!(stats.latency.p50_us <= stats.latency.p999_us);
    }

    /// Not a test: `cargo test --release -p device-disk -- --ignored --nocapture cost`.
    #[test]
    #[ignore = "measures"]
    fn cost_of_a_request() {
        let recorder = StatsRecorder::default();
        let (count, start) = (10_000_000u32, std::time::Instant::now());
        for time in 0..count {
            recorder.started(1);
            let latency = Duration::from_nanos(time.into());
            recorder.completed(RequestKind::Read, 4096, true, latency, 0);
        }
        let cost = start.elapsed() / count;
        let len = recorder.lock().latencies.distinct_values();
        println!("{cost:?} a request, {len} counters");
    }
}

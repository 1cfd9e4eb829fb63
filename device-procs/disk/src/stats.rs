//! What a queue has done: counted by its worker as it goes, read by the control thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use outrigger_protocol::device::{LatencyStats, OperationStats, QueueStats, RequestStats};

/// The longest time that is told apart from longer ones, in nanoseconds: 137 s.
const LONGEST: u64 = 1 << 37;
/// Digits of a time that are kept. With these bounds the histogram has 32 KiB.
const DIGITS: u8 = 2;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// To read.
    Read,
    /// To write.
    Write,
    /// To make writes last.
    Flush,
    /// To give ranges back.
    Discard,
    /// To zero ranges.
    WriteZeroes,
    /// Anything else, or nothing that makes sense.
    Other,
}

impl RequestKind {
    /// Its name, for messages.
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

/// Takes down what one queue does. Clones share one book. The lock is its worker's alone
/// but for the moment of a [`StatsRecorder::snapshot`].
#[derive(Clone)]
pub struct StatsRecorder(Arc<Mutex<QueueCounters>>);

struct QueueCounters {
    requests: RequestStats,
    in_flight: u64,
    in_flight_max: u64,
    /// Nanoseconds.
    times: Histogram<u64>,
    longest: Duration,
}

impl Default for StatsRecorder {
    fn default() -> Self {
        let times = Histogram::new_with_bounds(1, LONGEST, DIGITS);
        StatsRecorder(Arc::new(Mutex::new(QueueCounters {
            requests: RequestStats::default(),
            in_flight: 0,
            in_flight_max: 0,
            times: times.expect("the bounds are in order"),
            longest: Duration::ZERO,
        })))
    }
}

impl StatsRecorder {
    fn lock(&self) -> MutexGuard<'_, QueueCounters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `count` requests were taken from the ring.
    pub fn begun(&self, count: u64) {
        let mut book = self.lock();
        book.in_flight = book.in_flight.saturating_add(count);
        book.in_flight_max = book.in_flight_max.max(book.in_flight);
    }

    /// A request for `bytes` is complete, `took` after it was taken.
    pub fn completed(&self, kind: RequestKind, bytes: u64, ok: bool, took: Duration) {
        let mut book = self.lock();
        book.in_flight = book.in_flight.saturating_sub(1);
        let count = match kind {
            RequestKind::Read => &mut book.requests.read,
            RequestKind::Write => &mut book.requests.write,
            RequestKind::Flush => &mut book.requests.flush,
            RequestKind::Discard => &mut book.requests.discard,
            RequestKind::WriteZeroes => &mut book.requests.write_zeroes,
            RequestKind::Other => &mut book.requests.other,
        };
        *count = OperationStats {
            count: count.count.saturating_add(1),
            bytes: count.bytes.saturating_add(if ok { bytes } else { 0 }),
            errors: count.errors.saturating_add(u64::from(!ok)),
        };
        book.longest = book.longest.max(took);
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        book.times.saturating_record(nanoseconds);
    }

    /// What is in the book.
    pub fn snapshot(&self) -> QueueStats {
        let book = self.lock();
        let longest = microseconds(book.longest);
        // The histogram's answer is the end of a range, which the longest may not reach.
        let at = |quantile| {
            let time = Duration::from_nanos(book.times.value_at_quantile(quantile));
            microseconds(time).min(longest)
        };
        QueueStats {
            requests: book.requests.clone(),
            in_flight: book.in_flight,
            in_flight_max: book.in_flight_max,
            latency: LatencyStats {
                samples: book.times.len(),
                p50_us: at(0.5),
                p99_us: at(0.99),
                p999_us: at(0.999),
                max_us: longest,
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
    fn an_empty_book_has_no_times() {
        assert_eq!(StatsRecorder::default().snapshot(), QueueStats::default());
    }

    #[test]
    fn requests_are_counted_by_kind() {
        let recorder = StatsRecorder::default();
        let other = recorder.clone();
        recorder.begun(3);
        recorder.completed(RequestKind::Read, 4096, true, US);
        recorder.begun(1);
        recorder.completed(RequestKind::Read, 512, false, US);
        other.completed(RequestKind::Flush, 0, true, US);
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
    fn percentiles_are_within_a_hundredth() {
        let recorder = StatsRecorder::default();
        for time in 1..=10_000 {
            recorder.completed(RequestKind::Write, 1, true, time * US);
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
    fn its_size_is_bounded_whatever_the_times() {
        let recorder = StatsRecorder::default();
        for time in [Duration::ZERO, US, Duration::from_secs(3600), Duration::MAX] {
            recorder.completed(RequestKind::Other, u64::MAX, true, time);
        }
        let (stats, book) = (recorder.snapshot(), recorder.lock());
        let size = book.times.distinct_values() * size_of::<u64>() + size_of::<QueueCounters>();
        assert!(size < 48 << 10, "{size} bytes");
        assert_eq!(stats.latency.samples, 4);
        assert_eq!(stats.requests.other.bytes, u64::MAX);
        assert!(stats.latency.p50_us <= stats.latency.p999_us);
    }

    /// Not a test: `cargo test --release -p device-disk -- --ignored --nocapture costs`.
    #[test]
    #[ignore = "measures"]
    fn what_a_request_costs() {
        let recorder = StatsRecorder::default();
        let (count, start) = (10_000_000u32, std::time::Instant::now());
        for time in 0..count {
            recorder.begun(1);
            recorder.completed(
                RequestKind::Read,
                4096,
                true,
                Duration::from_nanos(time.into()),
            );
        }
        let cost = start.elapsed() / count;
        let len = recorder.lock().times.distinct_values();
        println!("{cost:?} a request, {len} counters");
    }
}

//! The CPU time of each worker thread.

use std::mem::MaybeUninit;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The CPU clocks of the worker threads that have started. Clones share the clocks.
#[derive(Clone, Default)]
pub struct WorkerClocks(Arc<[OnceLock<libc::clockid_t>]>);

impl WorkerClocks {
    /// Room for the clocks of `workers` threads.
    pub fn new(workers: usize) -> Self {
        WorkerClocks((0..workers).map(|_| OnceLock::new()).collect())
    }

    /// Registers the calling thread as `worker`. The thread must live as long as the
    /// process. Does nothing if there is no room for it.
    pub fn register(&self, worker: usize) {
        let mut clock = 0;
        // SAFETY: `pthread_self` is a live thread, and `clock` can be written to.
        let result = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) };
        if result == 0
            && let Some(cell) = self.0.get(worker)
        {
            // Each worker registers once.
            let _ = cell.set(clock);
        }
    }

    /// The CPU time of each worker; `None` for one that has not started.
    pub fn read(&self) -> Vec<Option<Duration>> {
        self.0
            .iter()
            .map(|clock| read_clock(*clock.get()?))
            .collect()
    }
}

fn read_clock(clock: libc::clockid_t) -> Option<Duration> {
    let mut time = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: the clock belongs to a thread that lives as long as the process; `time` is
    // initialised if the call succeeds.
    let time = unsafe {
        if libc::clock_gettime(clock, time.as_mut_ptr()) != 0 {
            return None;
        }
        time.assume_init()
    };
    let seconds = u64::try_from(time.tv_sec).ok()?;
    Some(Duration::new(seconds, u32::try_from(time.tv_nsec).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_registered_workers_have_a_time() {
        let clocks = WorkerClocks::new(2);
        clocks.register(0);
        clocks.register(9);
        let times = clocks.read();
        assert!(times[0].is_some() && times[1].is_none());
    }
}

//! Restarting a device whose process has ended.

use std::time::{Duration, Instant};

use rustix::process::Pid;

use super::backoff::{MAX_RESTARTS, RESTART_WINDOW};
use super::{Supervisor, report};

impl Supervisor {
    /// Starts the next process of a device, now or after a delay, if that is `wanted` and there
    /// were not too many restarts. Reports `what` happened and what follows. `started` is when
    /// the process that ended was started.
    pub fn restart(&mut self, index: usize, started: Instant, wanted: bool, what: &str) {
        if !wanted {
            return report(format_args!("{what}; not started again"));
        }
        let now = Instant::now();
        let device = &mut self.devices[index];
        match device.history.next_delay(started, now) {
            None => report(format_args!(
                "{what}; given up after {MAX_RESTARTS} starts within {} s",
                RESTART_WINDOW.as_secs()
            )),
            Some(Duration::ZERO) => match self.start_current(index) {
                Ok(pid) => report(format_args!("{what}; started again as process {pid}")),
                Err(error) => report(format_args!("{what}; {error:#}")),
            },
            Some(delay) => {
                device.restart_at = Some(now + delay);
                report(format_args!(
                    "{what}; to be started again in {} ms",
                    delay.as_millis()
                ));
            }
        }
    }

    /// Restarts a device at once if no process serves it and none is about to.
    pub fn restart_if_unserved(&mut self, index: usize) {
        let device = &self.devices[index];
        if device.current.is_none() && !device.external {
            let what = format!("{}: its process has ended", device.id());
            self.restart(index, Instant::now(), true, &what);
        }
    }

    /// Starts the processes whose delay is over.
    pub fn restart_due(&mut self) {
        let now = Instant::now();
        for index in 0..self.devices.len() {
            if self.devices[index].restart_at.is_some_and(|at| at <= now) {
                self.devices[index].restart_at = None;
                if let Err(error) = self.start_current(index) {
                    report(error);
                }
            }
        }
    }

    /// Starts the process that serves a device from now on. If that fails, it is tried again
    /// after a delay.
    fn start_current(&mut self, index: usize) -> anyhow::Result<Pid> {
        let spec = self.devices[index].spec.spawn_spec();
        let started = self.processes.spawn(Some(index), spec);
        let device = &mut self.devices[index];
        match started {
            Ok((number, pid)) => {
                device.current = Some(number);
                Ok(pid)
            }
            Err(error) => {
                let now = Instant::now();
                let delay = device.history.next_delay(now, now);
                device.restart_at = delay.map(|delay| now + delay);
                Err(error)
            }
        }
    }
}

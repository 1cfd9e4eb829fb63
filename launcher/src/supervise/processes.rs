//! The processes of a machine, and the timers that kill those that do not end or do not
//! become ready in time.

use std::collections::BTreeMap;
use std::io::PipeReader;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};

use super::spawn::{self, SpawnSpec};
use crate::messages::{ProcessNumber, SupervisorEvent};

/// A running process.
pub struct ChildProcess {
    /// The device that it serves, or `runner`.
    pub id: String,
    /// Name of its program.
    pub program: &'static str,
    /// Its process id.
    pub pid: Pid,
    /// The index of the device that it serves; `None` for the runner.
    pub device: Option<usize>,
    /// When it was started.
    pub started: Instant,
    /// Whether the runner has been connected to it.
    pub was_connected: bool,
    /// Whether it has the launcher's terminal, and so may have changed its mode.
    pub has_stdin: bool,
}

/// When a process will be killed.
struct KillTimer {
    at: Instant,
    number: ProcessNumber,
    /// Whether [`ProcessTable::cancel_kill`] removes the timer: the process may still become
    /// ready, or may be connected again.
    revocable: bool,
}

/// All processes that the launcher started and that have not ended.
pub struct ProcessTable {
    processes: BTreeMap<ProcessNumber, ChildProcess>,
    timers: Vec<KillTimer>,
    /// Number of processes started so far.
    started: ProcessNumber,
    events: Sender<SupervisorEvent>,
}

impl ProcessTable {
    /// An empty table. What happens to its processes is reported to `events`.
    pub fn new(events: Sender<SupervisorEvent>) -> Self {
        ProcessTable {
            processes: BTreeMap::new(),
            timers: Vec::new(),
            started: 0,
            events,
        }
    }

    /// Starts a process that serves the device with the index `device`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn spawn(
        &mut self,
        device: Option<usize>,
        spec: SpawnSpec,
    ) -> anyhow::Result<(ProcessNumber, Pid)> {
        let (id, program, has_stdin) = (spec.id.clone(), spec.program, spec.stdin);
        let mut child = spawn::spawn(spec)?;
        self.started += 1;
        let (number, pid) = (self.started, Pid::from_child(&child));
        let process = ChildProcess {
            id,
            program,
            pid,
            device,
            started: Instant::now(),
            was_connected: false,
            has_stdin,
        };
        self.processes.insert(number, process);
        let events = self.events.clone();
        std::thread::spawn(move || {
            if let Ok(status) = child.wait() {
                // Fails only when the launcher is about to exit.
                let _ = events.send(SupervisorEvent::Exited(number, status));
            }
        });
        Ok((number, pid))
    }

    /// Starts a process that reports when it is ready.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn spawn_with_ready(
        &mut self,
        device: usize,
        mut spec: SpawnSpec,
    ) -> anyhow::Result<ProcessNumber> {
        let (reader, _writer) = spawn::add_ready_pipe(&mut spec).context("pipe")?;
        let (number, _) = self.spawn(Some(device), spec)?;
        let events = self.events.clone();
        std::thread::spawn(move || {
            if spawn::wait_ready(reader) {
                let _ = events.send(SupervisorEvent::Ready(number));
            }
        });
        Ok(number)
    }

    /// Forwards the standard error of a process, and reports its first line as an event.
    pub fn forward_stderr(&self, number: ProcessNumber, reader: PipeReader) {
        let events = self.events.clone();
        std::thread::spawn(move || {
            spawn::forward_stderr(reader, |line| {
                let _ = events.send(SupervisorEvent::FirstLine(number, line));
            });
        });
    }

    /// Removes a process that has ended, and its timers.
    pub fn remove(&mut self, number: ProcessNumber) -> Option<ChildProcess> {
        self.timers.retain(|timer| timer.number != number);
        self.processes.remove(&number)
    }

    /// Returns a running process.
    pub fn get(&self, number: ProcessNumber) -> Option<&ChildProcess> {
        self.processes.get(&number)
    }

    /// Returns a running process.
    pub fn get_mut(&mut self, number: ProcessNumber) -> Option<&mut ChildProcess> {
        self.processes.get_mut(&number)
    }

    /// Returns the numbers of all running processes.
    pub fn numbers(&self) -> Vec<ProcessNumber> {
        self.processes.keys().copied().collect()
    }

    /// Sends a signal to a process.
    pub fn signal(&self, number: ProcessNumber, signal: Signal) {
        if let Some(process) = self.processes.get(&number) {
            // Fails if the process has ended and its event is still in the channel.
            let _ = kill_process(process.pid, signal);
        }
    }

    /// Ends a process with SIGTERM, and kills it if it still runs after `grace`.
    pub fn terminate(&mut self, number: ProcessNumber, grace: Duration) {
        self.signal(number, Signal::TERM);
        self.add_timer(number, grace, false);
    }

    /// Kills a process after `grace`, unless [`Self::cancel_kill`] is called before.
    pub fn kill_unless_cancelled(&mut self, number: ProcessNumber, grace: Duration) {
        self.add_timer(number, grace, true);
    }

    fn add_timer(&mut self, number: ProcessNumber, grace: Duration, revocable: bool) {
        self.timers.push(KillTimer {
            at: Instant::now() + grace,
            number,
            revocable,
        });
    }

    /// Cancels the revocable timers of a process.
    pub fn cancel_kill(&mut self, number: ProcessNumber) {
        self.timers
            .retain(|timer| timer.number != number || !timer.revocable);
    }

    /// Returns when the next timer expires.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.iter().map(|timer| timer.at).min()
    }

    /// Kills the processes whose timers have expired.
    pub fn kill_expired(&mut self) {
        let now = Instant::now();
        for timer in self.timers.iter().filter(|timer| timer.at <= now) {
            self.signal(timer.number, Signal::KILL);
        }
        self.timers.retain(|timer| timer.at > now);
    }
}

//! Starts the processes, waits, and ends them together: the runner's exit code
//! is ours, and nobody is left behind, whatever dies first.

use std::io::{PipeReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use outrigger_cli::{USER_LEFT, signals};
use outrigger_protocol::exit;
use rustix::process::{Pid, Signal, kill_process};

use crate::plan::{Plan, Program};
use crate::process;

/// How long a device process may take until it serves.
pub const READY: Duration = Duration::from_secs(10);
/// How long processes may take to end before they are killed.
const GRACE: Duration = Duration::from_secs(5);

enum Event {
    /// This device process serves.
    Ready(usize),
    /// This process ended; the runner has the number after the last device's.
    Ended(usize, ExitStatus),
    /// Somebody wants us to end.
    Signal,
}

struct Process {
    id: String,
    name: &'static str,
    pid: Pid,
    ended: Option<ExitStatus>,
}

/// Runs `plan` to its end; returns the exit code. A process that ends before it is
/// ready has said why, so its exit code is all that is added.
///
/// # Errors
/// When a process cannot be started or does not get ready.
pub fn run(mut plan: Plan, quiet: bool) -> anyhow::Result<u8> {
    plan.connect().context("connecting the processes")?;
    let set = signals::ending();
    signals::block(&set);
    let (sender, events) = channel();
    let to = sender.clone();
    std::thread::spawn(move || {
        loop {
            signals::wait(&set);
            if to.send(Event::Signal).is_err() {
                return;
            }
        }
    });
    let mut group = Group {
        processes: Vec::new(),
        sender,
        events,
        quiet,
    };
    let result = group.run(plan);
    group.end_all();
    result
}

struct Group {
    processes: Vec<Process>,
    sender: Sender<Event>,
    events: Receiver<Event>,
    quiet: bool,
}

impl Group {
    fn run(&mut self, plan: Plan) -> anyhow::Result<u8> {
        let Plan { devices, runner } = plan;
        let count = devices.len();
        for device in devices {
            self.start_device(device.program)?;
        }
        if let Some(code) = self.wait_ready(count)? {
            return Ok(code);
        }
        let child = process::start(&runner, &[])?;
        self.adopt(&runner, child);
        drop(runner);
        self.wait_runner(count)
    }

    fn adopt(&mut self, program: &Program, mut child: Child) {
        let index = self.processes.len();
        let pid = Pid::from_child(&child);
        if !self.quiet {
            eprintln!(
                "{:10} {:16} pid {:<8} {}",
                program.id,
                program.name,
                pid.as_raw_nonzero(),
                program.summary
            );
        }
        self.processes.push(Process {
            id: program.id.clone(),
            name: program.name,
            pid,
            ended: None,
        });
        let to = self.sender.clone();
        std::thread::spawn(move || {
            if let Ok(status) = child.wait() {
                // Fails only when we are gone ourselves.
                let _ = to.send(Event::Ended(index, status));
            }
        });
    }

    fn start_device(&mut self, mut program: Program) -> anyhow::Result<()> {
        let (reader, writer) = std::io::pipe().context("pipe")?;
        let writer = OwnedFd::from(writer);
        program.args.push("--ready-fd".into());
        program.args.push(writer.as_raw_fd().to_string().into());
        let child = process::start(&program, &[&writer])?;
        let index = self.processes.len();
        self.adopt(&program, child);
        let to = self.sender.clone();
        std::thread::spawn(move || {
            if says_ready(reader) {
                let _ = to.send(Event::Ready(index));
            }
        });
        Ok(())
    }

    /// Waits for all device processes; returns the exit code of one that gave up.
    fn wait_ready(&mut self, count: usize) -> anyhow::Result<Option<u8>> {
        let deadline = Instant::now() + READY;
        let mut ready = vec![false; count];
        while let Some(waiting) = ready.iter().position(|&r| !r) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Ready(index)) => ready[index] = true,
                Ok(Event::Ended(index, status)) => {
                    self.processes[index].ended = Some(status);
                    if let Some(code @ (exit::FAILURE | exit::USAGE)) = code_of(status) {
                        return Ok(Some(code));
                    }
                    let Process { id, name, .. } = &self.processes[index];
                    bail!("{id}: {name} did not start: {}", describe(status));
                }
                Ok(Event::Signal) => bail!("stopped by a signal"),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let Process { id, name, .. } = &self.processes[waiting];
                    bail!("{id}: {name} was not ready within {READY:?}");
                }
            }
        }
        Ok(None)
    }

    /// Waits for the runner, which ends by itself when it loses a device. If that
    /// is a console whose user left (Ctrl-A x), the end is what the user wished.
    fn wait_runner(&mut self, runner: usize) -> anyhow::Result<u8> {
        let mut quit = false;
        let mut deadline: Option<Instant> = None;
        loop {
            let limit = deadline.map_or(Duration::MAX, |at| {
                at.saturating_duration_since(Instant::now())
            });
            match self.next(limit) {
                Ok(Event::Ended(index, status)) if index == runner => {
                    self.processes[index].ended = Some(status);
                    let code = code_of(status).unwrap_or(exit::FAILURE);
                    let wished = quit && code == exit::DEVICE_LOST;
                    return Ok(if wished { exit::POWERED_OFF } else { code });
                }
                Ok(Event::Ended(index, status)) => {
                    self.processes[index].ended = Some(status);
                    let Process { id, name, .. } = &self.processes[index];
                    if status.code() == Some(USER_LEFT.into()) {
                        quit = true;
                    } else if !status.success() {
                        eprintln!("outrigger: {id}: {name} died: {}", describe(status));
                    }
                    deadline.get_or_insert(Instant::now() + GRACE);
                }
                Ok(Event::Signal) => {
                    self.signal(runner, Signal::TERM);
                    deadline.get_or_insert(Instant::now() + GRACE);
                }
                Ok(Event::Ready(_)) => {}
                Err(_) => {
                    self.signal(runner, Signal::KILL);
                    deadline = Some(Instant::now() + GRACE);
                }
            }
        }
    }

    fn next(&self, limit: Duration) -> Result<Event, RecvTimeoutError> {
        if limit == Duration::MAX {
            return self
                .events
                .recv()
                .map_err(|_| RecvTimeoutError::Disconnected);
        }
        self.events.recv_timeout(limit)
    }

    fn signal(&self, index: usize, signal: Signal) {
        let process = &self.processes[index];
        if process.ended.is_none() {
            // It may have ended without our having heard of it yet.
            let _ = kill_process(process.pid, signal);
        }
    }

    /// Ends whoever is left: politely, then by force.
    fn end_all(&mut self) {
        for signal in [Signal::TERM, Signal::KILL] {
            for index in 0..self.processes.len() {
                self.signal(index, signal);
            }
            let deadline = Instant::now() + GRACE;
            while self.processes.iter().any(|p| p.ended.is_none()) {
                let left = deadline.saturating_duration_since(Instant::now());
                match self.events.recv_timeout(left) {
                    Ok(Event::Ended(index, status)) => self.processes[index].ended = Some(status),
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
        }
    }
}

/// Reads until the process says that it is ready or closes the pipe.
fn says_ready(mut reader: PipeReader) -> bool {
    let mut text = Vec::new();
    let mut buffer = [0; 64];
    while !text.ends_with(b"ready\n") {
        match reader.read(&mut buffer) {
            Ok(count) if count > 0 && text.len() < 4096 => {
                text.extend_from_slice(&buffer[..count]);
            }
            _ => return false,
        }
    }
    true
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown status".into(),
    }
}

fn code_of(status: ExitStatus) -> Option<u8> {
    status.code().and_then(|code| u8::try_from(code).ok())
}

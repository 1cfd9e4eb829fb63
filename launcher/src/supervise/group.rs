//! The processes of a machine, and what is done when something happens to them.

use std::collections::BTreeMap;
use std::io::PipeReader;
use std::os::fd::AsRawFd;
use std::process::ExitStatus;
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use outrigger_cli::CONSOLE_QUIT;
use outrigger_protocol::{control, exit};
use rustix::process::{Pid, Signal, kill_process};

use super::device::{Device, Number, Recipe};
use super::policy::{STARTS, WITHIN};
use super::process::{self, Start, code_of, describe};
use super::terminal::Terminal;
use super::{Event, Events, READY};
use crate::config::{Machine, Restart};
use crate::control::Server;
use crate::plan::Plan;
use crate::runtime::Runtime;

/// How long processes may take to end before they are killed.
const GRACE: Duration = Duration::from_secs(5);
/// How long one may take whose successor is at work, or waits for its end.
const RETIREMENT: Duration = Duration::from_secs(1);
/// How long one may live that the runner has given up. If it is about to end by
/// itself, it does so before.
const LOST: Duration = Duration::from_millis(100);

/// A process that runs.
pub struct Process {
    id: String,
    name: &'static str,
    pid: Pid,
    device: Option<usize>,
    started: Instant,
    /// The runner has worked with it.
    pub served: bool,
    /// It may have changed the terminal's mode.
    stdin: bool,
}

/// A process that will be killed.
struct Sentence {
    at: Instant,
    number: Number,
    /// Because the runner has given it up, or it is not ready: it may yet improve.
    probation: bool,
}

/// All processes of a machine.
pub struct Group {
    pub machine: Machine,
    pub runtime: Runtime,
    pub devices: Vec<Device>,
    pub terminal: Option<Terminal>,
    processes: BTreeMap<Number, Process>,
    runner: Option<Number>,
    sentences: Vec<Sentence>,
    started: Number,
    restart: Restart,
    /// The user has left the console.
    quit: bool,
    /// The runner has been told to end.
    ending: bool,
    sender: Sender<Event>,
    quiet: bool,
}

impl Group {
    pub fn new(
        machine: Machine,
        restart: Restart,
        runtime: Runtime,
        sender: Sender<Event>,
        quiet: bool,
    ) -> Self {
        Group {
            machine,
            runtime,
            devices: Vec::new(),
            terminal: None,
            processes: BTreeMap::new(),
            runner: None,
            sentences: Vec::new(),
            started: 0,
            restart,
            quit: false,
            ending: false,
            sender,
            quiet,
        }
    }

    /// Starts all, and goes on until the runner ends.
    pub fn run(&mut self, plan: Plan, events: &Events, server: &mut Server) -> anyhow::Result<u8> {
        let mut runner = plan.runner;
        for device in plan.devices {
            let (virtio, program) = (device.kind.is_some(), device.program.clone());
            let recipe = Recipe::new(program, &[], &mut self.runtime)?;
            let path = recipe.endpoint.path.to_string_lossy().into_owned();
            let (option, value) = device.option(&path);
            runner.arg(option, value);
            self.devices.push(Device::new(recipe, virtio));
        }
        for index in 0..self.devices.len() {
            let start = self.devices[index].recipe.start();
            let number = self.start_watched(index, start)?;
            self.devices[index].current = Some(number);
            self.show(number, &self.devices[index].recipe.program.summary);
        }
        if let Some(code) = self.wait_ready(events)? {
            return Ok(code);
        }
        runner.arg("--control", self.runtime.control());
        let start = Start {
            id: runner.id,
            name: runner.name,
            args: runner.args,
            fds: plan.inherited.iter().map(AsRawFd::as_raw_fd).collect(),
            stdin: false,
            stderr: None,
        };
        let number = self.start(None, start)?;
        self.runner = Some(number);
        self.show(number, &runner.summary);
        drop(plan.inherited);
        server.begin();
        self.serve(events)
    }

    /// Starts a process, which serves `device`.
    pub fn start(&mut self, device: Option<usize>, start: Start) -> anyhow::Result<Number> {
        let (id, name, stdin) = (start.id.clone(), start.name, start.stdin);
        let mut child = process::start(start)?;
        self.started += 1;
        let number = self.started;
        let process = Process {
            id,
            name,
            pid: Pid::from_child(&child),
            device,
            started: Instant::now(),
            served: false,
            stdin,
        };
        self.processes.insert(number, process);
        let to = self.sender.clone();
        std::thread::spawn(move || {
            if let Ok(status) = child.wait() {
                // Fails only when we are gone ourselves.
                let _ = to.send(Event::Ended(number, status));
            }
        });
        Ok(number)
    }

    /// Starts a process that says when it is ready.
    pub fn start_watched(&mut self, device: usize, mut start: Start) -> anyhow::Result<Number> {
        let (reader, writer) = process::ready_pipe().context("pipe")?;
        start.args.extend(process::ready_option(&writer));
        start.fds.push(writer.as_raw_fd());
        let number = self.start(Some(device), start)?;
        let to = self.sender.clone();
        std::thread::spawn(move || {
            if process::says_ready(reader) {
                let _ = to.send(Event::Ready(number));
            }
        });
        Ok(number)
    }

    /// Has what a process says on its standard error looked at.
    pub fn listen_to(&self, number: Number, reader: PipeReader) {
        let to = self.sender.clone();
        std::thread::spawn(move || {
            process::pass_on(reader, |said| {
                let _ = to.send(Event::Complaint(number, said));
            });
        });
    }

    fn show(&self, number: Number, summary: &str) {
        if let Some(Process { id, name, pid, .. }) = self.processes.get(&number)
            && !self.quiet
        {
            let pid = pid.as_raw_nonzero();
            eprintln!("{id:10} {name:16} pid {pid:<8} {summary}");
        }
    }

    /// Waits for all device processes; returns the exit code of one that gave up.
    fn wait_ready(&mut self, events: &Events) -> anyhow::Result<Option<u8>> {
        let deadline = Instant::now() + READY;
        let mut waiting: Vec<Number> = self.processes.keys().copied().collect();
        while let Some(&first) = waiting.first() {
            let left = deadline.saturating_duration_since(Instant::now());
            match events.recv_timeout(left) {
                Ok(Event::Ready(number)) => waiting.retain(|&it| it != number),
                Ok(Event::Ended(number, status)) => {
                    let Some(Process { id, name, .. }) = self.processes.remove(&number) else {
                        continue;
                    };
                    if let Some(code @ (exit::FAILURE | exit::USAGE)) = code_of(status) {
                        return Ok(Some(code));
                    }
                    bail!("{id}: {name} did not start: {}", describe(status));
                }
                Ok(Event::Signal) => bail!("stopped by a signal"),
                Ok(Event::Ask(ask)) => ask.refuse("the machine is about to start"),
                Ok(Event::Told(_) | Event::Complaint(..)) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let Process { id, name, .. } = &self.processes[&first];
                    bail!("{id}: {name} was not ready within {READY:?}");
                }
            }
        }
        // The runner finds them by itself, so that is no event.
        for process in self.processes.values_mut() {
            process.served = true;
        }
        Ok(None)
    }

    /// Goes on until the runner ends.
    fn serve(&mut self, events: &Events) -> anyhow::Result<u8> {
        loop {
            let event = match self.next_deadline() {
                None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => events.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match event {
                Ok(Event::Ended(number, status)) if Some(number) == self.runner => {
                    self.processes.remove(&number);
                    let code = code_of(status).unwrap_or(exit::FAILURE);
                    let wished = self.quit && code == exit::DEVICE_LOST;
                    return Ok(if wished { exit::POWERED_OFF } else { code });
                }
                Ok(Event::Ended(number, status)) => self.ended(number, status),
                Ok(Event::Ready(number)) => self.ready(number),
                Ok(Event::Complaint(number, said)) => self.complained(number, said),
                Ok(Event::Told(event)) => self.told(&event),
                Ok(Event::Ask(ask)) => self.asked(ask),
                Ok(Event::Signal) => self.end_runner(),
                Err(_) => {}
            }
            self.on_time();
        }
    }

    /// Has the runner end the machine; by force if need be.
    fn end_runner(&mut self) {
        if let Some(runner) = self.runner {
            self.ending = true;
            self.end(runner, GRACE);
        }
    }

    fn ended(&mut self, number: Number, status: ExitStatus) {
        let Some(process) = self.processes.remove(&number) else {
            return;
        };
        self.sentences.retain(|sentence| sentence.number != number);
        let Some(index) = process.device else { return };
        let gives_back = process.stdin && !self.has_stdin(index);
        if gives_back && let Some(terminal) = &self.terminal {
            terminal.restore();
        }
        if self.devices[index].current == Some(number) {
            self.current_ended(index, number, &process, status);
        } else {
            self.successor_ended(index, number, status);
        }
    }

    /// Whether a process of this device that is at work may use the terminal.
    fn has_stdin(&self, index: usize) -> bool {
        let current = self.devices[index].current;
        let process = current.and_then(|number| self.processes.get(&number));
        process.is_some_and(|process| process.stdin)
    }

    fn current_ended(
        &mut self,
        index: usize,
        number: Number,
        process: &Process,
        status: ExitStatus,
    ) {
        let device = &mut self.devices[index];
        device.current = None;
        for waiting in device.waiting.drain(..) {
            let _ = waiting.send(());
        }
        if status.code() == Some(CONSOLE_QUIT.into()) {
            self.quit = true;
            return self.end_runner();
        }
        if self.ending {
            return;
        }
        if let Some(replacement) = &device.replacement {
            // Whoever takes its place is on the way.
            if replacement.afterwards {
                self.start_afterwards(index);
            } else {
                self.successor_ended(index, number, status);
            }
            return;
        }
        let Process {
            id, name, started, ..
        } = process;
        let what = format!("{id}: {name} died: {}", describe(status));
        self.start_again(index, *started, self.restart.wants(status), &what);
    }

    /// Starts another process for a device, at once or later, if that is `wanted` and
    /// there were not too many; says so, and `what` happened.
    pub fn start_again(&mut self, index: usize, started: Instant, wanted: bool, what: &str) {
        let now = Instant::now();
        let device = &mut self.devices[index];
        if !wanted {
            eprintln!("outrigger: {what}; not started again");
            return;
        }
        match device.history.wait(started, now) {
            None => eprintln!(
                "outrigger: {what}; given up after {STARTS} starts within {} s",
                WITHIN.as_secs()
            ),
            Some(Duration::ZERO) => match self.start_now(index) {
                Ok(pid) => eprintln!("outrigger: {what}; started again as process {pid}"),
                Err(error) => eprintln!("outrigger: {what}; {error:#}"),
            },
            Some(wait) => {
                device.due = Some(now + wait);
                let wait = wait.as_millis();
                eprintln!("outrigger: {what}; to be started again in {wait} ms");
            }
        }
    }

    /// Starts the next process of a device; one that cannot be started is tried again.
    pub fn start_now(&mut self, index: usize) -> anyhow::Result<Pid> {
        let start = self.devices[index].recipe.start();
        match self.start(Some(index), start) {
            Ok(number) => {
                self.devices[index].current = Some(number);
                Ok(self.processes[&number].pid)
            }
            Err(error) => {
                let now = Instant::now();
                let device = &mut self.devices[index];
                device.due = device.history.wait(now, now).map(|wait| now + wait);
                Err(error)
            }
        }
    }

    fn told(&mut self, event: &control::MachineEvent) {
        use control::MachineEvent as E;
        let (id, lost) = match event {
            E::DeviceLost { id, .. } => (id, true),
            E::DeviceConnected { id } | E::DeviceReconnecting { id } => (id, false),
            E::DeviceRunning { id, .. } => (id, false),
            _ => return,
        };
        let current = self
            .device(id)
            .and_then(|index| self.devices[index].current);
        let Some(number) = current else { return };
        let Some(process) = self.processes.get_mut(&number) else {
            return;
        };
        if !lost {
            process.served = true;
            self.acquit(number);
        } else if std::mem::take(&mut process.served) {
            // If it is there still, it does not answer. (One that is new has had nothing
            // to answer yet: this is about its predecessor.)
            self.sentence(number, LOST, true);
        }
    }

    /// The place of a device.
    pub fn device(&self, id: &str) -> Option<usize> {
        self.devices.iter().position(|device| device.id() == id)
    }

    /// A process that runs.
    pub fn process(&mut self, number: Number) -> Option<&mut Process> {
        self.processes.get_mut(&number)
    }

    /// Ends a process: politely, and by force after `grace`.
    pub fn end(&mut self, number: Number, grace: Duration) {
        self.signal(number, Signal::TERM);
        self.sentence(number, grace, false);
    }

    /// A process is killed after `grace`; on `probation`, unless it is acquitted.
    pub fn sentence(&mut self, number: Number, grace: Duration, probation: bool) {
        self.sentences.push(Sentence {
            at: Instant::now() + grace,
            number,
            probation,
        });
    }

    /// A process on probation has improved.
    pub fn acquit(&mut self, number: Number) {
        self.sentences
            .retain(|sentence| sentence.number != number || !sentence.probation);
    }

    /// Ends a process whose successor is at work, or waits for its end.
    pub fn retire(&mut self, number: Number) {
        self.end(number, RETIREMENT);
    }

    fn next_deadline(&self) -> Option<Instant> {
        let due = self.devices.iter().filter_map(|device| device.due);
        let sentences = self.sentences.iter().map(|sentence| sentence.at);
        due.chain(sentences).min()
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        let (over, left): (Vec<_>, Vec<_>) = std::mem::take(&mut self.sentences)
            .into_iter()
            .partition(|sentence| sentence.at <= now);
        self.sentences = left;
        for sentence in over {
            self.signal(sentence.number, Signal::KILL);
        }
        for index in 0..self.devices.len() {
            if self.devices[index].due.is_some_and(|due| due <= now) {
                self.devices[index].due = None;
                if let Err(error) = self.start_now(index) {
                    eprintln!("outrigger: {error:#}");
                }
            }
        }
    }

    pub fn signal(&self, number: Number, signal: Signal) {
        if let Some(process) = self.processes.get(&number) {
            // It may have ended without our having heard of it yet.
            let _ = kill_process(process.pid, signal);
        }
    }

    /// Ends whoever is left: politely, then by force. One that is stopped shall hear it.
    pub fn end_all(&mut self, events: &Events) {
        for signal in [Signal::TERM, Signal::KILL] {
            for &number in self.processes.keys() {
                self.signal(number, signal);
                self.signal(number, Signal::CONT);
            }
            let deadline = Instant::now() + GRACE;
            while !self.processes.is_empty() {
                let left = deadline.saturating_duration_since(Instant::now());
                match events.recv_timeout(left) {
                    Ok(Event::Ended(number, _)) => drop(self.processes.remove(&number)),
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
        }
        let stdin = self.devices.iter().any(|it| it.recipe.program.needs_stdin);
        if stdin && let Some(terminal) = &self.terminal {
            terminal.restore();
        }
    }
}

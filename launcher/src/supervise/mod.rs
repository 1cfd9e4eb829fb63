//! The supervisor of a machine's processes: starts them, restarts device processes that end,
//! swaps them on request, and ends all processes when the runner ends.
//!
//! One thread makes every decision. It waits for [`SupervisorEvent`]s, which other threads
//! send: one for each process, one for signals and the control socket. The modules:
//!
//! * [`spawn`] starts one process; [`processes`] has the running ones and their kill timers.
//! * [`device`] is a device, [`process_spec`] what its processes are started with.
//! * [`start`] starts the machine, [`restart`] restarts a device whose process has ended,
//!   with the delays of [`backoff`], and [`swap`] swaps or restarts a device on request, in
//!   the stages of [`swap_stage`].
//! * [`terminal`] restores the mode of the user's terminal.

mod backoff;
mod device;
mod process_spec;
mod processes;
mod restart;
pub mod spawn;
mod start;
mod swap;
mod swap_stage;
mod terminal;

use std::fmt::Display;
use std::process::ExitStatus;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use outrigger_cli::{CONSOLE_QUIT, report_error};
use outrigger_protocol::control::MachineEvent;
use outrigger_protocol::exit;
use rustix::process::Signal;

use self::device::SupervisedDevice;
use self::processes::ProcessTable;
use self::spawn::{describe, exit_code};
use self::swap_stage::SwapStage;
pub use self::terminal::SavedTerminal;
use crate::config::{MachineConfig, RestartPolicy};
use crate::messages::{ProcessNumber, SupervisorEvent};
use crate::runtime::RuntimeDir;

/// How long a device process may take to become ready.
pub const READY_LIMIT: Duration = Duration::from_secs(10);
/// How long processes may take to end at the end of the machine.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How long a process may take to end while its successor serves or waits for its end.
const REPLACED_LIMIT: Duration = Duration::from_secs(1);
/// How long a process may still run after the runner reported it as lost. A process that is
/// about to end by itself has ended by then.
const LOST_LIMIT: Duration = Duration::from_millis(100);

/// Receives the events of a machine.
pub type EventReceiver = Receiver<SupervisorEvent>;

/// The supervisor.
pub struct Supervisor {
    /// The description of the machine. A swap changes it.
    config: MachineConfig,
    restart_policy: RestartPolicy,
    runtime: RuntimeDir,
    terminal: Option<SavedTerminal>,
    devices: Vec<SupervisedDevice>,
    processes: ProcessTable,
    runner: Option<ProcessNumber>,
    /// The user has quit the console, which ends the machine.
    console_quit: bool,
    /// The runner has been told to end.
    ending: bool,
    quiet: bool,
}

impl Supervisor {
    /// A supervisor without processes. What happens to them is sent to `events`.
    pub fn new(
        config: MachineConfig,
        restart_policy: RestartPolicy,
        runtime: RuntimeDir,
        terminal: Option<SavedTerminal>,
        events: Sender<SupervisorEvent>,
        quiet: bool,
    ) -> Self {
        Supervisor {
            config,
            restart_policy,
            runtime,
            terminal,
            devices: Vec::new(),
            processes: ProcessTable::new(events),
            runner: None,
            console_quit: false,
            ending: false,
            quiet,
        }
    }

    /// Handles events until the runner ends. Returns the exit code of the machine.
    pub fn serve(&mut self, events: &EventReceiver) -> u8 {
        loop {
            let event = match self.next_deadline() {
                None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => events.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match event {
                Ok(SupervisorEvent::Exited(number, status)) if Some(number) == self.runner => {
                    self.processes.remove(number);
                    let code = exit_code(status).unwrap_or(exit::FAILURE);
                    let expected = self.console_quit && code == exit::DEVICE_LOST;
                    return if expected { exit::POWERED_OFF } else { code };
                }
                Ok(SupervisorEvent::Exited(number, status)) => self.process_exited(number, status),
                Ok(SupervisorEvent::Ready(number)) => self.process_ready(number),
                Ok(SupervisorEvent::FirstLine(number, line)) => self.first_line(number, &line),
                Ok(SupervisorEvent::Machine(event)) => self.machine_event(&event),
                Ok(SupervisorEvent::Request(request)) => self.request(request),
                Ok(SupervisorEvent::Terminate) => self.end_runner(),
                Err(_) => {}
            }
            self.processes.kill_expired();
            self.restart_due();
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let restarts = self.devices.iter().filter_map(|device| device.restart_at);
        restarts.chain(self.processes.next_timer()).min()
    }

    /// Tells the runner to end the machine, and kills it if it does not.
    fn end_runner(&mut self) {
        if let Some(runner) = self.runner {
            self.ending = true;
            self.processes.terminate(runner, END_LIMIT);
        }
    }

    /// A device process has ended.
    fn process_exited(&mut self, number: ProcessNumber, status: ExitStatus) {
        let Some(process) = self.processes.remove(number) else {
            return;
        };
        let Some(index) = process.device else { return };
        if process.has_stdin && !self.current_has_stdin(index) {
            self.restore_terminal();
        }
        let device = &mut self.devices[index];
        if device.current != Some(number) {
            return self.swap_process_exited(index, number, status);
        }
        device.current = None;
        for waiter in device.exit_waiters.drain(..) {
            // Fails if the client's thread has given up.
            let _ = waiter.send(());
        }
        if status.code() == Some(CONSOLE_QUIT.into()) {
            self.console_quit = true;
            return self.end_runner();
        }
        if self.ending {
            return;
        }
        match &device.swap {
            Some(SwapStage::AwaitingExit { .. }) => self.start_in_place(index),
            // The swap brings the successor.
            Some(_) => self.swap_process_exited(index, number, status),
            None => {
                let (id, program) = (&process.id, process.program);
                let what = format!("{id}: {program} died: {}", describe(status));
                let wanted = self.restart_policy.applies_to(status);
                self.restart(index, process.started, wanted, &what);
            }
        }
    }

    /// Whether the current process of the device has the launcher's terminal.
    fn current_has_stdin(&self, index: usize) -> bool {
        let current = self.devices[index].current;
        let process = current.and_then(|number| self.processes.get(number));
        process.is_some_and(|process| process.has_stdin)
    }

    /// The runner reported an event. If it lost a process that still runs, that process does
    /// not answer and is killed, so that the next one can be started.
    fn machine_event(&mut self, event: &MachineEvent) {
        let (id, lost) = match event {
            MachineEvent::DeviceLost { id, .. } => (id, true),
            MachineEvent::DeviceConnected { id }
            | MachineEvent::DeviceReconnecting { id }
            | MachineEvent::DeviceRunning { id, .. } => (id, false),
            _ => return,
        };
        let device = self.devices.iter().find(|device| device.id() == id);
        let Some(number) = device.and_then(|device| device.current) else {
            return;
        };
        let Some(process) = self.processes.get_mut(number) else {
            return;
        };
        if !lost {
            process.was_connected = true;
            self.processes.cancel_kill(number);
        } else if std::mem::take(&mut process.was_connected) {
            // If the runner was not connected to it yet, the event is about its predecessor.
            self.processes.kill_unless_cancelled(number, LOST_LIMIT);
        }
    }

    /// Ends all processes that still run: with SIGTERM, and after a grace period with SIGKILL.
    pub fn end_all(&mut self, events: &EventReceiver) {
        for signal in [Signal::TERM, Signal::KILL] {
            for number in self.processes.numbers() {
                self.processes.signal(number, signal);
                // A stopped process handles SIGTERM only once it continues.
                self.processes.signal(number, Signal::CONT);
            }
            let deadline = Instant::now() + END_LIMIT;
            while !self.processes.numbers().is_empty() {
                let left = deadline.saturating_duration_since(Instant::now());
                match events.recv_timeout(left) {
                    Ok(SupervisorEvent::Exited(number, _)) => {
                        self.processes.remove(number);
                    }
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
        }
        let mut programs = self.devices.iter().map(|device| &device.spec.program);
        if programs.any(|program| program.needs_stdin) {
            self.restore_terminal();
        }
    }

    fn restore_terminal(&self) {
        if let Some(terminal) = &self.terminal {
            terminal.restore();
        }
    }
}

/// Reports on stderr what happened to a process.
fn report(what: impl Display) {
    report_error("outrigger", what);
}

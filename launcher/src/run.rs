//! Runs a machine: sets up its runtime directory, its control socket and its supervisor, and
//! connects them.

use std::sync::mpsc::channel;

use outrigger_cli::signals;

use crate::config::MachineConfig;
use crate::control::ControlSocket;
use crate::messages::SupervisorEvent;
use crate::plan::MachinePlan;
use crate::runtime::RuntimeDir;
use crate::supervise::{SavedTerminal, Supervisor};

/// Runs the machine until it ends and returns the exit code. A process that ends before it is
/// ready has reported the reason itself, so only its exit code is passed on.
///
/// # Errors
/// A resource or socket cannot be opened, or a process cannot be started or does not become
/// ready.
pub fn run(config: MachineConfig, plan: MachinePlan, quiet: bool) -> anyhow::Result<u8> {
    let terminal = SavedTerminal::save();
    let (sender, events) = channel();
    let set = signals::termination_set();
    signals::block(&set);
    let signal_sender = sender.clone();
    std::thread::spawn(move || {
        loop {
            signals::wait(&set);
            if signal_sender.send(SupervisorEvent::Terminate).is_err() {
                return;
            }
        }
    });
    let runtime = RuntimeDir::create()?;
    let mut control = ControlSocket::bind(
        config.control.as_deref(),
        runtime.runner_control(),
        sender.clone(),
    )?;
    let mut supervisor = Supervisor::new(config, plan.restart, runtime, terminal, sender, quiet);
    let result = supervisor.start(plan, &events).and_then(|failed| {
        if let Some(code) = failed {
            return Ok(code);
        }
        control.start()?;
        Ok(supervisor.serve(&events))
    });
    supervisor.end_all(&events);
    // From now on, requests of the control socket fail instead of waiting.
    drop(events);
    control.finish();
    result
}

//! Runs the processes of a machine: the runner's end is the end of all, with its exit
//! code, and nobody is left behind, whatever dies first; a device process that dies
//! is followed by another.
//!
//! One thread decides ([`Group`]), and all that happens is sent to it as an [`Event`]:
//! [`process`] starts one, [`device`] is what processes serve one after the other,
//! [`policy`] says when the next one comes, [`mod@replace`] has one take the place of
//! another that works, [`terminal`] looks after the user's.

mod device;
mod group;
mod policy;
pub mod process;
mod replace;
mod terminal;

use std::process::ExitStatus;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use outrigger_cli::signals;
use outrigger_protocol::control;

pub use self::device::Number;
use self::group::Group;
pub use self::replace::{Ask, With};
use self::terminal::Terminal;
use crate::config::Machine;
use crate::control::Server;
use crate::plan::Plan;
use crate::runtime::Runtime;

/// How long a device process may take until it serves.
pub const READY: Duration = Duration::from_secs(10);

/// What happens to a machine.
pub enum Event {
    /// This device process serves.
    Ready(Number),
    /// This process complains.
    Complaint(Number, String),
    /// This process ended.
    Ended(Number, ExitStatus),
    /// The runner tells something.
    Told(control::MachineEvent),
    /// Somebody wants something.
    Ask(Ask),
    /// Somebody wants us to end.
    Signal,
}

/// Runs `plan` of `machine` to its end; returns the exit code. A process that ends
/// before it is ready has said why, so its exit code is all that is added.
///
/// # Errors
/// When something cannot be opened, or a process cannot be started or does not get
/// ready.
pub fn run(machine: Machine, plan: Plan, quiet: bool) -> anyhow::Result<u8> {
    let (sender, events) = channel();
    let terminal = Terminal::save();
    let set = signals::termination_set();
    signals::block(&set);
    let to = sender.clone();
    std::thread::spawn(move || {
        loop {
            signals::wait(&set);
            if to.send(Event::Signal).is_err() {
                return;
            }
        }
    });
    let runtime = Runtime::new()?;
    let mut server = Server::new(machine.control.as_deref(), runtime.control(), &sender)?;
    let mut group = Group::new(machine, plan.restart, runtime, sender, quiet);
    group.terminal = terminal;
    let result = group.run(plan, &events, &mut server);
    group.end_all(&events);
    drop(events);
    server.finish();
    result
}

/// Where [`Event`]s come from.
type Events = Receiver<Event>;

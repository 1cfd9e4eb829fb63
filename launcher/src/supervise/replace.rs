//! One process takes the place of another that works: first it starts beside it, at a
//! socket of its own; then the runner changes over, which is not our work; then the old
//! one ends, or, when the runner has refused the new one, that does.
//!
//! Where two cannot be at once (the platform's process, and consoles on one terminal), the
//! old one ends first, and the new one comes to its socket, as after a kill.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::mpsc::Sender;
use std::time::Instant;

use rustix::process::Signal;

use super::READY;
use super::device::{Begun, Device, Number, Recipe, Replacement};
use super::group::Group;
use super::policy::History;
use super::process::describe;
use crate::config::Machine;
use crate::keyval;
use crate::plan;

/// What is to take a device's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum With {
    /// A process like the present one: the program that is on disk now.
    Same,
    /// A process for another description of the device.
    Described(String),
    /// Somebody else's process, which listens there.
    Foreign(PathBuf),
}

/// What is asked of a machine. One at a time can replace a device, from `Begin` to
/// `Commit` or `Abort`.
pub enum Ask {
    /// Start a process to take the place of another; told where it listens once it is
    /// ready. When there is none, nothing was begun.
    Begin {
        /// The device.
        id: String,
        /// What with.
        with: With,
        /// Takes the answer.
        reply: Sender<Begun>,
    },
    /// Kill the present process; answered when it is gone.
    Clear {
        /// The device.
        id: String,
        /// Takes the answer.
        reply: Sender<()>,
    },
    /// The new process has the place.
    Commit {
        /// The device.
        id: String,
        /// Takes the answer.
        reply: Sender<()>,
    },
    /// Where the device's process can be asked to do something.
    Control {
        /// The device.
        id: String,
        /// Not while another process is on its way, which would not learn of it.
        alone: bool,
        /// Takes the answer.
        reply: Sender<Result<PathBuf, String>>,
    },
    /// It has not.
    Abort {
        /// The device.
        id: String,
    },
}

impl Ask {
    /// Carries nothing out.
    pub fn refuse(self, why: &str) {
        // Whoever has asked may have given up.
        let _ = match self {
            Ask::Begin { id, reply, .. } => reply.send(Err(format!("{id}: {why}"))).is_ok(),
            Ask::Control { id, reply, .. } => reply.send(Err(format!("{id}: {why}"))).is_ok(),
            Ask::Clear { .. } | Ask::Commit { .. } | Ask::Abort { .. } => false,
        };
    }
}

impl Group {
    /// Carries out what is asked.
    pub fn asked(&mut self, ask: Ask) {
        match ask {
            Ask::Begin { id, with, reply } => {
                if let Err(why) = self.begin(&id, &with, &reply) {
                    let _ = reply.send(Err(why));
                }
            }
            Ask::Clear { id, reply } => {
                if let Some(index) = self.device(&id)
                    && let Some(number) = self.devices[index].current
                {
                    self.devices[index].waiting.push(reply);
                    self.signal(number, Signal::KILL);
                } else {
                    let _ = reply.send(());
                }
            }
            Ask::Commit { id, reply } => {
                if let Some(index) = self.device(&id) {
                    self.commit(index);
                }
                let _ = reply.send(());
            }
            Ask::Control { id, alone, reply } => {
                let _ = reply.send(self.control(&id, alone));
            }
            Ask::Abort { id } => {
                if let Some(index) = self.device(&id) {
                    self.abort(index);
                }
            }
        }
    }

    fn named(&self, id: &str) -> Result<usize, String> {
        self.device(id).ok_or_else(|| {
            let ids: Vec<&str> = self.devices.iter().map(Device::id).collect();
            format!("{id}: there is no such device, only {}", ids.join(", "))
        })
    }

    fn control(&self, id: &str, alone: bool) -> Result<PathBuf, String> {
        let device = &self.devices[self.named(id)?];
        if device.foreign {
            let why = "its process is not the launcher's: it must be asked itself";
            return Err(format!("{id}: {why}"));
        }
        let Some(control) = &device.recipe.control else {
            return Err(format!("{id}: only a disk can be asked that"));
        };
        if device.current.is_none() {
            return Err(format!("{id}: no process serves it now"));
        }
        if alone && device.replacement.is_some() {
            return Err(format!("{id}: another process is on its way to it"));
        }
        Ok(control.path.clone())
    }

    fn begin(&mut self, id: &str, with: &With, reply: &Sender<Begun>) -> Result<(), String> {
        let index = self.named(id)?;
        let device = &self.devices[index];
        if device.replacement.is_some() {
            return Err(format!("{id}: another process is on its way already"));
        }
        let mut replacement = Replacement {
            ready: Some(reply.clone()),
            ..Replacement::default()
        };
        match with {
            With::Same if device.foreign => {
                let why = "its process is not the launcher's: swap puts one there";
                return Err(format!("{id}: {why}"));
            }
            With::Same if !device.virtio || device.recipe.program.needs_stdin => {
                replacement.afterwards = true;
                return self.begin_afterwards(index, replacement);
            }
            _ if !device.virtio => {
                return Err(format!("{id}: it can be restarted, not swapped"));
            }
            With::Same => {
                let again = device.recipe.again(&mut self.runtime);
                replacement.recipe = Some(again.map_err(|error| format!("{error:#}"))?);
            }
            With::Described(text) => {
                let machine = described(&self.machine, id, text)?;
                let program = plan::device(&machine, id).map(|device| device.program);
                let program = program.ok_or_else(|| format!("{id}: there is no such device"))?;
                if program.needs_stdin && device.recipe.program.needs_stdin {
                    return Err(format!("{id}: it is on stdio already"));
                }
                let recipe = Recipe::new(program, device.recipe.files(), &mut self.runtime);
                replacement.recipe = Some(recipe.map_err(|error| format!("{error:#}"))?);
                replacement.machine = Some(machine);
            }
            With::Foreign(path) => replacement.tell(Ok(Some(path.clone()))),
        }
        if let Some(recipe) = &replacement.recipe {
            let number = self
                .start_beside(index, recipe)
                .map_err(|error| format!("{error:#}"))?;
            replacement.process = Some(number);
        }
        self.devices[index].due = None;
        self.devices[index].replacement = Some(replacement);
        Ok(())
    }

    fn start_beside(&mut self, index: usize, recipe: &Recipe) -> anyhow::Result<Number> {
        let (reader, writer) = std::io::pipe()?;
        let mut start = recipe.start();
        // What keeps it from starting is for whoever has asked.
        start.stderr = Some(writer.into());
        let number = self.start_watched(index, start)?;
        self.listen_to(number, reader);
        self.sentence(number, READY, true);
        Ok(number)
    }

    fn begin_afterwards(&mut self, index: usize, replacement: Replacement) -> Result<(), String> {
        self.devices[index].due = None;
        self.devices[index].replacement = Some(replacement);
        match self.devices[index].current {
            Some(number) => self.retire(number),
            None => self.start_afterwards(index),
        }
        Ok(())
    }

    /// The present process has ended: now the next.
    pub fn start_afterwards(&mut self, index: usize) {
        let start = self.devices[index].recipe.start();
        match self.start_watched(index, start) {
            Ok(number) => {
                self.sentence(number, READY, true);
                self.devices[index].current = Some(number);
                if let Some(replacement) = &mut self.devices[index].replacement {
                    replacement.afterwards = false;
                    // It complains where it always does.
                    replacement.complaint = Some(String::new());
                    replacement.process = Some(number);
                }
            }
            Err(error) => {
                if let Some(mut replacement) = self.devices[index].replacement.take() {
                    replacement.tell(Err(format!("{error:#}")));
                }
                let (now, what) = (Instant::now(), format!("{error:#}"));
                self.start_again(index, now, true, &what);
            }
        }
    }

    /// A process serves.
    pub fn ready(&mut self, number: Number) {
        self.acquit(number);
        let device = self.devices.iter_mut().find(|device| {
            let replacement = device.replacement.as_ref();
            replacement.is_some_and(|it| it.process == Some(number))
        });
        let Some(device) = device else { return };
        let Some(replacement) = &mut device.replacement else {
            return;
        };
        let recipe = replacement.recipe.as_ref();
        let path = recipe.map(|recipe| recipe.endpoint.path.clone());
        replacement.tell(Ok(path));
    }

    /// A process complains; it matters of one that is not ready.
    pub fn complained(&mut self, number: Number, said: String) {
        let replacements = self.devices.iter_mut().enumerate();
        let mut replacements = replacements.filter_map(|(index, it)| {
            let replacement = it.replacement.as_mut()?;
            Some((index, replacement))
        });
        if let Some((index, it)) = replacements.find(|it| it.1.process == Some(number)) {
            it.complaint = Some(said);
            self.give_up(index);
        }
    }

    /// A process ended that was to get a place; or one that has lost its own.
    pub fn successor_ended(&mut self, index: usize, number: Number, status: ExitStatus) {
        if let Some(replacement) = &mut self.devices[index].replacement
            && replacement.process == Some(number)
        {
            replacement.ended = Some(status);
            self.give_up(index);
        }
    }

    /// A process that has ended without having been ready, and whose last words are
    /// known, does not come: what was begun is over.
    fn give_up(&mut self, index: usize) {
        let device = &mut self.devices[index];
        let comes_not = |it: &mut Replacement| it.ready.is_some() && it.ended.is_some();
        let told = |it: &mut Replacement| it.complaint.is_some();
        let Some(mut replacement) = device.replacement.take_if(|it| comes_not(it) && told(it))
        else {
            return;
        };
        let program = &device.recipe.program;
        let complaint = replacement.complaint.take().filter(|it| !it.is_empty());
        let why = complaint.unwrap_or_else(|| {
            let how = replacement.ended.map(describe).unwrap_or_default();
            format!("{}: {} did not start: {how}", program.id, program.name)
        });
        replacement.tell(Err(why));
        self.fill(index);
    }

    /// A device whose replacement has come to nothing has its own process again.
    fn fill(&mut self, index: usize) {
        let device = &self.devices[index];
        if device.current.is_none() && !device.foreign {
            let what = format!("{}: its process is gone", device.id());
            self.start_again(index, Instant::now(), true, &what);
        }
    }

    fn commit(&mut self, index: usize) {
        let Some(replacement) = self.devices[index].replacement.take() else {
            return;
        };
        let device = &mut self.devices[index];
        if replacement.recipe.is_none() && replacement.process.is_some() {
            // It came afterwards, and has its place.
            device.history = History::default();
            return self.fill(index);
        }
        // It may have died while the place was being given to it.
        let new = replacement.process.filter(|_| replacement.ended.is_none());
        let old = std::mem::replace(&mut device.current, new);
        device.history = History::default();
        device.foreign = replacement.recipe.is_none();
        match replacement.recipe {
            Some(recipe) => device.recipe = recipe,
            None => device.recipe.close(),
        }
        if let Some(machine) = replacement.machine {
            self.machine = machine;
        }
        if let Some(number) = replacement.process
            && let Some(process) = self.process(number)
        {
            process.served = true;
        }
        if let Some(old) = old {
            self.retire(old);
        }
        self.fill(index);
    }

    fn abort(&mut self, index: usize) {
        let Some(replacement) = self.devices[index].replacement.take() else {
            return;
        };
        let device = &self.devices[index];
        if let Some(number) = replacement.process
            && device.current != Some(number)
        {
            self.retire(number);
        }
        self.fill(index);
    }
}

/// The machine with another description of the device `id`.
fn described(machine: &Machine, id: &str, text: &str) -> Result<Machine, String> {
    let mut machine = machine.clone();
    let missing = || format!("{id}: there is no such device");
    let wrong = |why: String| format!("{id}: {text}: {why}");
    let (kind, index) = plan::split(id).ok_or_else(missing)?;
    match kind {
        "disk" => {
            let disk = machine.disk.get_mut(index).ok_or_else(missing)?;
            *disk = keyval::parse(text).map_err(wrong)?;
        }
        "net" => {
            let net = machine.net.get_mut(index).ok_or_else(missing)?;
            *net = keyval::parse(text).map_err(wrong)?;
        }
        "console" => {
            let console = machine.console.get_mut(index).ok_or_else(missing)?;
            *console = keyval::parse(text).map_err(wrong)?;
        }
        _ => return Err(missing()),
    }
    machine.check().map_err(|error| error.to_string())?;
    Ok(machine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_description_is_checked_with_all_the_rest() {
        let machine: Machine = toml::from_str(
            "kernel = 'k'\n[[disk]]\npath = 'a'\n[[disk]]\npath = 'b'\n\
             [[console]]\ntype = 'stdio'\n[[console]]\ntype = 'pty'",
        )
        .unwrap();
        let new = described(&machine, "disk1", "path=c,queues=2").unwrap();
        assert_eq!(new.disk[1].queues, Some(2));
        assert_eq!(new.disk[0], machine.disk[0]);
        for (id, text, said) in [
            ("disk1", "path=a", "disk1: a is in use by disk0"),
            ("disk1", "pth=c", "disk1: pth=c: unknown key `pth`"),
            ("disk2", "path=c", "disk2: there is no such device"),
            ("platform", "null", "platform: there is no such device"),
            ("console1", "stdio", "only one console can be on stdio"),
        ] {
            let error = described(&machine, id, text).unwrap_err();
            assert!(error.starts_with(said), "{error}");
        }
    }
}

//! A device and the processes that serve it, one after the other.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use super::policy::History;
use super::process::Start;
use crate::config::Machine;
use crate::plan::Program;
use crate::resource::Opened;
use crate::runtime::{Endpoint, Runtime};

/// Counts processes: unlike a process id, no number comes twice.
pub type Number = usize;

/// What to start for a device, however often: the program, what it uses, and where it
/// is connected to.
pub struct Recipe {
    /// The program.
    pub program: Program,
    /// Its resources, open.
    files: Vec<Arc<Opened>>,
    /// Its socket.
    pub endpoint: Endpoint,
    /// Its control socket.
    pub control: Option<Endpoint>,
}

impl Recipe {
    /// Opens what `program` needs, as far as `others` do not have it open.
    ///
    /// # Errors
    /// Names the device and what cannot be opened.
    pub fn new(
        mut program: Program,
        others: &[Arc<Opened>],
        runtime: &mut Runtime,
    ) -> anyhow::Result<Self> {
        let mut files = Vec::new();
        for resource in &program.resources {
            let opened = resource.open(&program.id, others)?;
            if let Some(note) = &opened.note {
                program.summary.clone_from(note);
            }
            files.push(opened);
        }
        let endpoint = runtime.endpoint(&program.id)?;
        let control = control(&program, runtime)?;
        Ok(Recipe {
            program,
            files,
            endpoint,
            control,
        })
    }

    /// The same with other sockets and all that was opened.
    ///
    /// # Errors
    /// When there is no room for a socket.
    pub fn again(&self, runtime: &mut Runtime) -> anyhow::Result<Self> {
        Ok(Recipe {
            program: self.program.clone(),
            files: self.files.clone(),
            endpoint: runtime.endpoint(&self.program.id)?,
            control: control(&self.program, runtime)?,
        })
    }

    /// Closes what it has open, as far as nobody else has.
    pub fn close(&mut self) {
        self.files.clear();
    }

    /// What it has open.
    pub fn files(&self) -> &[Arc<Opened>] {
        &self.files
    }

    /// What to start.
    pub fn start(&self) -> Start {
        let program = &self.program;
        let listener = self.endpoint.listener.as_raw_fd();
        let mut args = program.args.clone();
        args.extend(["--fd".into(), listener.to_string().into()]);
        args.extend(self.files.iter().flat_map(|file| file.by_fd()));
        let mut fds = vec![listener];
        if let Some(control) = &self.control {
            let listener = control.listener.as_raw_fd();
            args.extend(["--control-fd".into(), listener.to_string().into()]);
            fds.push(listener);
        }
        fds.extend(self.files.iter().map(|file| file.fd().as_raw_fd()));
        Start {
            id: program.id.clone(),
            name: program.name,
            args,
            fds,
            stdin: program.needs_stdin,
            stderr: None,
        }
    }
}

fn control(program: &Program, runtime: &mut Runtime) -> anyhow::Result<Option<Endpoint>> {
    let name = format!("{}.control", program.id);
    let control = program.has_control.then(|| runtime.endpoint(&name));
    control.transpose()
}

/// A device of the machine.
pub struct Device {
    /// What its processes are made of.
    pub recipe: Recipe,
    /// Whether it is a vhost-user device, which can be swapped.
    pub virtio: bool,
    /// The process that serves it.
    pub current: Option<Number>,
    /// How often it was started.
    pub history: History,
    /// When to start it again.
    pub due: Option<Instant>,
    /// Somebody else's process serves it.
    pub foreign: bool,
    /// Another process is to take its place.
    pub replacement: Option<Replacement>,
    /// Who waits for its process to end.
    pub waiting: Vec<Sender<()>>,
}

impl Device {
    /// A device that nobody serves yet.
    pub fn new(recipe: Recipe, virtio: bool) -> Self {
        Device {
            recipe,
            virtio,
            current: None,
            history: History::default(),
            due: None,
            foreign: false,
            replacement: None,
            waiting: Vec::new(),
        }
    }

    /// The name.
    pub fn id(&self) -> &str {
        &self.recipe.program.id
    }
}

/// A process that is to take another's place.
#[derive(Default)]
pub struct Replacement {
    /// What it is made of; `None` for somebody else's process.
    pub recipe: Option<Recipe>,
    /// The machine with it.
    pub machine: Option<Machine>,
    /// The process.
    pub process: Option<Number>,
    /// The first thing that it has complained of; empty if there will be none.
    pub complaint: Option<String>,
    /// How it ended.
    pub ended: Option<ExitStatus>,
    /// It comes when the present one has ended, at the same socket.
    pub afterwards: bool,
    /// Who waits for it to be ready.
    pub ready: Option<Sender<Begun>>,
}

/// Where a process that is ready can be connected to, if not where its predecessor
/// could, so that the runner finds it by itself; or why there is none.
pub type Begun = Result<Option<PathBuf>, String>;

impl Replacement {
    /// Tells who waits.
    pub fn tell(&mut self, begun: Begun) {
        if let Some(ready) = self.ready.take() {
            // Whoever has waited may have given up.
            let _ = ready.send(begun);
        }
    }
}

//! A device and what its processes are started with.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use super::backoff::RestartHistory;
use super::spawn::SpawnSpec;
use super::swap::SwapStage;
use crate::messages::ProcessNumber;
use crate::plan::ProgramPlan;
use crate::resource::OpenResource;
use crate::runtime::{ListeningSocket, RuntimeDir};

/// What every process of a device is started with: the program, its open resources and its
/// sockets.
pub struct ProcessSpec {
    /// The program.
    pub program: ProgramPlan,
    resources: Vec<Arc<OpenResource>>,
    /// The vhost-user socket; for the platform, the socket of the trap channel.
    pub socket: ListeningSocket,
    /// The control socket of the device process, if its program has one.
    pub control: Option<ListeningSocket>,
}

impl ProcessSpec {
    /// Opens what `program` needs, except for what is open among `others` already.
    ///
    /// # Errors
    /// A resource or socket cannot be opened. The message names it and the device.
    pub fn new(
        mut program: ProgramPlan,
        others: &[Arc<OpenResource>],
        runtime: &mut RuntimeDir,
    ) -> anyhow::Result<Self> {
        let mut resources = Vec::new();
        for resource in &program.resources {
            let open = resource.open(&program.id, others)?;
            if let Some(note) = &open.note {
                program.summary.clone_from(note);
            }
            resources.push(open);
        }
        let socket = runtime.listen(&program.id)?;
        let control = control_socket(&program, runtime)?;
        Ok(ProcessSpec {
            program,
            resources,
            socket,
            control,
        })
    }

    /// Returns the same program and resources with new sockets, for a process that runs beside
    /// the present one.
    ///
    /// # Errors
    /// A socket cannot be created.
    pub fn with_new_sockets(&self, runtime: &mut RuntimeDir) -> anyhow::Result<Self> {
        Ok(ProcessSpec {
            program: self.program.clone(),
            resources: self.resources.clone(),
            socket: runtime.listen(&self.program.id)?,
            control: control_socket(&self.program, runtime)?,
        })
    }

    /// Closes the resources.
    pub fn close_resources(&mut self) {
        self.resources.clear();
    }

    /// Returns the open resources.
    pub fn resources(&self) -> &[Arc<OpenResource>] {
        &self.resources
    }

    /// Returns the command of a process.
    pub fn spawn_spec(&self) -> SpawnSpec {
        let program = &self.program;
        let socket = self.socket.listener.as_raw_fd();
        let mut args = program.args.clone();
        args.extend(["--fd".into(), socket.to_string().into()]);
        args.extend(self.resources.iter().flat_map(|open| open.by_fd()));
        let mut fds = vec![socket];
        if let Some(control) = &self.control {
            let control = control.listener.as_raw_fd();
            args.extend(["--control-fd".into(), control.to_string().into()]);
            fds.push(control);
        }
        fds.extend(self.resources.iter().map(|open| open.fd().as_raw_fd()));
        SpawnSpec {
            id: program.id.clone(),
            program: program.name,
            args,
            fds,
            stdin: program.needs_stdin,
            stderr: None,
        }
    }
}

fn control_socket(
    program: &ProgramPlan,
    runtime: &mut RuntimeDir,
) -> anyhow::Result<Option<ListeningSocket>> {
    let name = format!("{}.control", program.id);
    let socket = program.has_control.then(|| runtime.listen(&name));
    socket.transpose()
}

/// A device of the machine. It is served by one process at a time.
pub struct SupervisedDevice {
    /// What its processes are started with.
    pub spec: ProcessSpec,
    /// Whether it is a vhost-user device. Only those can be swapped.
    pub is_vhost_user: bool,
    /// The process that serves it, if one runs.
    pub current: Option<ProcessNumber>,
    /// The recent restarts.
    pub history: RestartHistory,
    /// When the next process is started, after a delay.
    pub restart_at: Option<Instant>,
    /// Whether the process that serves it was not started by the launcher.
    pub external: bool,
    /// The swap or restart in progress.
    pub swap: Option<SwapStage>,
    /// Requests that wait for the current process to end.
    pub exit_waiters: Vec<Sender<()>>,
}

impl SupervisedDevice {
    /// A device without a process.
    pub fn new(spec: ProcessSpec, is_vhost_user: bool) -> Self {
        SupervisedDevice {
            spec,
            is_vhost_user,
            current: None,
            history: RestartHistory::default(),
            restart_at: None,
            external: false,
            swap: None,
            exit_waiters: Vec::new(),
        }
    }

    /// Returns the id.
    pub fn id(&self) -> &str {
        &self.spec.program.id
    }
}

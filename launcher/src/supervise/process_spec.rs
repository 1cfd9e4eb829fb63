//! What the processes of a device are started with.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::spawn::SpawnSpec;
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

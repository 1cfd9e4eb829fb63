//! Swapping the process of a device on request; a restart is a swap to a process with the same
//! options.
//!
//! The new process is started beside the old one, with sockets of its own. When it is ready,
//! the control socket's thread tells the runner to swap. If the runner succeeds, the swap is
//! committed and the old process ends; otherwise it is aborted and the new process ends.
//!
//! Two processes at the same time are not possible for the platform, because both would serve the
//! same trap channel, and for a console on the launcher's terminal. There, the old process ends
//! first, and the new one is started at the same socket, to which the runner reconnects as after
//! a crash.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::mpsc::Sender;
use std::time::Instant;

use outrigger_protocol::ErrorCode;
use rustix::process::Signal;

use super::backoff::RestartHistory;
use super::device::SupervisedDevice;
use super::process_spec::ProcessSpec;
use super::spawn::describe;
use super::swap_stage::{Successor, SwapStage};
use super::{READY_LIMIT, REPLACED_LIMIT, Supervisor};
use crate::config::MachineConfig;
use crate::keyval;
use crate::messages::{CommandError, ProcessNumber, SupervisorRequest, SwapReady, SwapSource};
use crate::plan;

const SWAP_IN_PROGRESS: &str = "a swap or restart is in progress: try again when it is done";

impl Supervisor {
    /// Carries out a request of the control socket.
    pub fn request(&mut self, request: SupervisorRequest) {
        // Sending an answer fails if the client's thread has given up, which is harmless.
        match request {
            SupervisorRequest::StartSwap { id, source, reply } => {
                if let Err(error) = self.start_swap(&id, source, &reply) {
                    let _ = reply.send(Err(error));
                }
            }
            SupervisorRequest::KillProcess { id, reply } => {
                let device = self.devices.iter_mut().find(|device| device.id() == id);
                match device.and_then(|device| Some((device.current?, device))) {
                    Some((number, device)) => {
                        device.exit_waiters.push(reply);
                        self.processes.signal(number, Signal::KILL);
                    }
                    None => drop(reply.send(())),
                }
            }
            SupervisorRequest::CommitSwap { id, reply } => {
                if let Ok(index) = self.device_index(&id) {
                    self.commit_swap(index);
                }
                let _ = reply.send(());
            }
            SupervisorRequest::AbortSwap { id } => {
                if let Ok(index) = self.device_index(&id) {
                    self.abort_swap(index);
                }
            }
            SupervisorRequest::ControlSocket {
                id,
                exclusive,
                reply,
            } => {
                let _ = reply.send(self.control_socket(&id, exclusive));
            }
        }
    }

    fn device_index(&self, id: &str) -> Result<usize, CommandError> {
        let index = self.devices.iter().position(|device| device.id() == id);
        index.ok_or_else(|| {
            let ids: Vec<&str> = self.devices.iter().map(SupervisedDevice::id).collect();
            let message = format!(
                "{id}: there is no such device: use one of {}",
                ids.join(", ")
            );
            CommandError::new(ErrorCode::NoSuchDevice, message)
        })
    }

    fn control_socket(&self, id: &str, exclusive: bool) -> Result<PathBuf, CommandError> {
        let device = &self.devices[self.device_index(id)?];
        let error = |code, why| Err(CommandError::new(code, format!("{id}: {why}")));
        if device.external {
            let why = "the launcher did not start its process: use that process's control socket";
            return error(ErrorCode::NotSupported, why);
        }
        let Some(control) = &device.spec.control else {
            return error(ErrorCode::NotSupported, "only disks have this command");
        };
        if device.current.is_none() {
            return error(ErrorCode::DeviceLost, "no process serves the device");
        }
        if exclusive && device.swap.is_some() {
            return error(ErrorCode::Busy, SWAP_IN_PROGRESS);
        }
        Ok(control.path.clone())
    }

    /// Starts a swap.
    fn start_swap(
        &mut self,
        id: &str,
        source: SwapSource,
        reply: &Sender<SwapReady>,
    ) -> Result<(), CommandError> {
        let index = self.device_index(id)?;
        let device = &self.devices[index];
        let error = |code, why| Err(CommandError::new(code, format!("{id}: {why}")));
        if device.swap.is_some() {
            return error(ErrorCode::Busy, SWAP_IN_PROGRESS);
        }
        let stage = match source {
            SwapSource::SameProgram if device.external => {
                let why = "the launcher did not start its process: use swap";
                return error(ErrorCode::NotSupported, why);
            }
            SwapSource::SameProgram if !device.is_vhost_user || device.spec.program.needs_stdin => {
                self.restart_in_place(index, reply.clone());
                return Ok(());
            }
            _ if !device.is_vhost_user => {
                let why = "this device cannot be swapped: use restart";
                return error(ErrorCode::NotSupported, why);
            }
            SwapSource::SameProgram => {
                let spec = device.spec.with_new_sockets(&mut self.runtime);
                let spec = spec.map_err(CommandError::failed)?;
                self.start_beside(index, spec, None, reply)?
            }
            SwapSource::Description(text) => {
                let config = with_description(&self.config, id, &text)?;
                let plan = plan::device(&config, id).ok_or_else(|| no_such_device(id))?;
                if plan.program.needs_stdin && device.spec.program.needs_stdin {
                    return error(
                        ErrorCode::NotSupported,
                        "it uses stdio already: use restart",
                    );
                }
                let open = device.spec.resources();
                let spec = ProcessSpec::new(plan.program, open, &mut self.runtime);
                let spec = spec.map_err(CommandError::failed)?;
                self.start_beside(index, spec, Some(Box::new(config)), reply)?
            }
            SwapSource::Socket(path) => {
                let _ = reply.send(Ok(Some(path)));
                SwapStage::Ready {
                    process: None,
                    successor: Successor::External,
                }
            }
        };
        self.devices[index].restart_at = None;
        self.devices[index].swap = Some(stage);
        Ok(())
    }

    /// Starts the successor with sockets of its own, beside the old process.
    fn start_beside(
        &mut self,
        index: usize,
        spec: ProcessSpec,
        config: Option<Box<MachineConfig>>,
        reply: &Sender<SwapReady>,
    ) -> Result<SwapStage, CommandError> {
        // If the process cannot start, the client gets the reason that it prints.
        let (reader, writer) = std::io::pipe().map_err(CommandError::failed)?;
        let mut spawn_spec = spec.spawn_spec();
        spawn_spec.stderr = Some(writer.into());
        let process = self.processes.spawn_with_ready(index, spawn_spec);
        let process = process.map_err(CommandError::failed)?;
        self.processes.forward_stderr(process, reader);
        self.processes.kill_unless_cancelled(process, READY_LIMIT);
        Ok(SwapStage::Starting {
            process,
            successor: Successor::NewSocket {
                spec: Box::new(spec),
                config,
            },
            reply: reply.clone(),
            first_line: None,
            status: None,
        })
    }

    /// Ends the old process, so that the successor can be started at the same socket.
    fn restart_in_place(&mut self, index: usize, reply: Sender<SwapReady>) {
        let device = &mut self.devices[index];
        device.restart_at = None;
        device.swap = Some(SwapStage::AwaitingExit { reply });
        match device.current {
            Some(number) => self.processes.terminate(number, REPLACED_LIMIT),
            None => self.start_in_place(index),
        }
    }

    /// The old process has ended: starts the successor at the same socket.
    pub fn start_in_place(&mut self, index: usize) {
        let device = &mut self.devices[index];
        let awaiting = |stage: &mut SwapStage| matches!(stage, SwapStage::AwaitingExit { .. });
        let Some(SwapStage::AwaitingExit { reply }) = device.swap.take_if(awaiting) else {
            return;
        };
        let spec = device.spec.spawn_spec();
        match self.processes.spawn_with_ready(index, spec) {
            Ok(process) => {
                self.processes.kill_unless_cancelled(process, READY_LIMIT);
                device.current = Some(process);
                device.swap = Some(SwapStage::Starting {
                    process,
                    successor: Successor::SameSocket,
                    reply,
                    // It has the launcher's stderr, which is not captured.
                    first_line: Some(String::new()),
                    status: None,
                });
            }
            Err(error) => {
                let what = format!("{error:#}");
                let _ = reply.send(Err(CommandError::failed(&what)));
                self.restart(index, Instant::now(), true, &what);
            }
        }
    }

    /// A process is ready. If it is the successor of a swap, the control socket's thread goes on.
    pub fn process_ready(&mut self, number: ProcessNumber) {
        self.processes.cancel_kill(number);
        for device in &mut self.devices {
            device.swap = device.swap.take().map(|stage| stage.process_ready(number));
        }
    }

    /// A process printed its first line to stderr. If it is a successor that does not become
    /// ready, that is the reason.
    pub fn first_line(&mut self, number: ProcessNumber, line: &str) {
        for index in 0..self.devices.len() {
            if let Some(stage) = &mut self.devices[index].swap {
                stage.set_first_line(number, line);
                self.end_failed_swap(index);
            }
        }
    }

    /// A process of the device has ended, which may be the successor of a swap.
    pub fn swap_process_exited(&mut self, index: usize, number: ProcessNumber, status: ExitStatus) {
        if let Some(stage) = &mut self.devices[index].swap {
            stage.process_exited(number, status);
            self.end_failed_swap(index);
        }
    }

    /// Ends the swap if its successor could not start.
    fn end_failed_swap(&mut self, index: usize) {
        let device = &mut self.devices[index];
        let Some(SwapStage::Starting {
            reply,
            first_line: Some(line),
            status: Some(status),
            ..
        }) = device.swap.take_if(|stage| stage.has_failed())
        else {
            return;
        };
        let why = if line.is_empty() {
            let (id, program) = (device.id(), device.spec.program.name);
            format!("{id}: {program} did not start: {}", describe(status))
        } else {
            line
        };
        let _ = reply.send(Err(CommandError::failed(why)));
        self.restart_if_unserved(index);
    }

    /// The runner uses the successor: makes it the process of the device.
    fn commit_swap(&mut self, index: usize) {
        let device = &mut self.devices[index];
        let is_ready = |stage: &mut SwapStage| matches!(stage, SwapStage::Ready { .. });
        let Some(SwapStage::Ready { process, successor }) = device.swap.take_if(is_ready) else {
            return;
        };
        device.history = RestartHistory::default();
        match successor {
            Successor::SameSocket => return self.restart_if_unserved(index),
            Successor::NewSocket { spec, config } => {
                device.spec = *spec;
                device.external = false;
                if let Some(config) = config {
                    self.config = *config;
                }
            }
            Successor::External => {
                device.spec.close_resources();
                device.external = true;
            }
        }
        let old = std::mem::replace(&mut device.current, process);
        if let Some(process) = process.and_then(|number| self.processes.get_mut(number)) {
            process.was_connected = true;
        }
        if let Some(old) = old {
            self.processes.terminate(old, REPLACED_LIMIT);
        }
        // The successor may have died during the swap.
        self.restart_if_unserved(index);
    }

    /// The device keeps its process: ends the successor.
    fn abort_swap(&mut self, index: usize) {
        let device = &mut self.devices[index];
        let Some(stage) = device.swap.take() else {
            return;
        };
        if let Some(number) = stage.process()
            && device.current != Some(number)
        {
            self.processes.terminate(number, REPLACED_LIMIT);
        }
        self.restart_if_unserved(index);
    }
}

fn no_such_device(id: &str) -> CommandError {
    let message = format!("{id}: there is no such device");
    CommandError::new(ErrorCode::NoSuchDevice, message)
}

/// Returns the description of the machine with another description of the device `id`.
fn with_description(
    config: &MachineConfig,
    id: &str,
    text: &str,
) -> Result<MachineConfig, CommandError> {
    let mut config = config.clone();
    let missing = || no_such_device(id);
    let invalid =
        |why: String| CommandError::new(ErrorCode::InvalidCommand, format!("{id}: {text}: {why}"));
    let (kind, index) = plan::split_id(id).ok_or_else(missing)?;
    match kind {
        "disk" => {
            let disk = config.disk.get_mut(index).ok_or_else(missing)?;
            *disk = keyval::parse(text).map_err(invalid)?;
        }
        "net" => {
            let net = config.net.get_mut(index).ok_or_else(missing)?;
            *net = keyval::parse(text).map_err(invalid)?;
        }
        "console" => {
            let console = config.console.get_mut(index).ok_or_else(missing)?;
            *console = keyval::parse(text).map_err(invalid)?;
        }
        _ => return Err(missing()),
    }
    config
        .check()
        .map_err(|why| CommandError::new(ErrorCode::InvalidCommand, why.to_string()))?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_description_is_checked_together_with_the_rest() {
        let config: MachineConfig = toml::from_str(
            "kernel = 'k'\n[[disk]]\npath = 'a'\n[[disk]]\npath = 'b'\n\
             [[console]]\ntype = 'stdio'\n[[console]]\ntype = 'pty'",
        )
        .unwrap();
        let new = with_description(&config, "disk1", "path=c,queues=2").unwrap();
        assert_eq!(new.disk[1].queues, Some(2));
        assert_eq!(new.disk[0], config.disk[0]);
        for (id, text, message) in [
            ("disk1", "path=a", "disk1: a is in use by disk0"),
            ("disk1", "pth=c", "disk1: pth=c: unknown key `pth`"),
            ("disk2", "path=c", "disk2: there is no such device"),
            ("platform", "null", "platform: there is no such device"),
            ("console1", "stdio", "only one console can use stdio"),
        ] {
            let error = with_description(&config, id, text).unwrap_err();
            assert!(error.message.starts_with(message), "{error:?}");
        }
    }
}

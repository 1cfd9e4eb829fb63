//! The start of a machine: first the device processes, then, when all are ready, the runner.

use std::os::fd::AsRawFd;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Instant;

use anyhow::bail;
use outrigger_protocol::{ErrorCode, exit};

use super::device::SupervisedDevice;
use super::process_spec::ProcessSpec;
use super::spawn::{SpawnSpec, describe, exit_code};
use super::{EventReceiver, READY_LIMIT, Supervisor};
use crate::messages::{CommandError, ProcessNumber, SupervisorEvent};
use crate::plan::MachinePlan;

impl Supervisor {
    /// Starts all processes. Returns the exit code of a device process that could not start and
    /// has reported why; `None` when the runner was started.
    ///
    /// # Errors
    /// A resource or socket cannot be opened, or a process cannot be started, dies or does not
    /// become ready in time; or a termination signal arrived.
    pub fn start(
        &mut self,
        plan: MachinePlan,
        events: &EventReceiver,
    ) -> anyhow::Result<Option<u8>> {
        let mut runner = plan.runner;
        for device in plan.devices {
            let spec = ProcessSpec::new(device.program.clone(), &[], &mut self.runtime)?;
            let path = spec.socket.path.to_string_lossy().into_owned();
            let (option, value) = device.option(&path);
            runner.arg(option, value);
            let is_vhost_user = device.kind.is_some();
            self.devices
                .push(SupervisedDevice::new(spec, is_vhost_user));
        }
        for index in 0..self.devices.len() {
            let spec = self.devices[index].spec.spawn_spec();
            let number = self.processes.spawn_with_ready(index, spec)?;
            self.devices[index].current = Some(number);
            self.show(number, &self.devices[index].spec.program.summary);
        }
        if let Some(code) = self.wait_ready(events)? {
            return Ok(Some(code));
        }
        runner.arg("--control", self.runtime.runner_control());
        let spec = SpawnSpec {
            id: runner.id,
            program: runner.name,
            args: runner.args,
            fds: plan.inherited.iter().map(AsRawFd::as_raw_fd).collect(),
            stdin: false,
            stderr: None,
        };
        let (number, _) = self.processes.spawn(None, spec)?;
        self.runner = Some(number);
        self.show(number, &runner.summary);
        Ok(None)
    }

    /// Prints the line that shows a process to the user.
    fn show(&self, number: ProcessNumber, summary: &str) {
        if let Some(process) = self.processes.get(number)
            && !self.quiet
        {
            let (id, program) = (&process.id, process.program);
            let pid = process.pid.as_raw_nonzero();
            eprintln!("{id:10} {program:16} pid {pid:<8} {summary}");
        }
    }

    /// Waits until all device processes are ready. Returns the exit code of one that ended with
    /// a code that means that it has reported the reason.
    fn wait_ready(&mut self, events: &EventReceiver) -> anyhow::Result<Option<u8>> {
        let deadline = Instant::now() + READY_LIMIT;
        let all = self.processes.numbers();
        let mut waiting = all.clone();
        while let Some(&first) = waiting.first() {
            let left = deadline.saturating_duration_since(Instant::now());
            match events.recv_timeout(left) {
                Ok(SupervisorEvent::Ready(number)) => waiting.retain(|&it| it != number),
                Ok(SupervisorEvent::Exited(number, status)) => {
                    let Some(process) = self.processes.remove(number) else {
                        continue;
                    };
                    if let Some(code @ (exit::FAILURE | exit::USAGE)) = exit_code(status) {
                        return Ok(Some(code));
                    }
                    let (id, program) = (process.id, process.program);
                    bail!("{id}: {program} did not start: {}", describe(status));
                }
                Ok(SupervisorEvent::Terminate) => bail!("ended by a signal during the start"),
                Ok(SupervisorEvent::Request(request)) => request.refuse(CommandError::new(
                    ErrorCode::Busy,
                    "the machine is still starting: try again",
                )),
                Ok(SupervisorEvent::Machine(_) | SupervisorEvent::FirstLine(..)) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let Some(process) = self.processes.get(first) else {
                        bail!("a device process ended during the start");
                    };
                    let (id, program) = (&process.id, process.program);
                    bail!("{id}: {program} was not ready within {READY_LIMIT:?}");
                }
            }
        }
        // The runner does not report its first connection to each device as an event.
        for number in all {
            if let Some(process) = self.processes.get_mut(number) {
                process.was_connected = true;
            }
        }
        Ok(None)
    }
}

//! Pause, resume, reset and swap: by the control socket, and resets by the guest.

use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use outrigger_cli::choices::OnReset;
use outrigger_cli::socket;
use outrigger_control_socket::Responder;
use outrigger_protocol::control::{ControlCommand, ControlReply, MachineEvent, MachineState};
use outrigger_protocol::{ErrorCode, exit};

use super::{Machine, MachineExit};
use crate::Error;
use crate::control::ControlRequest;
use crate::frontend::{MESSAGE_DEADLINE, SwapFailure, VhostUserDevice};
use crate::vcpu::handle::VcpuCommand;

/// How long a vCPU may take to park.
const PARK_DEADLINE: Duration = Duration::from_secs(5);

/// How long a device task may take to carry out a command, before the messages to its back
/// end are cancelled.
const TASK_DEADLINE: Duration = MESSAGE_DEADLINE.saturating_mul(2);

/// How long a reset waits for stale back ends to end. The launcher ends them within 0.1 s.
const STALE_LIMIT: Duration = Duration::from_secs(2);
/// How often it checks.
const STALE_INTERVAL: Duration = Duration::from_millis(5);

impl Machine {
    /// Carries out a command and answers it. If it fails, the machine continues.
    pub(super) fn handle_command(&mut self, request: ControlRequest) -> Option<MachineExit> {
        let ControlRequest { command, responder } = request;
        let result = match command {
            ControlCommand::Pause {} => self.pause(),
            ControlCommand::Resume {} => self.resume(),
            ControlCommand::Reset {} => self.reset("control"),
            ControlCommand::Stop {} => {
                responder.reply(&ControlReply::ok());
                return Some(MachineExit::new(exit::POWERED_OFF, "stopped by command"));
            }
            ControlCommand::Swap {
                id,
                socket: Some(path),
                device: None,
            } => {
                self.swap(&id, path, responder);
                return None;
            }
            ControlCommand::Swap { .. } | ControlCommand::Restart { .. } => {
                let why = "this is the runner, which starts no process: use swap with socket, the \
                           path at which the new process listens";
                responder.reply(&ControlReply::error(ErrorCode::NotSupported, why));
                return None;
            }
            ControlCommand::Resize { .. }
            | ControlCommand::Flush { .. }
            | ControlCommand::Stats { .. } => {
                let why = "this is the runner, which knows no disks: use the disk's own control \
                           socket";
                responder.reply(&ControlReply::error(ErrorCode::NotSupported, why));
                return None;
            }
            // The control thread answers these.
            ControlCommand::Status {} | ControlCommand::Watch {} => Ok(()),
        };
        responder.reply(&match result {
            Ok(()) => ControlReply::ok(),
            Err(error) => {
                let code = match error {
                    Error::Device { .. } => ErrorCode::DeviceLost,
                    _ => ErrorCode::Failed,
                };
                ControlReply::error(code, error.to_string())
            }
        });
        None
    }

    /// Starts a swap. The device task answers when it is done.
    fn swap(&self, id: &str, path: PathBuf, responder: Responder) {
        let devices = self.status.devices();
        let Some(device) = devices.iter().find(|device| device.id() == id) else {
            let why = format!("{id}: there is no such device");
            return responder.reply(&ControlReply::error(ErrorCode::NoSuchDevice, why));
        };
        let path = match socket::socket_path(path) {
            Ok(path) => path,
            Err(why) => {
                let why = format!("{id}: {why}");
                return responder.reply(&ControlReply::error(ErrorCode::InvalidCommand, why));
            }
        };
        let callback = move |result: Result<Duration, SwapFailure>| {
            responder.reply(&match result {
                Ok(outage) => ControlReply {
                    outage_us: Some(outage.as_micros().try_into().unwrap_or(u64::MAX)),
                    ..ControlReply::ok()
                },
                Err(failure) => ControlReply::error(failure.code, failure.error.to_string()),
            });
        };
        device.swap(path, Box::new(callback));
    }

    pub(super) fn send_to_vcpus(&self, command: VcpuCommand) {
        for vcpu in 0..self.vcpus.len() {
            self.send_to_vcpu(vcpu, command);
        }
    }

    fn send_to_vcpu(&self, vcpu: usize, command: VcpuCommand) {
        self.vcpus[vcpu].send(command);
        if let Some(trap) = &self.shared.io.trap {
            trap.kick(vcpu);
        }
    }

    pub(super) fn wait_until_parked(&self) -> Result<(), Error> {
        for (vcpu, handle) in self.vcpus.iter().enumerate() {
            handle.wait_until_parked(vcpu, PARK_DEADLINE)?;
        }
        Ok(())
    }

    pub(super) fn park_vcpus(&self) -> Result<(), Error> {
        self.send_to_vcpus(VcpuCommand::Park);
        self.wait_until_parked()
    }

    /// Resets the registers of all vCPUs and runs them. No vCPU runs before all are ready:
    /// the first one starts the others.
    pub(super) fn start_vcpus(&self) -> Result<(), Error> {
        for (vcpu, handle) in self.vcpus.iter().enumerate() {
            self.send_to_vcpu(vcpu, VcpuCommand::Reset);
            if self.shared.show_registers {
                // One after the other, so that their output is in order.
                handle.wait_until_parked(vcpu, PARK_DEADLINE)?;
            }
        }
        self.wait_until_parked()?;
        self.send_to_vcpus(VcpuCommand::Run);
        Ok(())
    }

    /// Sends a command to every device task and waits until all have carried it out. If a
    /// task takes too long, its wait for the back end is cancelled.
    fn command_devices(
        &self,
        command: impl Fn(&VhostUserDevice) -> Receiver<()>,
    ) -> Result<(), Error> {
        let devices = self.status.devices();
        let confirmations: Vec<_> = devices.iter().map(|device| command(device)).collect();
        for (device, confirmation) in devices.iter().zip(confirmations) {
            let mut done = confirmation.recv_timeout(TASK_DEADLINE);
            // First the connection to a new back end, then that to the current one.
            for _ in 0..2 {
                if done.is_err() {
                    device.cancel_wait();
                    done = confirmation.recv_timeout(TASK_DEADLINE);
                }
            }
            done.map_err(|_| Error::TaskHangs(device.id().to_owned()))?;
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Error> {
        if self.state() == MachineState::Running {
            let paused = self
                .park_vcpus()
                .and_then(|()| self.command_devices(VhostUserDevice::pause));
            if paused.is_err() {
                // Undo what was done.
                let resumed = self.command_devices(VhostUserDevice::resume);
                self.send_to_vcpus(VcpuCommand::Run);
                return paused.and(resumed);
            }
            self.status.lock().state = MachineState::Paused;
            self.events.emit(&MachineEvent::Paused);
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        if self.state() == MachineState::Paused {
            self.command_devices(VhostUserDevice::resume)?;
            self.send_to_vcpus(VcpuCommand::Run);
            self.status.lock().state = MachineState::Running;
            self.events.emit(&MachineEvent::Resumed);
        }
        Ok(())
    }

    /// Waits until no stale back end can write to guest memory: it would write into the
    /// memory of the guest that boots next.
    fn wait_for_stale_backends(&self) -> Result<(), Error> {
        let deadline = Instant::now() + STALE_LIMIT;
        for device in self.status.devices() {
            while device.has_stale_backends() {
                if Instant::now() >= deadline {
                    let why = "its process does not answer but is still there: end it first";
                    return Err(Error::device(device.id(), "reset", why));
                }
                std::thread::sleep(STALE_INTERVAL);
            }
        }
        Ok(())
    }

    /// The guest asked for a reset.
    pub(super) fn guest_reset(&mut self) -> Result<Option<MachineExit>, Error> {
        if self.on_reset == OnReset::Exit {
            let reason = "the guest asked for a reset";
            return Ok(Some(MachineExit::new(exit::GUEST_RESET, reason)));
        }
        self.retry_reset_at = None;
        if let Err(error @ Error::Device { .. }) = self.reset("guest") {
            tracing::warn!(%error, "the reset failed and is tried again");
            self.retry_reset_at = Some(Instant::now() + STALE_LIMIT);
        }
        Ok(None)
    }

    /// Resets everything to its state at power-on and boots the guest again. A paused
    /// machine runs afterwards.
    fn reset(&mut self, by: &str) -> Result<(), Error> {
        let was_running = self.state() == MachineState::Running;
        let stopped = self
            .park_vcpus()
            .and_then(|()| self.command_devices(VhostUserDevice::pause))
            .and_then(|()| self.wait_for_stale_backends());
        if stopped.is_err() {
            // Undo what was done.
            if was_running {
                let resumed = self.command_devices(VhostUserDevice::resume);
                self.send_to_vcpus(VcpuCommand::Run);
                return stopped.and(resumed);
            }
            return stopped;
        }
        self.command_devices(VhostUserDevice::reset)?;
        self.shared.io.bus.reset();
        if let Some(trap) = &self.shared.io.trap {
            trap.reset();
        }
        self.shared.ram.clear()?;
        self.irqchip.restore(&self.vm)?;
        let entry = self.boot.load(&self.shared.ram, self.vcpus.len())?;
        *self
            .shared
            .entry
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = entry;
        // Before the vCPUs run: a client may see the guest boot and ask for the status.
        {
            let mut status = self.status.lock();
            status.state = MachineState::Running;
            status.resets += 1;
        }
        self.start_vcpus()?;
        self.events.emit(&MachineEvent::Reset { by: by.to_owned() });
        Ok(())
    }
}

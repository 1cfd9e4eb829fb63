//! The machine as a whole. One thread, the main one, receives all events and carries out
//! all commands that change the machine.
//!
//! It is one type in three files, which therefore use each other: `setup` creates it, this
//! file is the event loop, and `commands` pauses, resumes, resets and swaps.

mod commands;
mod setup;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use outrigger_cli::choices::OnReset;
use outrigger_cli::socket::BoundSocket;
use outrigger_protocol::control::{DeviceState, MachineEvent, MachineState};
use outrigger_protocol::exit;

use self::setup::event_sender;
use crate::boot::BootSource;
use crate::control::ControlRequest;
use crate::events::EventStream;
use crate::frontend::{DeviceEvent, OnLoss};
use crate::status::SharedStatus;
use crate::trap::PlatformChannelEvent;
use crate::vcpu::handle::{VcpuCommand, VcpuHandle};
use crate::vcpu::{VcpuEvent, VcpuShared};
use crate::vm::Vm;
use crate::vm::irqchip::Irqchip;
use crate::{Error, control};

/// How long the end of the machine waits until all replies and events are sent.
const FINISH_LIMIT: Duration = Duration::from_secs(1);

/// What the machine's thread receives.
enum RunnerEvent {
    Device(DeviceEvent),
    Platform(PlatformChannelEvent),
    Vcpu(VcpuEvent),
    Control(ControlRequest),
    Signal(&'static str),
}

/// How the machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineExit {
    /// The exit code: see `outrigger_protocol::exit`.
    pub code: u8,
    /// Why, in words.
    pub reason: String,
}

impl MachineExit {
    fn new(code: u8, reason: impl Into<String>) -> Self {
        MachineExit {
            code,
            reason: reason.into(),
        }
    }

    fn powered_off() -> Self {
        MachineExit::new(exit::POWERED_OFF, "the guest powered off")
    }
}

/// A machine that is set up.
pub struct Machine {
    vm: Arc<Vm>,
    shared: Arc<VcpuShared>,
    boot: BootSource,
    status: Arc<SharedStatus>,
    vcpus: Vec<Arc<VcpuHandle>>,
    irqchip: Irqchip,
    events: EventStream,
    on_reset: OnReset,
    on_loss: Option<OnLoss>,
    /// When a reset by the guest that failed is tried again.
    retry_reset_at: Option<Instant>,
    /// How many devices need the vCPUs to be parked.
    park_requests: usize,
    /// When the loss of the platform ends the machine.
    platform_deadline: Option<Instant>,
    /// Dropping it removes the socket.
    control_socket: Option<BoundSocket>,
    sender: Sender<RunnerEvent>,
    receiver: Receiver<RunnerEvent>,
}

impl Machine {
    /// Serves the control socket `path`; `may_remove_socket`: this process can remove it
    /// when the machine ends.
    ///
    /// # Errors
    /// When the socket cannot be bound.
    pub fn serve_control(&mut self, path: &Path, may_remove_socket: bool) -> Result<(), Error> {
        let sender = event_sender(self.sender.clone(), RunnerEvent::Control);
        let status = Arc::clone(&self.status);
        let (bound, server) =
            control::start(path, may_remove_socket, move || status.status(), sender)?;
        self.control_socket = bound;
        self.events.set_control_server(server);
        Ok(())
    }

    /// A function that ends the machine, for the thread that waits for signals.
    pub fn stopper(&self) -> impl Fn(&'static str) + Send + 'static {
        event_sender(self.sender.clone(), RunnerEvent::Signal)
    }

    /// Runs the machine to its end.
    ///
    /// # Errors
    /// When its state is not known any more: a vCPU does not park, or a reset fails halfway.
    pub fn run(mut self) -> Result<MachineExit, Error> {
        let vcpus = self.vcpus.len();
        self.events.emit(&MachineEvent::Started { vcpus });
        self.start_vcpus()?;
        loop {
            let deadline = self
                .platform_deadline
                .into_iter()
                .chain(self.retry_reset_at)
                .min();
            // The machine has a sender, so the channel is never closed.
            let event = match deadline {
                Some(deadline) => self.receiver.recv_deadline(deadline).ok(),
                None => self.receiver.recv().ok(),
            };
            let exit = match event {
                Some(event) => self.handle_event(event)?,
                None if deadline == self.retry_reset_at => self.guest_reset()?,
                None => Some(MachineExit::new(
                    exit::DEVICE_LOST,
                    "the platform process is lost",
                )),
            };
            if let Some(exit) = exit {
                self.status.lock().state = MachineState::Stopped;
                self.send_to_vcpus(VcpuCommand::Stop);
                self.wait_until_parked()?;
                self.events.emit(&MachineEvent::Stopped {
                    code: exit.code,
                    reason: exit.reason.clone(),
                });
                // Commands that came too late are answered by dropping them.
                self.receiver.try_iter().for_each(drop);
                self.events.finish(FINISH_LIMIT);
                return Ok(exit);
            }
        }
    }

    fn handle_event(&mut self, event: RunnerEvent) -> Result<Option<MachineExit>, Error> {
        match event {
            RunnerEvent::Device(event) => Ok(self.handle_device_event(event)),
            RunnerEvent::Platform(event) => self.handle_platform_event(event),
            RunnerEvent::Vcpu(event) => self.handle_vcpu_event(event),
            RunnerEvent::Control(request) => Ok(self.handle_command(request)),
            RunnerEvent::Signal(reason) => Ok(Some(MachineExit::new(exit::POWERED_OFF, reason))),
        }
    }

    fn handle_device_event(&mut self, event: DeviceEvent) -> Option<MachineExit> {
        match event {
            DeviceEvent::Report(event) => self.events.emit(&event),
            DeviceEvent::ParkVcpus(parked) => {
                self.park_requests += 1;
                // Without an answer, the device gives up after its deadline.
                if self.state() == MachineState::Paused || self.park_vcpus().is_ok() {
                    let _ = parked.send(());
                }
            }
            DeviceEvent::ResumeVcpus => {
                self.park_requests = self.park_requests.saturating_sub(1);
                if self.park_requests == 0 && self.state() == MachineState::Running {
                    self.send_to_vcpus(VcpuCommand::Run);
                }
            }
            DeviceEvent::EndMachine(reason) => {
                return Some(MachineExit::new(exit::DEVICE_LOST, reason));
            }
        }
        None
    }

    fn handle_vcpu_event(&mut self, event: VcpuEvent) -> Result<Option<MachineExit>, Error> {
        match event {
            VcpuEvent::Reset => self.guest_reset(),
            VcpuEvent::PowerOff => Ok(Some(MachineExit::powered_off())),
            VcpuEvent::TripleFault(vcpu) => Ok(Some(MachineExit::new(
                exit::GUEST_FAILED,
                format!("the guest died by a triple fault of vCPU {vcpu}"),
            ))),
            VcpuEvent::Fatal(reason) => Ok(Some(MachineExit::new(exit::FAILURE, reason))),
        }
    }

    fn handle_platform_event(
        &mut self,
        event: PlatformChannelEvent,
    ) -> Result<Option<MachineExit>, Error> {
        let id = "platform".to_owned();
        match event {
            PlatformChannelEvent::Connected { outage } => {
                self.status.lock().platform = Some(DeviceState::Running);
                self.platform_deadline = None;
                self.events.emit(&match outage {
                    None => MachineEvent::DeviceConnected { id },
                    Some(outage) => MachineEvent::DeviceRunning {
                        id,
                        outage_us: outage.as_micros().try_into().unwrap_or(u64::MAX),
                        replayed: 0,
                    },
                });
                Ok(None)
            }
            PlatformChannelEvent::Lost { reason, for_good } => {
                let lost = format!("the platform process is lost: {reason}");
                self.status.lock().platform = Some(DeviceState::Lost);
                self.events.emit(&MachineEvent::DeviceLost {
                    id,
                    reason,
                    // The access of a vCPU stays in its slot until it is answered.
                    tracked: true,
                });
                if let Some(OnLoss::Stop(limit)) = self.on_loss {
                    self.platform_deadline = Some(Instant::now() + limit);
                }
                Ok(for_good.then(|| MachineExit::new(exit::DEVICE_LOST, lost)))
            }
            PlatformChannelEvent::PowerOff => Ok(Some(MachineExit::powered_off())),
            PlatformChannelEvent::Reset => self.guest_reset(),
            PlatformChannelEvent::Exit(code) => {
                self.events.emit(&MachineEvent::GuestExit { code });
                Ok(Some(match code {
                    0 => MachineExit::new(exit::POWERED_OFF, "the guest is done"),
                    _ => MachineExit::new(
                        exit::GUEST_FAILED,
                        format!("the guest failed with code {code}"),
                    ),
                }))
            }
        }
    }

    fn state(&self) -> MachineState {
        self.status.lock().state
    }
}

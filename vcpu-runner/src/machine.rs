//! The machine as a whole: sets everything up, then decides what happens next.
//! One thread, the main one, takes all notices and carries out all commands.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use outrigger_cli::socket::BoundSocket;
use outrigger_protocol::control::{
    ControlCommand, ControlReply, DeviceState, MachineEvent, MachineState,
};
use outrigger_protocol::{ErrorCode, exit};

use crate::boot::{BootSource, cpuid};
use crate::control::{Answer, Order as ControlOrder};
use crate::events::Events;
use crate::frontend::session::DEADLINE;
use crate::frontend::{OnLoss, Slot, Watchdog, slot};
use crate::options::{OnReset, Options};
use crate::overview::Overview;
use crate::pci::Function;
use crate::pci::bus::Bus;
use crate::pci::intx::Intx;
use crate::pci::virtio::VirtioPci;
use crate::trap::{self, TrapChannel};
use crate::vcpu::io::Io;
use crate::vcpu::state::{Control, Order};
use crate::vcpu::{Report, Shared, Vcpu};
use crate::vm::chips::Chips;
use crate::vm::irq::Interrupts;
use crate::vm::memory::Ram;
use crate::vm::{Vm, host};
use crate::{Error, control};

/// How long a vCPU may take to stand still.
const PARK_DEADLINE: Duration = Duration::from_secs(5);

/// How long a reset waits for the end of processes that were given up. The launcher ends
/// them in a tenth of a second.
const GONE: Duration = Duration::from_secs(2);
/// How often it looks.
const LOOK: Duration = Duration::from_millis(5);

/// How long the end of the machine waits for the answer to the command that
/// caused it to go out.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);

/// What reaches the machine's thread.
enum Notice {
    Slot(slot::Notice),
    Platform(trap::Notice),
    Vcpu(Report),
    Control(ControlOrder),
    Signal(&'static str),
}

/// How the machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The exit code, see `outrigger_protocol::exit`.
    pub code: u8,
    /// Why, in words.
    pub reason: String,
}

/// A machine that is set up and stands still.
pub struct Machine {
    vm: Arc<Vm>,
    shared: Arc<Shared>,
    boot: BootSource,
    overview: Arc<Overview>,
    vcpus: Vec<Arc<Control>>,
    chips: Chips,
    events: Events,
    on_reset: OnReset,
    on_loss: Option<OnLoss>,
    /// When a reset that the guest asked for is tried again.
    reset_at: Option<Instant>,
    /// Slots that want the vCPUs to stand still at the moment.
    holds: usize,
    /// When a lost platform ends the machine.
    platform_limit: Option<Instant>,
    /// Kept for its end.
    control_socket: Option<BoundSocket>,
    sender: Sender<Notice>,
    notices: Receiver<Notice>,
}

impl Machine {
    /// Sets up KVM, memory, devices and vCPUs as `options` say.
    ///
    /// # Errors
    /// The first thing that does not work.
    pub fn new(options: &Options) -> Result<Self, Error> {
        options.memory.check_host()?;
        let events = Events::open(options.events.as_deref())?;
        let boot = BootSource::open(options)?;
        let kvm = host::open()?;
        let (sender, notices) = unbounded();
        let watchdog = Watchdog::start()?;
        let cpus = usize::from(options.cpus);

        // Handshakes are round trips to other processes: all at once, and while
        // KVM sets up its part.
        let (pending, vm, ram) = std::thread::scope(|scope| {
            let handshakes: Vec<_> = options
                .devices
                .iter()
                .map(|spec| scope.spawn(|| Slot::connect(spec.clone(), &watchdog)))
                .collect();
            let ram = Ram::new(options.memory)?;
            let vm = Vm::new(kvm, &ram)?;
            let pending = handshakes
                .into_iter()
                .map(|thread| match thread.join() {
                    Ok(result) => result,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
                .collect::<Result<Vec<_>, _>>()?;
            Ok::<_, Error>((pending, Arc::new(vm), Arc::new(ram)))
        })?;
        let chips = Chips::capture(&vm)?;
        let interrupts: Arc<dyn Interrupts> = Arc::clone(&vm) as Arc<dyn Interrupts>;
        let intx = Intx::start(Arc::clone(&interrupts))?;

        let mut devices: Vec<Arc<dyn Function>> = Vec::new();
        let mut slots = Vec::new();
        for (index, pending) in pending.into_iter().enumerate() {
            let device = VirtioPci::new(
                pending.info().clone(),
                index,
                Arc::clone(pending.slot()) as _,
                Arc::clone(&interrupts),
                Arc::clone(&intx),
            )?;
            devices.push(Arc::clone(&device) as _);
            let id = pending.slot().id().to_owned();
            events.emit(&MachineEvent::DeviceConnected { id });
            let to = sender.clone();
            let notices = send(to, Notice::Slot);
            slots.push(pending.run(device, Arc::clone(&ram), options.on_loss, notices)?);
        }
        let trap = match &options.platform {
            None => None,
            Some(endpoint) => {
                let trap = TrapChannel::new(cpus)?;
                let to = send(sender.clone(), Notice::Platform);
                trap.start(endpoint.clone(), Arc::clone(&interrupts), to)?;
                Some(trap)
            }
        };

        let entry = boot.load(&ram, cpus)?;
        let shared = Arc::new(Shared {
            ram,
            entry: Mutex::new(entry),
            io: Io {
                bus: Arc::new(Bus::new(devices)),
                trap,
            },
            show_registers: options.show_regs,
        });
        let cpuid = cpuid::supported(vm.kvm())?;
        let vcpus = (0..cpus)
            .map(|index| {
                let cpuid = cpuid::for_vcpu(&cpuid, index, cpus);
                let to = send(sender.clone(), Notice::Vcpu);
                Vcpu::new(&vm, index, &cpuid, Arc::clone(&shared), to)?.start()
            })
            .collect::<Result<Vec<_>, _>>()?;
        let has_platform = options.platform.is_some();
        let overview = Overview::new(cpus, shared.ram.size(), slots, has_platform);
        Ok(Machine {
            vm,
            shared,
            boot,
            overview: Arc::new(overview),
            vcpus,
            chips,
            events,
            on_reset: options.on_reset,
            on_loss: options.on_loss,
            reset_at: None,
            holds: 0,
            platform_limit: None,
            control_socket: None,
            sender,
            notices,
        })
    }

    /// Serves the control socket `path`; `removes`: this process may remove it when
    /// the machine ends.
    ///
    /// # Errors
    /// When it cannot be bound.
    pub fn serve_control(&mut self, path: &Path, removes: bool) -> Result<(), Error> {
        let to = send(self.sender.clone(), Notice::Control);
        let overview = Arc::clone(&self.overview);
        let (bound, watchers) = control::start(path, removes, move || overview.status(), to)?;
        self.control_socket = bound;
        self.events.watched_by(watchers);
        Ok(())
    }

    /// A function that ends the machine, for a signal's thread.
    pub fn stopper(&self) -> impl Fn(&'static str) + Send + 'static {
        send(self.sender.clone(), Notice::Signal)
    }

    /// Runs the machine to its end.
    ///
    /// # Errors
    /// When it cannot be kept in order: a vCPU that does not stand still, a
    /// reset that fails.
    pub fn run(mut self) -> Result<End, Error> {
        self.events.emit(&MachineEvent::Started {
            vcpus: self.vcpus.len(),
        });
        self.start_vcpus()?;
        loop {
            // The sender is ours as well, so the channel never closes.
            let limit = self.platform_limit.into_iter().chain(self.reset_at).min();
            let notice = match limit {
                Some(limit) => self.notices.recv_deadline(limit).ok(),
                None => self.notices.recv().ok(),
            };
            let ended = match notice {
                Some(notice) => self.notice(notice)?,
                None if limit == self.reset_at => self.guest_reset()?,
                None => Some(end(exit::DEVICE_LOST, "the platform process is lost")),
            };
            if let Some(end) = ended {
                self.overview.now().state = MachineState::Stopped;
                self.order(Order::Stop);
                self.wait_still()?;
                self.events.emit(&MachineEvent::Stopped {
                    code: end.code,
                    reason: end.reason.clone(),
                });
                self.events.flush(ANSWER_DEADLINE);
                return Ok(end);
            }
        }
    }

    fn notice(&mut self, notice: Notice) -> Result<Option<End>, Error> {
        match notice {
            Notice::Slot(slot::Notice::Event(event)) => {
                self.events.emit(&event);
                Ok(None)
            }
            Notice::Slot(slot::Notice::Hold(still)) => {
                self.holds += 1;
                // If they do not stand still, nobody is told that they do.
                if self.state() == MachineState::Paused || self.park().is_ok() {
                    let _ = still.send(());
                }
                Ok(None)
            }
            Notice::Slot(slot::Notice::Release) => {
                self.holds = self.holds.saturating_sub(1);
                if self.holds == 0 && self.state() == MachineState::Running {
                    self.order(Order::Run);
                }
                Ok(None)
            }
            Notice::Slot(slot::Notice::End(why)) => Ok(Some(end(exit::DEVICE_LOST, why))),
            Notice::Platform(notice) => self.platform(notice),
            Notice::Vcpu(report) => match report {
                Report::Reset => self.guest_reset(),
                Report::PowerOff => Ok(Some(powered_off())),
                Report::TripleFault(vcpu) => Ok(Some(end(
                    exit::GUEST_FAILED,
                    format!("the guest died by a triple fault of vCPU {vcpu}"),
                ))),
                Report::Fatal(why) => Ok(Some(end(exit::FAILURE, why))),
            },
            Notice::Control(order) => self.control(order),
            Notice::Signal(name) => Ok(Some(end(exit::POWERED_OFF, name))),
        }
    }

    fn platform(&mut self, notice: trap::Notice) -> Result<Option<End>, Error> {
        let id = "platform".to_owned();
        match notice {
            trap::Notice::Connected(outage) => {
                self.overview.now().platform = Some(DeviceState::Running);
                self.platform_limit = None;
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
            trap::Notice::Lost(reason, for_good) => {
                let lost = format!("the platform process is lost: {reason}");
                self.overview.now().platform = Some(DeviceState::Lost);
                self.events.emit(&MachineEvent::DeviceLost {
                    id,
                    reason,
                    // A vCPU's access stays in its slot until it is answered.
                    tracked: true,
                });
                if let Some(OnLoss::Stop(limit)) = self.on_loss {
                    self.platform_limit = Some(Instant::now() + limit);
                }
                Ok(for_good.then(|| end(exit::DEVICE_LOST, lost)))
            }
            trap::Notice::PowerOff => Ok(Some(powered_off())),
            trap::Notice::Reset => self.guest_reset(),
            trap::Notice::Exit(code) => {
                self.events.emit(&MachineEvent::GuestExit { code });
                Ok(Some(match code {
                    0 => end(exit::POWERED_OFF, "the guest is done"),
                    _ => end(
                        exit::GUEST_FAILED,
                        format!("the guest failed with code {code}"),
                    ),
                }))
            }
        }
    }

    fn control(&mut self, order: ControlOrder) -> Result<Option<End>, Error> {
        let ControlOrder {
            command,
            answer,
            answered,
        } = order;
        let result = match command {
            ControlCommand::Pause {} => self.pause(),
            ControlCommand::Resume {} => self.resume(),
            ControlCommand::Reset {} => self.reset("control"),
            ControlCommand::Stop {} => {
                answer.send(ControlReply::ok());
                let _ = answered.recv_timeout(ANSWER_DEADLINE);
                return Ok(Some(end(exit::POWERED_OFF, "stopped by command")));
            }
            ControlCommand::Swap {
                id,
                socket: Some(path),
                device: None,
            } => {
                self.swap(&id, path, answer);
                return Ok(None);
            }
            ControlCommand::Swap { .. } | ControlCommand::Restart { .. } => Err(Error::Command(
                "this is the runner, which starts no process: swap to one that listens at socket",
            )),
            ControlCommand::Resize { .. }
            | ControlCommand::Flush { .. }
            | ControlCommand::Stats { .. } => Err(Error::Command(
                "this is the runner, which knows no disks: ask the disk's own control socket",
            )),
            // The control thread's own.
            ControlCommand::Status {} | ControlCommand::Watch {} => Ok(()),
        };
        // A failed command is its client's matter; the machine goes on.
        answer.send(match result {
            Ok(()) => ControlReply::ok(),
            Err(error) => ControlReply::error(ErrorCode::Failed, error.to_string()),
        });
        Ok(None)
    }

    /// The slot answers, when it is done.
    fn swap(&self, id: &str, path: PathBuf, answer: Answer) {
        let Some(slot) = self.overview.slots().iter().find(|slot| slot.id() == id) else {
            return answer.send(ControlReply::error(
                ErrorCode::NoSuchDevice,
                format!("no device is named {id}"),
            ));
        };
        let swapped = move |result: Result<Duration, Error>| {
            answer.send(match result {
                Ok(outage) => ControlReply {
                    outage_us: Some(outage.as_micros().try_into().unwrap_or(u64::MAX)),
                    ..ControlReply::ok()
                },
                Err(error) => ControlReply::error(ErrorCode::Failed, error.to_string()),
            });
        };
        slot.swap(path, Box::new(swapped));
    }

    fn order(&self, order: Order) {
        for vcpu in 0..self.vcpus.len() {
            self.order_one(vcpu, order);
        }
    }

    fn order_one(&self, vcpu: usize, order: Order) {
        self.vcpus[vcpu].order(order);
        if let Some(trap) = &self.shared.io.trap {
            trap.kick(vcpu);
        }
    }

    fn wait_still(&self) -> Result<(), Error> {
        for (vcpu, control) in self.vcpus.iter().enumerate() {
            control.wait_still(vcpu, PARK_DEADLINE)?;
        }
        Ok(())
    }

    fn park(&self) -> Result<(), Error> {
        self.order(Order::Park);
        self.wait_still()
    }

    /// Sets all registers to their start values and runs. No vCPU runs before
    /// all are ready: the first one starts the others.
    fn start_vcpus(&self) -> Result<(), Error> {
        for (vcpu, control) in self.vcpus.iter().enumerate() {
            self.order_one(vcpu, Order::Reset);
            if self.shared.show_registers {
                // In their order.
                control.wait_still(vcpu, PARK_DEADLINE)?;
            }
        }
        self.wait_still()?;
        self.order(Order::Run);
        Ok(())
    }

    /// Gives every slot an order and waits for all of them. A process that does
    /// not keep its deadlines is cut off, and its slot then answers.
    fn order_slots(&self, order: impl Fn(&Slot) -> Receiver<()>) -> Result<(), Error> {
        let slots = self.overview.slots();
        let waits: Vec<_> = slots.iter().map(|slot| order(slot)).collect();
        for (slot, wait) in slots.iter().zip(waits) {
            let mut done = wait.recv_timeout(2 * DEADLINE);
            // First a process that may be about to come, then the one that is there.
            for _ in 0..2 {
                if done.is_err() {
                    slot.cut_off();
                    done = wait.recv_timeout(2 * DEADLINE);
                }
            }
            done.map_err(|_| Error::device(slot.id(), "stopping", "its slot hangs"))?;
        }
        Ok(())
    }

    fn state(&self) -> MachineState {
        self.overview.now().state
    }

    fn pause(&mut self) -> Result<(), Error> {
        if self.state() == MachineState::Running {
            let stopped = self.park().and_then(|()| self.order_slots(Slot::pause));
            if stopped.is_err() {
                // Half a pause is none.
                let resumed = self.order_slots(Slot::resume);
                self.order(Order::Run);
                return stopped.and(resumed);
            }
            self.overview.now().state = MachineState::Paused;
            self.events.emit(&MachineEvent::Paused);
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Error> {
        if self.state() == MachineState::Paused {
            self.order_slots(Slot::resume)?;
            self.order(Order::Run);
            self.overview.now().state = MachineState::Running;
            self.events.emit(&MachineEvent::Resumed);
        }
        Ok(())
    }

    /// Waits until no process that was given up could write to guest memory yet: it
    /// would write into what the next guest has there.
    fn wait_quiet(&self) -> Result<(), Error> {
        let deadline = Instant::now() + GONE;
        for slot in self.overview.slots() {
            while !slot.is_quiet() {
                if Instant::now() >= deadline {
                    let why = "its process does not answer, but is there still: end it first";
                    return Err(Error::device(slot.id(), "reset", why));
                }
                std::thread::sleep(LOOK);
            }
        }
        Ok(())
    }

    fn guest_reset(&mut self) -> Result<Option<End>, Error> {
        if self.on_reset == OnReset::Exit {
            return Ok(Some(end(exit::GUEST_RESET, "the guest asked for a reset")));
        }
        self.reset_at = None;
        if let Err(error @ Error::Device { .. }) = self.reset("guest") {
            tracing::warn!("{error}; it is tried again");
            self.reset_at = Some(Instant::now() + GONE);
        }
        Ok(None)
    }

    /// Everything back to power-on, then the guest boots again. A paused machine
    /// runs afterwards.
    fn reset(&mut self, by: &str) -> Result<(), Error> {
        let ran = self.state() == MachineState::Running;
        let stopped = self
            .park()
            .and_then(|()| self.order_slots(Slot::pause))
            .and_then(|()| self.wait_quiet());
        if stopped.is_err() {
            // All is as it was.
            if ran {
                let resumed = self.order_slots(Slot::resume);
                self.order(Order::Run);
                return stopped.and(resumed);
            }
            return stopped;
        }
        self.order_slots(Slot::stop)?;
        self.shared.io.bus.reset();
        if let Some(trap) = &self.shared.io.trap {
            trap.reset();
        }
        self.shared.ram.clear()?;
        self.chips.restore(&self.vm)?;
        let entry = self.boot.load(&self.shared.ram, self.vcpus.len())?;
        *self
            .shared
            .entry
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = entry;
        // First, for the guest itself may be what is waited for.
        {
            let mut now = self.overview.now();
            now.state = MachineState::Running;
            now.resets += 1;
        }
        self.start_vcpus()?;
        self.events.emit(&MachineEvent::Reset { by: by.to_owned() });
        Ok(())
    }
}

fn send<T: Send + 'static>(
    sender: Sender<Notice>,
    wrap: impl Fn(T) -> Notice + Send + 'static,
) -> impl Fn(T) + Send + 'static {
    move |what| {
        // Fails only when the machine has ended.
        let _ = sender.send(wrap(what));
    }
}

fn end(code: u8, reason: impl Into<String>) -> End {
    End {
        code,
        reason: reason.into(),
    }
}

fn powered_off() -> End {
    end(exit::POWERED_OFF, "the guest powered off")
}

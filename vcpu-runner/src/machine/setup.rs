//! Sets up the machine: KVM, memory, devices, the platform and the vCPUs.

use std::sync::{Arc, Mutex};

use crossbeam_channel::{Sender, unbounded};
use outrigger_protocol::control::MachineEvent;

use super::{Machine, RunnerEvent};
use crate::Error;
use crate::boot::cpuid;
use crate::events::EventStream;
use crate::frontend::{ConnectedDevice, Watchdog};
use crate::options::RunnerOptions;
use crate::pci::PciFunction;
use crate::pci::bus::PciBus;
use crate::pci::intx::Intx;
use crate::pci::virtio::{DeviceInfo, VirtioPci};
use crate::status::SharedStatus;
use crate::trap::TrapChannel;
use crate::vcpu::io_dispatch::IoDispatch;
use crate::vcpu::{Vcpu, VcpuShared};
use crate::vm::irq::IrqRouting;
use crate::vm::irqchip::Irqchip;
use crate::vm::memory::GuestRam;
use crate::vm::{Vm, capabilities};

impl Machine {
    /// Sets up the machine. Its vCPUs are parked.
    ///
    /// # Errors
    /// The first thing that fails.
    pub fn new(options: &RunnerOptions) -> Result<Self, Error> {
        options.memory.check_host()?;
        let events = EventStream::open(options.events.as_deref())?;
        let boot = options.boot_source()?;
        let kvm = capabilities::open()?;
        let (sender, receiver) = unbounded();
        let watchdog = Watchdog::start()?;
        let cpus = usize::from(options.cpus);

        // Handshakes are round trips to other processes: they run at the same time, and
        // while KVM is set up.
        let (connected, vm, ram) = std::thread::scope(|scope| {
            let handshakes: Vec<_> = options
                .devices
                .iter()
                .map(|spec| scope.spawn(|| ConnectedDevice::connect(spec.clone(), &watchdog)))
                .collect();
            let ram = GuestRam::new(options.memory)?;
            let vm = Vm::new(kvm, &ram)?;
            let connected = handshakes
                .into_iter()
                .map(|thread| match thread.join() {
                    Ok(result) => result,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
                .collect::<Result<Vec<_>, _>>()?;
            Ok::<_, Error>((connected, Arc::new(vm), Arc::new(ram)))
        })?;
        let irqchip = Irqchip::capture(&vm)?;
        let irq_routing: Arc<dyn IrqRouting> = Arc::clone(&vm) as Arc<dyn IrqRouting>;
        let intx = Intx::start(Arc::clone(&irq_routing))?;

        let mut functions: Vec<Arc<dyn PciFunction>> = Vec::new();
        let mut devices = Vec::new();
        for (index, (device, info)) in connected.into_iter().enumerate() {
            let transport = transport(&device, info, index, &irq_routing, &intx)?;
            functions.push(Arc::clone(&transport) as _);
            let id = device.device().id().to_owned();
            events.emit(&MachineEvent::DeviceConnected { id });
            let sender = event_sender(sender.clone(), RunnerEvent::Device);
            devices.push(device.start(transport, Arc::clone(&ram), options.on_loss, sender)?);
        }
        let trap = match &options.platform {
            None => None,
            Some(endpoint) => {
                let trap = TrapChannel::new(cpus)?;
                let sender = event_sender(sender.clone(), RunnerEvent::Platform);
                trap.start(endpoint.clone(), Arc::clone(&irq_routing), sender)?;
                Some(trap)
            }
        };

        let entry = boot.load(&ram, cpus)?;
        let shared = Arc::new(VcpuShared {
            ram,
            entry: Mutex::new(entry),
            io: IoDispatch {
                bus: Arc::new(PciBus::new(functions)),
                trap,
            },
            show_registers: options.show_regs,
        });
        let cpuid = cpuid::supported(vm.kvm())?;
        let vcpus = (0..cpus)
            .map(|index| {
                let cpuid = cpuid::for_vcpu(&cpuid, index, cpus);
                let sender = event_sender(sender.clone(), RunnerEvent::Vcpu);
                Vcpu::new(&vm, index, &cpuid, Arc::clone(&shared), sender)?.start()
            })
            .collect::<Result<Vec<_>, _>>()?;
        let has_platform = options.platform.is_some();
        let status = SharedStatus::new(cpus, shared.ram.size(), devices, has_platform);
        Ok(Machine {
            vm,
            shared,
            boot,
            status: Arc::new(status),
            vcpus,
            irqchip,
            events,
            on_reset: options.on_reset,
            on_loss: options.on_loss,
            retry_reset_at: None,
            park_requests: 0,
            platform_deadline: None,
            control_socket: None,
            sender,
            receiver,
        })
    }
}

fn transport(
    device: &ConnectedDevice,
    info: DeviceInfo,
    index: usize,
    irq_routing: &Arc<dyn IrqRouting>,
    intx: &Arc<Intx>,
) -> Result<Arc<VirtioPci>, Error> {
    VirtioPci::new(
        info,
        index,
        Arc::clone(device.device()) as _,
        Arc::clone(irq_routing),
        Arc::clone(intx),
    )
}

/// A function that sends events of one kind to the machine's thread.
pub(super) fn event_sender<T: Send + 'static>(
    sender: Sender<RunnerEvent>,
    wrap: impl Fn(T) -> RunnerEvent + Send + 'static,
) -> impl Fn(T) + Send + 'static {
    move |event| {
        // Fails only when the machine has ended.
        let _ = sender.send(wrap(event));
    }
}

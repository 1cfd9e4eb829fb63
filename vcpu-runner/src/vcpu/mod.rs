//! One thread for each vCPU. [`exit`] translates what KVM_RUN returns into an action, as
//! a pure function; [`handle`] decides whether the thread runs the guest or is parked; this
//! file connects them. [`io_dispatch`] uses the trap channel, which in turn uses [`handle`]
//! alone: a vCPU that waits for the platform must still see its commands.

pub mod dump;
pub mod exit;
pub mod handle;
pub mod io_dispatch;
pub mod registers;

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;

use self::exit::VcpuExit;
use self::handle::{VcpuCommand, VcpuHandle};
use self::io_dispatch::IoDispatch;
use self::registers::PowerOnState;
use crate::Error;
use crate::boot::EntryPoint;
use crate::vm::Vm;
use crate::vm::memory::GuestRam;

/// What a vCPU reports to the machine. It is parked afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The guest asked for a reset (KVM_SYSTEM_EVENT_RESET).
    Reset,
    /// The guest asked for power-off (KVM_SYSTEM_EVENT_SHUTDOWN).
    PowerOff,
    /// A triple fault of this vCPU.
    TripleFault(usize),
    /// This vCPU cannot continue, and why.
    Fatal(String),
}

/// What all vCPUs share.
pub struct VcpuShared {
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// Where the first vCPU starts. Each reset sets it again.
    pub entry: Mutex<EntryPoint>,
    /// Handles accesses.
    pub io: IoDispatch,
    /// Print the registers before the guest runs.
    pub show_registers: bool,
}

/// A vCPU before its thread runs.
pub struct Vcpu {
    index: usize,
    fd: VcpuFd,
    power_on: PowerOnState,
    shared: Arc<VcpuShared>,
    handle: Arc<VcpuHandle>,
    events: Box<dyn Fn(VcpuEvent) + Send>,
}

impl Vcpu {
    /// Creates vCPU number `index`.
    ///
    /// # Errors
    /// When a KVM ioctl fails.
    pub fn new(
        vm: &Vm,
        index: usize,
        cpuid: &CpuId,
        shared: Arc<VcpuShared>,
        events: impl Fn(VcpuEvent) + Send + 'static,
    ) -> Result<Self, Error> {
        let mut fd = vm.create_vcpu(index)?;
        fd.set_cpuid2(cpuid)
            .map_err(Error::kvm(format!("vCPU {index}: KVM_SET_CPUID2")))?;
        let power_on = PowerOnState::capture(vm, &fd, index)?;
        let handle = Arc::new(VcpuHandle::new(&raw mut fd.get_kvm_run().immediate_exit));
        Ok(Vcpu {
            index,
            fd,
            power_on,
            shared,
            handle,
            events: Box::new(events),
        })
    }

    /// Starts the thread, parked.
    ///
    /// # Errors
    /// When the thread cannot be created.
    pub fn start(mut self) -> Result<Arc<VcpuHandle>, Error> {
        let handle = Arc::clone(&self.handle);
        std::thread::Builder::new()
            .name(format!("vcpu-{}", self.index))
            .spawn(move || {
                self.handle.attach_thread();
                if let Err(error) = self.run() {
                    (self.events)(VcpuEvent::Fatal(error.to_string()));
                }
            })
            .map_err(Error::io("starting the thread of a vCPU"))?;
        Ok(handle)
    }

    fn run(&mut self) -> Result<(), Error> {
        loop {
            if self.handle.prepare_entry() {
                self.complete_exit()?;
                match self.handle.next_command() {
                    VcpuCommand::Stop => return Ok(()),
                    VcpuCommand::Reset => self.reset()?,
                    VcpuCommand::Run | VcpuCommand::Park => {}
                }
                continue;
            }
            if let Some(event) = self.run_guest()? {
                (self.events)(event);
                self.handle.park_self();
            }
        }
    }

    /// Runs the guest until it exits, and handles the exit.
    fn run_guest(&mut self) -> Result<Option<VcpuEvent>, Error> {
        match self.fd.run() {
            Ok(_) => {}
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Ok(None),
            Err(e) => return Ok(Some(self.fatal(format!("KVM_RUN: {e}")))),
        }
        self.handle_exit()
    }

    fn handle_exit(&mut self) -> Result<Option<VcpuEvent>, Error> {
        let (index, handle, io) = (self.index, &*self.handle, &self.shared.io);
        Ok(match exit::decode(self.fd.get_kvm_run()) {
            VcpuExit::PortRead { port, size, data } => {
                for item in data.chunks_exact_mut(size) {
                    io.read_port(index, handle, port, item);
                }
                None
            }
            VcpuExit::PortWrite { port, size, data } => {
                for item in data.chunks_exact(size) {
                    io.write_port(index, handle, port, item);
                }
                None
            }
            VcpuExit::MemoryRead { address, data } => {
                io.read_memory(index, handle, address, data);
                None
            }
            VcpuExit::MemoryWrite { address, data } => {
                io.write_memory(index, handle, address, data);
                None
            }
            VcpuExit::Again => None,
            VcpuExit::Shutdown => {
                self.dump("triple fault");
                Some(VcpuEvent::TripleFault(index))
            }
            VcpuExit::PowerOff => Some(VcpuEvent::PowerOff),
            VcpuExit::Reset => Some(VcpuEvent::Reset),
            VcpuExit::Fatal(why) => Some(self.fatal(why)),
        })
    }

    /// Completes a port or memory read: KVM stores its result when it is entered again,
    /// which must happen before registers are read or replaced.
    fn complete_exit(&mut self) -> Result<(), Error> {
        loop {
            self.handle.set_immediate_exit(true);
            match self.fd.run() {
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Ok(()),
                Err(e) => {
                    (self.events)(self.fatal(format!("KVM_RUN: {e}")));
                    return Ok(());
                }
                // A string instruction continues with its next item.
                Ok(_) => {}
            }
            if let Some(event) = self.handle_exit()? {
                (self.events)(event);
                return Ok(());
            }
        }
    }

    fn reset(&mut self) -> Result<(), Error> {
        let entry = *self
            .shared
            .entry
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.power_on
            .apply(&self.fd, self.index, entry, &self.shared.ram)?;
        if self.shared.show_registers {
            self.dump("before the run");
        }
        Ok(())
    }

    /// Prints the registers of a vCPU that cannot continue.
    fn fatal(&self, why: String) -> VcpuEvent {
        self.dump("cannot go on");
        VcpuEvent::Fatal(format!("vCPU {}: {why}", self.index))
    }

    fn dump(&self, title: &str) {
        dump::print(&self.fd, self.index, &self.shared.ram, title);
    }
}

impl Drop for Vcpu {
    /// Before `fd` unmaps `kvm_run`, to which the handle has a pointer.
    fn drop(&mut self) {
        self.handle.detach_thread();
    }
}

//! A thread a vCPU. [`exit`] turns what KVM returns into an action, pure and
//! tested by itself; [`state`] is who may run and who stands still; this file
//! joins them.

pub mod dump;
pub mod exit;
pub mod io;
pub mod registers;
pub mod state;

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;

use self::exit::Exit;
use self::io::Io;
use self::registers::Initial;
use self::state::{Control, Order};
use crate::Error;
use crate::boot::Entry;
use crate::vm::Vm;
use crate::vm::memory::Ram;

/// What a vCPU tells the machine; it then stands still until it is reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The guest asked for a reset by way of the CPU (a KVM system event).
    Reset,
    /// The guest asked for power-off by way of the CPU.
    PowerOff,
    /// A triple fault of this vCPU: no exception handler was left to call.
    TripleFault(usize),
    /// KVM cannot go on.
    Fatal(String),
}

/// What all vCPUs share.
pub struct Shared {
    /// Guest RAM.
    pub ram: Arc<Ram>,
    /// Where the first vCPU starts; changes with a reset.
    pub entry: Mutex<Entry>,
    /// Where accesses go.
    pub io: Io,
    /// Print the registers before the run.
    pub show_registers: bool,
}

/// A vCPU before its thread runs.
pub struct Vcpu {
    index: usize,
    fd: VcpuFd,
    initial: Initial,
    shared: Arc<Shared>,
    control: Arc<Control>,
    report: Box<dyn Fn(Report) + Send>,
}

impl Vcpu {
    /// Creates vCPU `index`.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(
        vm: &Vm,
        index: usize,
        cpuid: &CpuId,
        shared: Arc<Shared>,
        report: impl Fn(Report) + Send + 'static,
    ) -> Result<Self, Error> {
        let mut fd = vm.create_vcpu(index)?;
        fd.set_cpuid2(cpuid)
            .map_err(Error::kvm(format!("vCPU {index}: KVM_SET_CPUID2")))?;
        let initial = Initial::capture(vm, &fd, index)?;
        let control = Arc::new(Control::new(&raw mut fd.get_kvm_run().immediate_exit));
        Ok(Vcpu {
            index,
            fd,
            initial,
            shared,
            control,
            report: Box::new(report),
        })
    }

    /// Starts the thread; the vCPU stands still until it is told to run.
    ///
    /// # Errors
    /// When there are no threads left.
    pub fn start(mut self) -> Result<Arc<Control>, Error> {
        let control = Arc::clone(&self.control);
        std::thread::Builder::new()
            .name(format!("vcpu-{}", self.index))
            .spawn(move || {
                self.control.enter_thread();
                if let Err(error) = self.run() {
                    (self.report)(Report::Fatal(error.to_string()));
                }
                self.control.leave_thread();
            })
            .map_err(Error::io("starting a vCPU's thread"))?;
        Ok(control)
    }

    fn run(&mut self) -> Result<(), Error> {
        loop {
            if self.control.wants_attention() {
                self.complete_exit()?;
                match self.control.park() {
                    Order::Stop => return Ok(()),
                    Order::Reset => self.reset()?,
                    Order::Run | Order::Park => {}
                }
                continue;
            }
            if let Some(report) = self.step()? {
                (self.report)(report);
                self.control.halt();
            }
        }
    }

    /// Runs the guest until something happens, and deals with it.
    fn step(&mut self) -> Result<Option<Report>, Error> {
        match self.fd.run() {
            Ok(_) => {}
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Ok(None),
            Err(e) => return Ok(Some(self.fatal(format!("KVM_RUN: {e}")))),
        }
        self.deal_with_exit()
    }

    fn deal_with_exit(&mut self) -> Result<Option<Report>, Error> {
        let (index, control, io) = (self.index, &*self.control, &self.shared.io);
        Ok(match exit::decode(self.fd.get_kvm_run()) {
            Exit::PortRead { port, size, data } => {
                for item in data.chunks_exact_mut(size) {
                    io.read_port(index, control, port, item);
                }
                None
            }
            Exit::PortWrite { port, size, data } => {
                for item in data.chunks_exact(size) {
                    io.write_port(index, control, port, item);
                }
                None
            }
            Exit::MemoryRead { address, data } => {
                io.read_memory(index, control, address, data);
                None
            }
            Exit::MemoryWrite { address, data } => {
                io.write_memory(index, control, address, data);
                None
            }
            Exit::Again => None,
            Exit::Shutdown => {
                self.dump("triple fault");
                Some(Report::TripleFault(index))
            }
            Exit::PowerOff => Some(Report::PowerOff),
            Exit::Reset => Some(Report::Reset),
            Exit::Fatal(why) => Some(self.fatal(why)),
        })
    }

    /// KVM finishes a port or memory read only when it is entered again. Before
    /// registers are looked at or replaced, it must have done so.
    fn complete_exit(&mut self) -> Result<(), Error> {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            match self.fd.run() {
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Ok(()),
                Err(e) => {
                    (self.report)(self.fatal(format!("KVM_RUN: {e}")));
                    return Ok(());
                }
                // A string instruction goes on with its next item.
                Ok(_) => {}
            }
            if let Some(report) = self.deal_with_exit()? {
                (self.report)(report);
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
        self.initial
            .apply(&self.fd, self.index, entry, &self.shared.ram)?;
        if self.shared.show_registers {
            self.dump("before the run");
        }
        Ok(())
    }

    /// This vCPU cannot go on.
    fn fatal(&self, why: String) -> Report {
        self.dump("cannot go on");
        Report::Fatal(format!("vCPU {}: {why}", self.index))
    }

    fn dump(&self, title: &str) {
        dump::print(&self.fd, self.index, &self.shared.ram, title);
    }
}

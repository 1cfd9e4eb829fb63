//! The virtual machine as KVM has it.

pub mod chips;
pub mod host;
pub mod irq;
pub mod memory;

use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::Error;
use crate::layout;
use crate::vm::irq::Routes;
use crate::vm::memory::Ram;

/// A VM with its RAM and interrupt controllers; no vCPUs yet.
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    routes: Mutex<Routes>,
}

impl Vm {
    /// Creates the VM, gives it `ram` and KVM's own interrupt controllers.
    ///
    /// Memory slots come before the interrupt controllers: on some hosts adding
    /// a slot afterwards takes ten times as long.
    ///
    /// # Errors
    /// Whatever KVM refuses.
    pub fn new(kvm: Kvm, ram: &Ram) -> Result<Self, Error> {
        let fd = loop {
            match kvm.create_vm() {
                Err(e) if e.errno() == libc::EINTR => {}
                result => break result.map_err(Error::kvm("KVM_CREATE_VM"))?,
            }
        };
        for (slot, region) in ram.memory().iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the mapping belongs to `ram`, which the machine keeps for
            // as long as the VM exists.
            unsafe { fd.set_user_memory_region(slot) }
                .map_err(Error::kvm("KVM_SET_USER_MEMORY_REGION"))?;
        }
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(Error::kvm("KVM_SET_TSS_ADDR"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(Error::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.create_irq_chip()
            .map_err(Error::kvm("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(Error::kvm("KVM_CREATE_PIT2"))?;
        Ok(Vm {
            kvm,
            fd: Arc::new(fd),
            routes: Mutex::new(Routes::default()),
        })
    }

    /// Creates vCPU number `index`.
    ///
    /// # Errors
    /// KVM's.
    pub fn create_vcpu(&self, index: usize) -> Result<VcpuFd, Error> {
        self.fd
            .create_vcpu(index as u64)
            .map_err(Error::kvm(format!("vCPU {index}: KVM_CREATE_VCPU")))
    }

    /// The system-wide KVM handle.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The VM's own handle.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }
}

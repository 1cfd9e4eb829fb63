//! The virtual machine in KVM: its memory slots, interrupt controllers and vCPUs.

pub mod capabilities;
pub mod irq;
pub mod irqchip;
pub mod memory;

use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::Error;
use crate::layout;
use crate::vm::irq::MsiRoutes;
use crate::vm::memory::GuestRam;

/// A VM with its RAM and interrupt controllers.
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    routes: Mutex<MsiRoutes>,
}

impl Vm {
    /// Creates the VM with `ram` and with the interrupt controllers and the timer of KVM.
    ///
    /// The memory slots come first: on some hosts adding a slot takes ten times as long once
    /// there are interrupt controllers.
    ///
    /// # Errors
    /// When a KVM ioctl fails.
    pub fn new(kvm: Kvm, ram: &GuestRam) -> Result<Self, Error> {
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
            // SAFETY: KVM accesses the mapping only while a vCPU runs, and the threads of
            // vCPUs hold `ram` (see `VcpuShared`).
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
            routes: Mutex::new(MsiRoutes::default()),
        })
    }

    /// Creates vCPU number `index`.
    ///
    /// # Errors
    /// When KVM_CREATE_VCPU fails.
    pub fn create_vcpu(&self, index: usize) -> Result<VcpuFd, Error> {
        self.fd
            .create_vcpu(index as u64)
            .map_err(Error::kvm(format!("vCPU {index}: KVM_CREATE_VCPU")))
    }

    /// The descriptor of /dev/kvm.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The descriptor of the VM.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }
}

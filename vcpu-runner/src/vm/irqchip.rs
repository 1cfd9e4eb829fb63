//! The state of KVM's interrupt controllers (PICs and I/O APIC) and timer at power-on,
//! which a reset restores.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};

use super::Vm;
use crate::Error;

/// The captured state.
pub struct Irqchip {
    controllers: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
}

impl Irqchip {
    /// Reads the state of a VM that has not run.
    ///
    /// # Errors
    /// When a KVM ioctl fails.
    pub fn capture(vm: &Vm) -> Result<Self, Error> {
        let controllers = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ]
        .into_iter()
        .map(|chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.fd()
                .get_irqchip(&mut chip)
                .map_err(Error::kvm("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        })
        .collect::<Result<_, Error>>()?;
        let pit = vm.fd().get_pit2().map_err(Error::kvm("KVM_GET_PIT2"))?;
        Ok(Irqchip { controllers, pit })
    }

    /// Writes the state back.
    ///
    /// # Errors
    /// When a KVM ioctl fails.
    pub fn restore(&self, vm: &Vm) -> Result<(), Error> {
        for chip in &self.controllers {
            vm.fd()
                .set_irqchip(chip)
                .map_err(Error::kvm("KVM_SET_IRQCHIP"))?;
        }
        vm.fd()
            .set_pit2(&self.pit)
            .map_err(Error::kvm("KVM_SET_PIT2"))
    }
}

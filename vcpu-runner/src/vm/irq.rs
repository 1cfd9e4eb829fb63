//! Interrupt routes, irqfds and ioeventfds: which eventfd raises which interrupt, and which
//! guest address signals which eventfd.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use crate::Error;
use crate::layout::IOAPIC_PINS;
use crate::vm::Vm;

/// Global system interrupt: the number of an interrupt in KVM's routing table.
pub type Gsi = u32;

/// Size of the routing table (KVM_MAX_IRQ_ROUTES).
const MAX_ROUTES: u32 = 4096;

/// A message-signalled interrupt: the data that a device writes, and the address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// What PCI devices and the platform need of KVM. Tests have another implementation.
pub trait IrqRouting: Send + Sync {
    /// Adds a route for `message`; returns its GSI.
    ///
    /// # Errors
    /// When the routing table is full, or KVM_SET_GSI_ROUTING fails.
    fn add_route(&self, message: MsiMessage) -> Result<Gsi, Error>;

    /// Changes the message of `gsi`.
    ///
    /// # Errors
    /// When KVM_SET_GSI_ROUTING fails.
    fn set_route(&self, gsi: Gsi, message: MsiMessage) -> Result<(), Error>;

    /// Makes each event of `fd`, including a pending one, raise `gsi`.
    ///
    /// # Errors
    /// When KVM_IRQFD fails.
    fn attach_irqfd(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Error>;

    /// Undoes [`IrqRouting::attach_irqfd`].
    ///
    /// # Errors
    /// When KVM_IRQFD fails.
    fn detach_irqfd(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Error>;

    /// Sets the level of an I/O APIC input.
    ///
    /// # Errors
    /// When KVM_IRQ_LINE fails.
    fn set_line(&self, gsi: Gsi, level: bool) -> Result<(), Error>;

    /// Makes each write of the guest to `address`, of any size, signal `fd`.
    ///
    /// # Errors
    /// When KVM_IOEVENTFD fails.
    fn add_ioeventfd(&self, fd: &EventFd, address: u64) -> Result<(), Error>;

    /// Undoes [`IrqRouting::add_ioeventfd`].
    ///
    /// # Errors
    /// When KVM_IOEVENTFD fails.
    fn remove_ioeventfd(&self, fd: &EventFd, address: u64) -> Result<(), Error>;
}

/// The routes of message-signalled interrupts. Those of the I/O APIC and PIC pins are
/// fixed.
#[derive(Clone, Default)]
pub struct MsiRoutes(BTreeMap<Gsi, MsiMessage>);

impl MsiRoutes {
    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let mut entries = Vec::new();
        for pin in 0..IOAPIC_PINS {
            match pin {
                0..8 => entries.push(pin_route(pin, KVM_IRQCHIP_PIC_MASTER, pin)),
                8..16 => entries.push(pin_route(pin, KVM_IRQCHIP_PIC_SLAVE, pin - 8)),
                _ => {}
            }
            entries.push(pin_route(pin, KVM_IRQCHIP_IOAPIC, pin));
        }
        entries.extend(self.0.iter().map(|(&gsi, message)| {
            let mut entry = kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi.address_lo = message.address as u32;
            entry.u.msi.address_hi = (message.address >> 32) as u32;
            entry.u.msi.data = message.data;
            entry
        }));
        entries
    }
}

fn pin_route(gsi: Gsi, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

impl Vm {
    fn update_routes(&self, update: impl FnOnce(&mut MsiRoutes)) -> Result<(), Error> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut updated = routes.clone();
        update(&mut updated);
        let table = KvmIrqRouting::from_entries(&updated.entries())
            .map_err(|e| Error::BootSetup(format!("interrupt routes: {e:?}")))?;
        self.fd()
            .set_gsi_routing(&table)
            .map_err(Error::kvm("KVM_SET_GSI_ROUTING"))?;
        *routes = updated;
        Ok(())
    }
}

impl IrqRouting for Vm {
    fn add_route(&self, message: MsiMessage) -> Result<Gsi, Error> {
        let mut gsi = IOAPIC_PINS;
        let mut full = false;
        self.update_routes(|routes| {
            if let Some((&last, _)) = routes.0.last_key_value() {
                gsi = last + 1;
            }
            // The fixed routes take 16 entries more than GSIs: GSIs 0 to 15 have two each.
            full = gsi + 16 >= MAX_ROUTES;
            if !full {
                routes.0.insert(gsi, message);
            }
        })?;
        if full {
            return Err(Error::BootSetup("all interrupt routes are in use".into()));
        }
        Ok(gsi)
    }

    fn set_route(&self, gsi: Gsi, message: MsiMessage) -> Result<(), Error> {
        self.update_routes(|routes| {
            routes.0.insert(gsi, message);
        })
    }

    fn attach_irqfd(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Error> {
        self.fd()
            .register_irqfd(fd, gsi)
            .map_err(Error::kvm(format!("KVM_IRQFD for GSI {gsi}")))
    }

    fn detach_irqfd(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Error> {
        self.fd()
            .unregister_irqfd(fd, gsi)
            .map_err(Error::kvm(format!("KVM_IRQFD for GSI {gsi}")))
    }

    fn set_line(&self, gsi: Gsi, level: bool) -> Result<(), Error> {
        self.fd()
            .set_irq_line(gsi, level)
            .map_err(Error::kvm(format!("KVM_IRQ_LINE for GSI {gsi}")))
    }

    fn add_ioeventfd(&self, fd: &EventFd, address: u64) -> Result<(), Error> {
        self.fd()
            .register_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(Error::kvm(format!("KVM_IOEVENTFD at {address:#x}")))
    }

    fn remove_ioeventfd(&self, fd: &EventFd, address: u64) -> Result<(), Error> {
        self.fd()
            .unregister_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(Error::kvm(format!("KVM_IOEVENTFD at {address:#x}")))
    }
}

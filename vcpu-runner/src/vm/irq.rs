//! Interrupts and doorbells: who may raise which, and by which descriptor.

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

/// Number of an interrupt as KVM routes it.
pub type Gsi = u32;

/// Most routes that KVM keeps (KVM_MAX_IRQ_ROUTES).
const MAX_ROUTES: u32 = 4096;

/// A message-signalled interrupt: what a device would write, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Address, low and high halves together.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// What the PCI side needs of a hypervisor; tests bring one of their own.
pub trait Interrupts: Send + Sync {
    /// A new GSI that carries `message`.
    ///
    /// # Errors
    /// When there are no more.
    fn add_route(&self, message: Message) -> Result<Gsi, Error>;

    /// Changes what `gsi` carries.
    ///
    /// # Errors
    /// KVM's.
    fn set_route(&self, gsi: Gsi, message: Message) -> Result<(), Error>;

    /// From now on each write to `fd`, and one that is pending, raises `gsi`.
    ///
    /// # Errors
    /// KVM's.
    fn attach(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Error>;

    /// Ends [`Interrupts::attach`].
    ///
    /// # Errors
    /// KVM's.
    fn detach(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Error>;

    /// Sets the level of an I/O APIC input.
    ///
    /// # Errors
    /// KVM's.
    fn set_line(&self, gsi: Gsi, level: bool) -> Result<(), Error>;

    /// From now on a guest's write to `address`, of any size, rings `fd`.
    ///
    /// # Errors
    /// KVM's.
    fn add_doorbell(&self, fd: &EventFd, address: u64) -> Result<(), Error>;

    /// Ends [`Interrupts::add_doorbell`].
    ///
    /// # Errors
    /// KVM's.
    fn remove_doorbell(&self, fd: &EventFd, address: u64) -> Result<(), Error>;
}

/// The routing table beyond the fixed lines.
#[derive(Clone, Default)]
pub struct Routes(BTreeMap<Gsi, Message>);

impl Routes {
    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let mut entries = Vec::new();
        for pin in 0..IOAPIC_PINS {
            match pin {
                0..8 => entries.push(line(pin, KVM_IRQCHIP_PIC_MASTER, pin)),
                8..16 => entries.push(line(pin, KVM_IRQCHIP_PIC_SLAVE, pin - 8)),
                _ => {}
            }
            entries.push(line(pin, KVM_IRQCHIP_IOAPIC, pin));
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

fn line(gsi: Gsi, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
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
    fn change_routes(&self, change: impl FnOnce(&mut Routes)) -> Result<(), Error> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = routes.clone();
        change(&mut changed);
        let table = KvmIrqRouting::from_entries(&changed.entries())
            .map_err(|e| Error::BootSetup(format!("interrupt routes: {e:?}")))?;
        self.fd()
            .set_gsi_routing(&table)
            .map_err(Error::kvm("KVM_SET_GSI_ROUTING"))?;
        *routes = changed;
        Ok(())
    }
}

impl Interrupts for Vm {
    fn add_route(&self, message: Message) -> Result<Gsi, Error> {
        let mut gsi = IOAPIC_PINS;
        let mut full = false;
        self.change_routes(|routes| {
            if let Some((&last, _)) = routes.0.last_key_value() {
                gsi = last + 1;
            }
            // The fixed lines take 16 entries more than their GSIs.
            full = gsi + 16 >= MAX_ROUTES;
            if !full {
                routes.0.insert(gsi, message);
            }
        })?;
        if full {
            return Err(Error::BootSetup("no interrupt routes left".into()));
        }
        Ok(gsi)
    }

    fn set_route(&self, gsi: Gsi, message: Message) -> Result<(), Error> {
        self.change_routes(|routes| {
            routes.0.insert(gsi, message);
        })
    }

    fn attach(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Error> {
        self.fd()
            .register_irqfd(fd, gsi)
            .map_err(Error::kvm(format!("KVM_IRQFD for GSI {gsi}")))
    }

    fn detach(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Error> {
        self.fd()
            .unregister_irqfd(fd, gsi)
            .map_err(Error::kvm(format!("KVM_IRQFD for GSI {gsi}")))
    }

    fn set_line(&self, gsi: Gsi, level: bool) -> Result<(), Error> {
        self.fd()
            .set_irq_line(gsi, level)
            .map_err(Error::kvm(format!("KVM_IRQ_LINE for GSI {gsi}")))
    }

    fn add_doorbell(&self, fd: &EventFd, address: u64) -> Result<(), Error> {
        self.fd()
            .register_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(Error::kvm(format!("KVM_IOEVENTFD at {address:#x}")))
    }

    fn remove_doorbell(&self, fd: &EventFd, address: u64) -> Result<(), Error> {
        self.fd()
            .unregister_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(Error::kvm(format!("KVM_IOEVENTFD at {address:#x}")))
    }
}

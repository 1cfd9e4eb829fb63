//! The doorbells and interrupts of one device: what each eventfd is connected to at the
//! moment. The pending bit of a vector is "its eventfd is readable": masking a vector
//! removes the irqfd, and events stay in the eventfd; unmasking assigns the irqfd again,
//! and KVM delivers what is pending.

use std::sync::{Arc, Weak};

use vmm_sys_util::eventfd::EventFd;

use super::bar::{MAX_QUEUES, NOTIFY_MULTIPLIER};
use super::common_config::{CommonConfig, NO_VECTOR};
use crate::eventfd;
use crate::pci::intx::{Intx, IntxHandler};
use crate::pci::msix::MsixTable;
use crate::vm::irq::{Gsi, IrqRouting, MsiMessage};

/// Bits of the ISR status (section 4.1.4.5): a queue interrupt,
const ISR_QUEUE: u8 = 1;
/// and a device configuration interrupt.
const ISR_CONFIG: u8 = 2;

/// Number of the source for configuration changes. Queue `q` is source `q + 1`.
const CONFIG_SOURCE: usize = 0;

/// What consumes the events of a source.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Attachment {
    /// Nothing: events stay in the eventfd.
    None,
    /// KVM raises this GSI.
    Irqfd(Gsi),
    /// The INTx thread.
    Intx,
}

struct InterruptSource {
    fd: EventFd,
    attachment: Attachment,
}

/// See the module's documentation.
pub(super) struct DeviceInterrupts {
    /// The device's name.
    id: String,
    irq_routing: Arc<dyn IrqRouting>,
    intx: Arc<Intx>,
    intx_handler: Weak<dyn IntxHandler>,
    /// Number of the device and its PCI slot, for the INTx pin.
    device_and_slot: (usize, u8),
    sources: Vec<InterruptSource>,
    doorbells: Vec<EventFd>,
    /// Address of the first doorbell, while the BAR is enabled.
    doorbells_at: Option<u64>,
    /// How many doorbells KVM signals.
    ioeventfds: usize,
    /// For each vector, its GSI and the message of that, once it was needed.
    routes: Vec<Option<(Gsi, MsiMessage)>>,
    isr: u8,
}

impl DeviceInterrupts {
    /// `sources` are the eventfd of configuration changes and those of the queues.
    pub fn new(
        id: String,
        irq_routing: Arc<dyn IrqRouting>,
        intx: Arc<Intx>,
        intx_handler: Weak<dyn IntxHandler>,
        device_and_slot: (usize, u8),
        sources: Vec<EventFd>,
        doorbells: Vec<EventFd>,
    ) -> Self {
        DeviceInterrupts {
            id,
            irq_routing,
            intx,
            intx_handler,
            device_and_slot,
            // A vector for each source.
            routes: vec![None; sources.len()],
            sources: sources
                .into_iter()
                .map(|fd| InterruptSource {
                    fd,
                    attachment: Attachment::None,
                })
                .collect(),
            doorbells,
            doorbells_at: None,
            ioeventfds: 0,
            isr: 0,
        }
    }

    /// Moves the doorbells to `address`, or removes them.
    pub fn place_doorbells(&mut self, address: Option<u64>) {
        if self.doorbells_at == address {
            return;
        }
        let at = |base: u64, queue: usize| base + queue as u64 * u64::from(NOTIFY_MULTIPLIER);
        if let Some(old) = self.doorbells_at.take() {
            for (queue, fd) in self.doorbells[..self.ioeventfds].iter().enumerate() {
                if let Err(error) = self.irq_routing.remove_ioeventfd(fd, at(old, queue)) {
                    tracing::error!(device = self.id, queue, %error, "cannot remove a doorbell");
                }
            }
        }
        self.ioeventfds = 0;
        if let Some(new) = address {
            for (queue, fd) in self.doorbells.iter().enumerate() {
                if let Err(error) = self.irq_routing.add_ioeventfd(fd, at(new, queue)) {
                    tracing::warn!(
                        device = self.id,
                        queue,
                        %error,
                        "the doorbells of this queue and the following ones are slow: each write \
                         goes through the runner"
                    );
                    break;
                }
                self.ioeventfds += 1;
            }
        }
        self.doorbells_at = address;
    }

    /// Attaches every source to what the registers ask for; returns whether an INTx
    /// interrupt is pending.
    pub fn sync(
        &mut self,
        msix: &MsixTable,
        common_config: &CommonConfig,
        intx_enabled: bool,
    ) -> bool {
        for source in 0..self.sources.len() {
            let wanted = if msix.is_enabled() {
                let vector = vector(common_config, source);
                match msix.message(vector) {
                    Some(message) => self
                        .gsi(vector, message)
                        .map_or(Attachment::None, Attachment::Irqfd),
                    None => Attachment::None,
                }
            } else if common_config.is_activated() {
                Attachment::Intx
            } else {
                Attachment::None
            };
            self.attach(source, wanted);
        }
        let pending = self.isr != 0 && !msix.is_enabled();
        let (device, slot) = self.device_and_slot;
        self.intx.set(device, slot, pending && intx_enabled);
        pending
    }

    /// The GSI that carries `message`, the one of `vector`.
    fn gsi(&mut self, vector: u16, message: MsiMessage) -> Option<Gsi> {
        let route = self.routes.get_mut(usize::from(vector))?;
        let result = match *route {
            Some((gsi, old)) if old == message => return Some(gsi),
            Some((gsi, _)) => self.irq_routing.set_route(gsi, message).map(|()| gsi),
            None => self.irq_routing.add_route(message),
        };
        match result {
            Ok(gsi) => {
                *route = Some((gsi, message));
                Some(gsi)
            }
            Err(error) => {
                tracing::error!(device = self.id, vector, %error, "cannot route an interrupt");
                None
            }
        }
    }

    fn attach(&mut self, index: usize, wanted: Attachment) {
        let source = &mut self.sources[index];
        if source.attachment == wanted {
            return;
        }
        let detached = match source.attachment {
            Attachment::None => Ok(()),
            Attachment::Irqfd(gsi) => self.irq_routing.detach_irqfd(&source.fd, gsi),
            // If this fails, the eventfd is not watched, as it should be.
            Attachment::Intx => self.intx.unwatch(&source.fd).or(Ok(())),
        };
        source.attachment = Attachment::None;
        let attached = detached.and_then(|()| match wanted {
            Attachment::None => Ok(()),
            Attachment::Irqfd(gsi) => self.irq_routing.attach_irqfd(&source.fd, gsi),
            Attachment::Intx => {
                let handler = self.intx_handler.clone();
                self.intx.watch(&source.fd, handler, index)
            }
        });
        match attached {
            Ok(()) => source.attachment = wanted,
            Err(error) => {
                let device = &self.id;
                let queue = index.checked_sub(1);
                tracing::error!(device, queue, %error, "cannot connect an interrupt");
            }
        }
    }

    /// Sends a configuration change notification.
    pub fn notify_config_change(&self) {
        eventfd::signal(&self.sources[CONFIG_SOURCE].fd);
    }

    /// Sets the ISR bit of `source`, for which the INTx thread saw an event. False if the
    /// source is not attached to INTx any more: then the event stays in the eventfd.
    pub fn set_isr(&mut self, source: usize) -> bool {
        let Some(InterruptSource { fd, attachment }) = self.sources.get(source) else {
            return false;
        };
        if *attachment != Attachment::Intx || !eventfd::take(fd) {
            return false;
        }
        self.isr |= if source == CONFIG_SOURCE {
            ISR_CONFIG
        } else {
            ISR_QUEUE
        };
        true
    }

    /// Reads and clears the ISR status.
    pub fn take_isr(&mut self) -> u8 {
        std::mem::take(&mut self.isr)
    }

    /// The pending bit array of MSI-X.
    pub fn pending_bits(&self, common_config: &CommonConfig) -> Vec<u8> {
        let mut bits = vec![0; self.routes.len().next_multiple_of(64) / 8];
        for (index, source) in self.sources.iter().enumerate() {
            let vector = usize::from(vector(common_config, index));
            if source.attachment == Attachment::None
                && vector < self.routes.len()
                && eventfd::is_pending(&source.fd)
            {
                bits[vector / 8] |= 1 << (vector % 8);
            }
        }
        bits
    }

    /// Drops the pending interrupts of a driver that has reset the device.
    pub fn clear_pending(&mut self) {
        self.isr = 0;
        for source in &self.sources {
            eventfd::take(&source.fd);
        }
    }
}

/// The vector that the driver assigned to `source`.
fn vector(common_config: &CommonConfig, source: usize) -> u16 {
    match source.checked_sub(1) {
        None => common_config.config_vector(),
        Some(queue) => common_config.queue_vector(queue),
    }
}

const _: () = assert!(NO_VECTOR as usize > MAX_QUEUES);

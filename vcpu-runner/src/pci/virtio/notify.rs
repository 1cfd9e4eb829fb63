//! A device's doorbells and interrupts: which eventfd is tied to what at the
//! moment. A vector's pending bit is "its eventfd is readable": masking takes the
//! irqfd away and events gather; unmasking attaches it again and KVM delivers.

use std::sync::{Arc, Weak};

use vmm_sys_util::eventfd::EventFd;

use super::common::{Common, NO_VECTOR};
use super::{NOTIFY_MULTIPLIER, VirtioPci};
use crate::eventfd;
use crate::pci::intx::Intx;
use crate::pci::msix::Table;
use crate::vm::irq::{Gsi, Interrupts, Message};

/// Bits of the ISR status (section 4.1.4.5): a queue notifies,
const ISR_QUEUE: u8 = 1;
/// the configuration changed.
const ISR_CONFIG: u8 = 2;
/// Source number of the configuration; queue `q` is source `q + 1`.
const CONFIG: usize = 0;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Attachment {
    /// Events gather in the eventfd.
    Nothing,
    /// KVM raises this GSI.
    Irqfd(Gsi),
    /// The INTx thread watches.
    Pin,
}

struct Source {
    fd: EventFd,
    attached: Attachment,
}

/// All of a device's notifications.
pub(super) struct Notifiers {
    interrupts: Arc<dyn Interrupts>,
    intx: Arc<Intx>,
    owner: Weak<VirtioPci>,
    /// Device number and slot, for the pin.
    place: (usize, u8),
    sources: Vec<Source>,
    doorbells: Vec<EventFd>,
    /// Which doorbells KVM has, and where the first of them is.
    doorbells_at: Option<u64>,
    doorbells_set: usize,
    /// For each vector, its GSI and what that carries, once it was needed.
    routes: Vec<Option<(Gsi, Message)>>,
    isr: u8,
}

impl Notifiers {
    /// `sources` begins with the configuration's eventfd, then the queues'.
    pub fn new(
        interrupts: Arc<dyn Interrupts>,
        intx: Arc<Intx>,
        owner: Weak<VirtioPci>,
        place: (usize, u8),
        sources: Vec<EventFd>,
        doorbells: Vec<EventFd>,
        vectors: usize,
    ) -> Self {
        Notifiers {
            interrupts,
            intx,
            owner,
            place,
            sources: sources
                .into_iter()
                .map(|fd| Source {
                    fd,
                    attached: Attachment::Nothing,
                })
                .collect(),
            doorbells,
            doorbells_at: None,
            doorbells_set: 0,
            routes: vec![None; vectors],
            isr: 0,
        }
    }

    /// Moves the doorbells to `address`, or takes them away.
    pub fn place_doorbells(&mut self, address: Option<u64>) {
        if self.doorbells_at == address {
            return;
        }
        let at = |base: u64, queue: usize| base + queue as u64 * u64::from(NOTIFY_MULTIPLIER);
        if let Some(old) = self.doorbells_at.take() {
            for (queue, fd) in self.doorbells[..self.doorbells_set].iter().enumerate() {
                if let Err(error) = self.interrupts.remove_doorbell(fd, at(old, queue)) {
                    tracing::error!("{error}");
                }
            }
        }
        self.doorbells_set = 0;
        if let Some(new) = address {
            for (queue, fd) in self.doorbells.iter().enumerate() {
                // The others still work, through the slow way of a trap.
                if let Err(error) = self.interrupts.add_doorbell(fd, at(new, queue)) {
                    tracing::warn!("queue {queue} and up ring through the runner: {error}");
                    break;
                }
                self.doorbells_set += 1;
            }
        }
        self.doorbells_at = address;
    }

    /// Ties every source to where it belongs; returns whether an INTx interrupt
    /// is pending.
    pub fn sync(&mut self, msix: &Table, common: &Common, intx_enabled: bool) -> bool {
        for index in 0..self.sources.len() {
            let wanted = if msix.is_enabled() {
                let vector = vector(common, index);
                match msix.message(vector) {
                    Some(message) => self
                        .route(vector, message)
                        .map_or(Attachment::Nothing, Attachment::Irqfd),
                    None => Attachment::Nothing,
                }
            } else if common.is_live() {
                Attachment::Pin
            } else {
                Attachment::Nothing
            };
            self.attach(index, wanted);
        }
        let pending = self.isr != 0 && !msix.is_enabled();
        let (device, slot) = self.place;
        self.intx.set(device, slot, pending && intx_enabled);
        pending
    }

    fn route(&mut self, vector: u16, message: Message) -> Option<Gsi> {
        let place = self.routes.get_mut(usize::from(vector))?;
        let result = match *place {
            Some((gsi, old)) if old == message => return Some(gsi),
            Some((gsi, _)) => self.interrupts.set_route(gsi, message).map(|()| gsi),
            None => self.interrupts.add_route(message),
        };
        match result {
            Ok(gsi) => {
                *place = Some((gsi, message));
                Some(gsi)
            }
            Err(error) => {
                tracing::error!("vector {vector}: {error}");
                None
            }
        }
    }

    fn attach(&mut self, index: usize, wanted: Attachment) {
        let source = &mut self.sources[index];
        if source.attached == wanted {
            return;
        }
        let detached = match source.attached {
            Attachment::Nothing => Ok(()),
            Attachment::Irqfd(gsi) => self.interrupts.detach(&source.fd, gsi),
            Attachment::Pin => {
                self.intx.unwatch(&source.fd);
                Ok(())
            }
        };
        source.attached = Attachment::Nothing;
        let attached = detached.and_then(|()| match wanted {
            Attachment::Nothing => Ok(()),
            Attachment::Irqfd(gsi) => self.interrupts.attach(&source.fd, gsi),
            Attachment::Pin => self.intx.watch(&source.fd, self.owner.clone(), index),
        });
        match attached {
            Ok(()) => source.attached = wanted,
            Err(error) => tracing::error!("interrupt source {index}: {error}"),
        }
    }

    /// Sends a configuration change notification.
    pub fn config_changed(&self) {
        eventfd::signal(&self.sources[CONFIG].fd);
    }

    /// The INTx thread saw `source` notify. False when the pin is not in use any
    /// more: then the event stays where it is.
    pub fn note(&mut self, source: usize) -> bool {
        let Some(Source { fd, attached }) = self.sources.get(source) else {
            return false;
        };
        if *attached != Attachment::Pin || !eventfd::take(fd) {
            return false;
        }
        self.isr |= if source == CONFIG {
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

    /// The pending bit array.
    pub fn pending(&self, common: &Common) -> Vec<u8> {
        let mut bits = vec![0; self.routes.len().next_multiple_of(64) / 8];
        for (index, source) in self.sources.iter().enumerate() {
            let vector = usize::from(vector(common, index));
            if source.attached == Attachment::Nothing
                && vector < self.routes.len()
                && eventfd::is_pending(&source.fd)
            {
                bits[vector / 8] |= 1 << (vector % 8);
            }
        }
        bits
    }

    /// Drops what a driver that is gone would have been told.
    pub fn forget(&mut self) {
        self.isr = 0;
        for source in &self.sources {
            eventfd::take(&source.fd);
        }
    }
}

fn vector(common: &Common, source: usize) -> u16 {
    match source.checked_sub(1) {
        None => common.config_vector(),
        Some(queue) => common.queue_vector(queue),
    }
}

const _: () = assert!(NO_VECTOR as usize > super::MAX_QUEUES);

//! A virtqueue that owns the buffers it lends to the device, and that checks that
//! completions come with their interrupt.

use super::hal::Identity;
use super::transport::{Completion, Transport, feature};
use crate::irq::{self, Deadline, Vector};
use crate::seconds;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport as _;

/// Entries of every queue.
pub const SIZE: usize = 16;

/// A descriptor chain: buffers that the device reads, then those that it writes.
#[derive(Default)]
pub struct Chain {
    /// From the driver to the device.
    pub readable: Vec<Vec<u8>>,
    /// From the device to the driver.
    pub writable: Vec<Vec<u8>>,
}

/// A queue in use.
pub struct Queue {
    ring: VirtQueue<Identity, SIZE>,
    index: u16,
    name: String,
    vector: Option<Vector>,
    /// A chain takes one descriptor, whatever its length.
    indirect: bool,
    chains: [Option<Chain>; SIZE],
    lent: usize,
    /// The interrupt count when the used ring was last known to be empty: what is
    /// found in it next must have come with another interrupt.
    empty_at: Option<u64>,
}

impl Queue {
    /// Sets queue `index` up; before [`Transport::finish`].
    ///
    /// # Errors
    /// The device does not have it, or it is too small.
    pub fn new(transport: &mut Transport, index: u16) -> Result<Self, String> {
        let name = format!("{}: queue {index}", transport.device().name);
        transport.prepare_queue(index)?;
        let indirect = transport.has(feature::RING_INDIRECT_DESC);
        let event_index = transport.has(feature::RING_EVENT_IDX);
        let mut ring = VirtQueue::new(transport, index, indirect, event_index)
            .map_err(|error| format!("{name}: set up: {error}"))?;
        let vector = match transport.completion() {
            Completion::Interrupt => Some(transport.device().queue_vector(index)),
            Completion::Polling => None,
        };
        ring.set_dev_notify(vector.is_some());
        let chains = [const { None }; SIZE];
        Ok(Self {
            ring,
            index,
            name,
            vector,
            indirect,
            chains,
            lent: 0,
            empty_at: None,
        })
    }

    /// How many more chains of `length` buffers fit.
    pub fn room(&self, length: usize) -> usize {
        if self.indirect {
            SIZE - self.lent
        } else {
            self.ring.available_desc() / length
        }
    }

    /// Lends `chain` to the device and rings its doorbell if it wants that.
    ///
    /// # Errors
    /// The queue is full.
    pub fn submit(&mut self, transport: &mut Transport, mut chain: Chain) -> Result<(), String> {
        if self.lent == 0 {
            self.empty_at = self.vector.map(Vector::count);
        }
        let readable: Vec<&[u8]> = chain.readable.iter().map(Vec::as_slice).collect();
        let mut writable: Vec<&mut [u8]> =
            chain.writable.iter_mut().map(Vec::as_mut_slice).collect();
        // SAFETY: the buffers stay in `self.chains`, untouched, until `take`; if the
        // queue goes first, the transport has reset the device before.
        let token = unsafe { self.ring.add(&readable, &mut writable) }
            .map_err(|error| format!("{}: submit: {error}", self.name))?;
        self.chains[usize::from(token)] = Some(chain);
        self.lent += 1;
        // The index must be out before the device's wish for a doorbell is read.
        fence(Ordering::SeqCst);
        if self.ring.should_notify() {
            transport.notify(self.index);
        }
        Ok(())
    }

    /// Takes the next chain that the device is done with, if there is one, and the
    /// number of bytes that the device wrote.
    ///
    /// # Errors
    /// The device returned a chain that it does not have, or it did so without an
    /// interrupt.
    pub fn take(&mut self) -> Result<Option<(Chain, usize)>, String> {
        let Some(token) = self.look() else {
            return Ok(None);
        };
        self.check_interrupt()?;
        let chain = self
            .chains
            .get_mut(usize::from(token))
            .and_then(Option::take);
        let Some(mut chain) = chain else {
            return Err(format!(
                "{}: returned descriptor {token}, which it does not have",
                self.name
            ));
        };
        self.lent -= 1;
        let readable: Vec<&[u8]> = chain.readable.iter().map(Vec::as_slice).collect();
        let mut writable: Vec<&mut [u8]> =
            chain.writable.iter_mut().map(Vec::as_mut_slice).collect();
        // SAFETY: the same buffers as in `submit`.
        let written = unsafe { self.ring.pop_used(token, &readable, &mut writable) }
            .map_err(|error| format!("{}: take: {error}", self.name))?;
        Ok(Some((chain, written as usize)))
    }

    /// Whether [`Queue::take`] would find something.
    pub fn has_used(&mut self) -> bool {
        self.look().is_some()
    }

    /// Waits for the next chain that the device is done with.
    ///
    /// # Errors
    /// As [`Queue::take`]; or none came in time.
    pub fn wait(&mut self) -> Result<(Chain, usize), String> {
        let waited = match self.vector {
            Some(_) => irq::wait_until(seconds(), || self.look().map(drop)),
            None => self.poll(),
        };
        waited.map_err(|error| format!("{}: wait for the device: {error}", self.name))?;
        self.take()?
            .ok_or_else(|| format!("{}: the used ring went back", self.name))
    }

    /// The next used descriptor; notes when there is none.
    fn look(&mut self) -> Option<u16> {
        let count = self.vector.map(Vector::count);
        // The wish for an interrupt must be out before the used index is read.
        fence(Ordering::SeqCst);
        let token = self.ring.peek_used();
        if token.is_none() {
            self.empty_at = count;
        }
        token
    }

    /// Spins on the used ring.
    fn poll(&self) -> Result<(), String> {
        let deadline = Deadline::after(seconds());
        while !self.ring.can_pop() {
            if deadline.is_over() {
                return Err(format!("nothing in {} s", seconds()));
            }
            core::hint::spin_loop();
        }
        Ok(())
    }

    /// Makes sure that what came into the empty used ring came with an interrupt; it
    /// may be a little later than the entry.
    fn check_interrupt(&mut self) -> Result<(), String> {
        let (Some(vector), Some(before)) = (self.vector, self.empty_at.take()) else {
            return Ok(());
        };
        irq::wait_until(seconds(), || (vector.count() != before).then_some(())).map_err(|error| {
            format!(
                "{}: completion without an interrupt on vector {}: {error}",
                self.name,
                vector.number()
            )
        })
    }
}

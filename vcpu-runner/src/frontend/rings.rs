//! What the driver has set up, for as long as it stands: the process that works on
//! it may change meanwhile.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{Bytes, GuestAddress};

use super::inflight::Inflight;
use super::session::{QueueStart, Session};
use crate::pci::virtio::backend::QueueSetup;
use crate::pci::virtio::{DeviceInfo, VirtioPci};
use crate::vm::memory::Ram;
use crate::{Error, eventfd};

/// How often the used ring is looked at while a process finishes its work.
const LOOK: Duration = Duration::from_micros(100);

/// A queue that runs, or will run again.
struct Ring {
    setup: QueueSetup,
    /// Available index to go on from, while it does not run.
    base: u16,
    /// A process works on it.
    runs: bool,
}

/// A driver's rings.
pub struct Rings {
    device: Arc<VirtioPci>,
    ram: Arc<Ram>,
    memory: Vec<VhostUserMemoryRegionInfo>,
    /// The feature bits that the driver accepted, once it is ready (DRIVER_OK).
    features: Option<u64>,
    active: Vec<Ring>,
    /// What the driver wrote to the configuration space, by offset.
    written: BTreeMap<usize, Vec<u8>>,
    /// The table of the process that works on them.
    inflight: Option<Inflight>,
    /// The last process that worked on them died, and none has begun since.
    owed: bool,
}

impl Rings {
    /// None so far.
    pub fn new(device: Arc<VirtioPci>, ram: Arc<Ram>) -> Self {
        Rings {
            memory: ram.vhost_regions(),
            device,
            ram,
            features: None,
            active: Vec::new(),
            written: BTreeMap::new(),
            inflight: None,
            owed: false,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.active.len()
    }

    /// The driver is ready, with these rings.
    ///
    /// # Errors
    /// When one of them does not lie in guest memory; then there are none.
    pub fn set_up(&mut self, features: u64, queues: Vec<QueueSetup>) -> Result<(), Error> {
        // It may have written before it was ready.
        let written = std::mem::take(&mut self.written);
        self.clear();
        self.written = written;
        queues.into_iter().try_for_each(|setup| self.add(setup))?;
        self.features = Some(features);
        Ok(())
    }

    /// The driver adds a ring.
    ///
    /// # Errors
    /// When it does not lie in guest memory.
    pub fn add(&mut self, setup: QueueSetup) -> Result<(), Error> {
        if !self.is_placed(&setup) {
            return Err(Error::Refused {
                id: self.device.info().id.clone(),
                operation: format!("queue {}: rings outside memory", setup.index),
            });
        }
        self.active.push(Ring {
            setup,
            base: 0,
            runs: false,
        });
        Ok(())
    }

    /// The driver takes a ring away.
    ///
    /// # Errors
    /// The session's; the ring is gone all the same.
    pub fn remove(&mut self, index: usize, session: Option<&mut Session>) -> Result<(), Error> {
        let found = self.active.iter().position(|r| r.setup.index == index);
        let Some(ring) = found.map(|at| self.active.remove(at)) else {
            return Ok(());
        };
        let result = match session {
            Some(session) if ring.runs => session.stop_queue(index).map(|_| true),
            _ => Ok(false),
        };
        // What the table says of it would be taken for requests of the next ring.
        if !matches!(result, Ok(true))
            && let Some(inflight) = &self.inflight
        {
            inflight.forget(index);
        }
        result.map(|_| ())
    }

    /// The driver has written to the configuration space.
    pub fn note_written(&mut self, offset: usize, data: &[u8]) {
        self.written.insert(offset, data.to_vec());
    }

    /// The driver has reset the device.
    pub fn clear(&mut self) {
        self.features = None;
        self.written.clear();
        self.active.clear();
        self.inflight = None;
        self.owed = false;
    }

    /// Whether the rings of `setup` are aligned and lie in guest memory (virtio
    /// 1.2 section 2.7).
    fn is_placed(&self, setup: &QueueSetup) -> bool {
        let size = u64::from(setup.size);
        let areas = [
            (setup.descriptors, 16 * size, 16),
            (setup.driver, 6 + 2 * size, 2),
            (setup.device, 6 + 8 * size, 4),
        ];
        areas.iter().all(|&(start, length, alignment)| {
            start.is_multiple_of(alignment)
                && self.memory.iter().any(|region| {
                    let end = region.guest_phys_addr + region.memory_size;
                    start >= region.guest_phys_addr
                        && start.checked_add(length).is_some_and(|last| last <= end)
                })
        })
    }

    /// Index in the available ring: so many requests were made.
    fn available(&self, setup: &QueueSetup) -> u16 {
        self.index(setup.driver)
    }

    /// Index in the used ring: so many requests have been completed.
    fn used(&self, setup: &QueueSetup) -> u16 {
        self.index(setup.device)
    }

    /// The index of the ring at `area`, which lies in guest memory: see `is_placed`.
    fn index(&self, area: u64) -> u16 {
        self.ram
            .memory()
            .load(GuestAddress(area + 2), Ordering::Acquire)
            .map_or(0, u16::from_le)
    }

    /// Tells a process of the driver and its memory, if there is a driver, and what it wrote
    /// to the configuration space; what its predecessor had in work, too, if that is `lost`
    /// or has not begun. Starts nothing. `info` is of the process, and as it is afterwards.
    /// Returns the table that the process tracks its work in.
    ///
    /// # Errors
    /// The session's.
    pub fn introduce(
        &self,
        session: &mut Session,
        info: &mut DeviceInfo,
        lost: bool,
    ) -> Result<Option<Inflight>, Error> {
        let lost = lost || self.owed;
        let Some(features) = self.features else {
            return Ok(None);
        };
        let kept = match &self.inflight {
            Some(inflight) if lost => Some(inflight.try_clone()?),
            _ => None,
        };
        let inflight = session.prepare(features, kept, &self.memory)?;
        for (&offset, data) in &self.written {
            match session.write_config(offset, data) {
                // The driver wrote what a device does not take.
                Err(Error::Refused { .. }) => {}
                result => result?,
            }
        }
        if !self.written.is_empty() {
            info.config = session.read_config()?;
        }
        Ok(inflight)
    }

    /// Gives the table of a process that died to one that has another still.
    ///
    /// # Errors
    /// The session's; and when the process has no use for it, though there is work in it.
    pub fn hand_over(&self, session: &mut Session) -> Result<(), Error> {
        match &self.inflight {
            Some(inflight) if session.is_tracked() => session.set_inflight(inflight),
            Some(_) if self.count_inflight() > 0 => {
                let id = &self.device.info().id;
                let why = "a process without INFLIGHT_SHMFD cannot finish what another began";
                Err(Error::device(id, "going back", why))
            }
            _ => Ok(()),
        }
    }

    /// From now on this is the table of the process that works on the rings.
    pub fn keep(&mut self, inflight: Option<Inflight>) {
        self.inflight = inflight;
    }

    /// Starts the rings that do not run, where they were stopped.
    ///
    /// # Errors
    /// The session's. Some may run then.
    pub fn start(&mut self, session: &mut Session) -> Result<(), Error> {
        if self.features.is_none() {
            // A driver that was refused adds to nothing.
            return Ok(());
        }
        for ring in self.active.iter_mut().filter(|ring| !ring.runs) {
            let index = ring.setup.index;
            let (Some(kick), Some(call)) = (self.device.kick(index), self.device.call(index))
            else {
                continue;
            };
            // Also if it fails halfway.
            ring.runs = true;
            session.start_queue(&QueueStart {
                setup: ring.setup,
                base: ring.base,
                kick,
                call,
            })?;
        }
        self.owed = false;
        Ok(())
    }

    /// Stops all rings that run, where they are.
    ///
    /// # Errors
    /// The session's.
    pub fn stop(&mut self, session: &mut Session) -> Result<(), Error> {
        for ring in self.active.iter_mut().filter(|ring| ring.runs) {
            ring.base = session.stop_queue(ring.setup.index)?;
            ring.runs = false;
        }
        Ok(())
    }

    /// Waits until a process has completed all that the driver made available; false if
    /// it takes longer than `limit`. The driver must add nothing meanwhile.
    pub fn drain(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        // It may not have been told of the last ones yet.
        self.wake();
        let idle =
            |ring: &Ring| !ring.runs || self.used(&ring.setup) == self.available(&ring.setup);
        while !self.active.iter().all(idle) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }

    /// After [`Rings::stop`], waits until all that was taken is completed as well;
    /// false if it takes longer than `limit`. Some processes (qemu-storage-daemon)
    /// answer GET_VRING_BASE while requests are still in work.
    pub fn settle(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let settled = |ring: &Ring| self.used(&ring.setup) == ring.base;
        while !self.active.iter().all(settled) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }

    /// The process is no more: its successor goes on behind what was completed, and
    /// does again what the table says was in work.
    pub fn rewind(&mut self) {
        self.owed = true;
        let used: Vec<u16> = self.active.iter().map(|r| self.used(&r.setup)).collect();
        for (ring, used) in self.active.iter_mut().zip(used) {
            ring.base = used;
            ring.runs = false;
        }
    }

    /// Requests that a lost process had in work, as far as its table tells.
    pub fn count_inflight(&self) -> u64 {
        let Some(table) = &self.inflight else {
            return 0;
        };
        let count = |ring: &Ring| table.count(ring.setup.index, self.used(&ring.setup));
        self.active.iter().map(count).sum()
    }

    /// Rings every doorbell and raises every interrupt once: the process that died
    /// may have taken the one and owed the other.
    pub fn wake(&self) {
        for ring in &self.active {
            let index = ring.setup.index;
            let fds = [self.device.kick(index), self.device.call(index)];
            fds.into_iter().flatten().for_each(eventfd::signal);
        }
    }
}

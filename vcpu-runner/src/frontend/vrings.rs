//! What the driver has set up: features, vrings and its writes to the configuration
//! space. It stays the same while back ends come and go.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{Bytes, GuestAddress};

use super::connection::{BackendConnection, VringStart};
use super::inflight::InflightTableFile;
use crate::pci::virtio::VirtioPci;
use crate::pci::virtio::request::QueueSetup;
use crate::vm::memory::GuestRam;
use crate::{Error, eventfd};

/// How often the used index is read while a back end completes requests.
const USED_INDEX_INTERVAL: Duration = Duration::from_micros(100);

/// A queue that the driver enabled.
struct EnabledVring {
    setup: QueueSetup,
    /// Index in the available ring to continue from, while it is stopped.
    base: u16,
    /// A back end was told to start it.
    started: bool,
}

/// The vrings of a driver.
pub struct Vrings {
    transport: Arc<VirtioPci>,
    ram: Arc<GuestRam>,
    memory: Vec<VhostUserMemoryRegionInfo>,
    /// The feature bits that the driver accepted, once it has set DRIVER_OK.
    features: Option<u64>,
    vrings: Vec<EnabledVring>,
    /// What the driver wrote to the configuration space, by offset.
    config_writes: BTreeMap<usize, Vec<u8>>,
    /// The in-flight table of the back end that serves the vrings.
    inflight: Option<InflightTableFile>,
    /// The last back end that served the vrings died, and no other has started them.
    resubmission_due: bool,
}

/// What a back end got by [`Vrings::send_setup`].
pub struct SentSetup {
    /// Where it tracks its requests.
    pub inflight: Option<InflightTableFile>,
    /// Its configuration space after the driver's writes, if there were any.
    pub config: Option<Vec<u8>>,
}

impl Vrings {
    /// No vrings.
    pub fn new(transport: Arc<VirtioPci>, ram: Arc<GuestRam>) -> Self {
        Vrings {
            memory: ram.vhost_regions(),
            transport,
            ram,
            features: None,
            vrings: Vec::new(),
            config_writes: BTreeMap::new(),
            inflight: None,
            resubmission_due: false,
        }
    }

    /// How many vrings the driver has enabled.
    pub fn len(&self) -> usize {
        self.vrings.len()
    }

    /// The driver has set DRIVER_OK with these features and queues.
    ///
    /// # Errors
    /// When a vring does not lie in guest memory; then there are none.
    pub fn activate(&mut self, features: u64, queues: Vec<QueueSetup>) -> Result<(), Error> {
        // The driver may write to the configuration space before DRIVER_OK.
        let config_writes = std::mem::take(&mut self.config_writes);
        self.clear();
        self.config_writes = config_writes;
        queues.into_iter().try_for_each(|setup| self.add(setup))?;
        self.features = Some(features);
        Ok(())
    }

    /// The driver enables one more queue.
    ///
    /// # Errors
    /// When its vring does not lie in guest memory.
    pub fn add(&mut self, setup: QueueSetup) -> Result<(), Error> {
        if !self.is_in_guest_memory(&setup) {
            return Err(Error::Refused {
                id: self.transport.id().to_owned(),
                operation: format!("queue {}", setup.index),
                why: "its rings are misaligned or lie outside guest memory".into(),
            });
        }
        self.vrings.push(EnabledVring {
            setup,
            base: 0,
            started: false,
        });
        Ok(())
    }

    /// The driver resets one queue.
    ///
    /// # Errors
    /// When the back end does not stop the vring; it is removed nevertheless.
    pub fn remove(
        &mut self,
        index: usize,
        connection: Option<&mut BackendConnection>,
    ) -> Result<(), Error> {
        let found = self.vrings.iter().position(|v| v.setup.index == index);
        let Some(vring) = found.map(|at| self.vrings.remove(at)) else {
            return Ok(());
        };
        let stopped = match connection {
            Some(connection) if vring.started => connection.stop_vring(index).map(|_| true),
            _ => Ok(false),
        };
        // Otherwise the next vring of this queue would inherit the requests.
        if !matches!(stopped, Ok(true))
            && let Some(inflight) = &self.inflight
            && let Err(error) = inflight.clear_queue(index)
        {
            tracing::warn!(queue = index, %error, "cannot clear a queue in the in-flight table");
        }
        stopped.map(|_| ())
    }

    /// The driver has written to the configuration space, and a back end that replaces
    /// the current one has to get the same.
    pub fn record_config_write(&mut self, offset: usize, data: &[u8]) {
        self.config_writes.insert(offset, data.to_vec());
    }

    /// The driver has reset the device.
    pub fn clear(&mut self) {
        self.features = None;
        self.config_writes.clear();
        self.vrings.clear();
        self.inflight = None;
        self.resubmission_due = false;
    }

    /// Whether the parts of a vring are aligned and lie in guest memory (virtio 1.2
    /// section 2.7).
    fn is_in_guest_memory(&self, setup: &QueueSetup) -> bool {
        let size = u64::from(setup.size);
        let areas = [
            (setup.descriptors, 16 * size, 16),
            (setup.driver, 6 + 2 * size, 2),
            (setup.device, 6 + 8 * size, 4),
        ];
        areas.iter().all(|&(start, length, alignment)| {
            start.is_multiple_of(alignment)
                && self.memory.iter().any(|region| {
                    let region_end = region.guest_phys_addr + region.memory_size;
                    start >= region.guest_phys_addr
                        && start
                            .checked_add(length)
                            .is_some_and(|end| end <= region_end)
                })
        })
    }

    fn available_index(&self, setup: &QueueSetup) -> u16 {
        self.ring_index(setup.driver)
    }

    fn used_index(&self, setup: &QueueSetup) -> u16 {
        self.ring_index(setup.device)
    }

    /// The field `idx` of an available or used ring, which lies in guest memory: see
    /// [`Vrings::add`].
    fn ring_index(&self, ring: u64) -> u16 {
        self.ram
            .memory()
            .load(GuestAddress(ring + 2), Ordering::Acquire)
            .map_or(0, u16::from_le)
    }

    /// Sends a back end all that it must know before it can start vrings: features,
    /// memory and what the driver wrote to the configuration space. If its predecessor
    /// died (`predecessor_died`, or earlier), it gets the in-flight table of that one, and
    /// else a new table. Before DRIVER_OK there is nothing to send.
    ///
    /// # Errors
    /// When the back end refuses a message or does not answer.
    pub fn send_setup(
        &self,
        connection: &mut BackendConnection,
        predecessor_died: bool,
    ) -> Result<SentSetup, Error> {
        let Some(features) = self.features else {
            return Ok(SentSetup {
                inflight: None,
                config: None,
            });
        };
        let kept = match &self.inflight {
            Some(inflight) if predecessor_died || self.resubmission_due => {
                Some(inflight.try_clone()?)
            }
            _ => None,
        };
        let shape = (
            self.transport.queue_count(),
            self.transport.max_queue_size(),
        );
        let inflight = connection.send_features_and_memory(features, kept, shape, &self.memory)?;
        for (&offset, data) in &self.config_writes {
            match connection.write_config(offset, data) {
                // The predecessor accepted the write, and this one does not.
                Err(Error::Refused { .. }) => {}
                result => result?,
            }
        }
        let config = if self.config_writes.is_empty() {
            None
        } else {
            Some(connection.read_config()?)
        };
        Ok(SentSetup { inflight, config })
    }

    /// Makes a back end that was stopped before use the in-flight table of one that died
    /// after it.
    ///
    /// # Errors
    /// When the back end refuses it, or cannot use it although there are requests in it.
    pub fn send_inflight(&self, connection: &mut BackendConnection) -> Result<(), Error> {
        match &self.inflight {
            Some(inflight) if connection.is_tracked() => connection.set_inflight(inflight),
            Some(_) if self.count_inflight() > 0 => {
                let why = "without INFLIGHT_SHMFD it cannot complete the requests of another \
                           back end";
                Err(Error::device(
                    self.transport.id(),
                    "resuming the old back end",
                    why,
                ))
            }
            _ => Ok(()),
        }
    }

    /// The back end that serves the vrings tracks its requests there.
    pub fn set_inflight(&mut self, inflight: Option<InflightTableFile>) {
        self.inflight = inflight;
    }

    /// Starts all vrings that are stopped, where they were stopped.
    ///
    /// # Errors
    /// When the back end refuses a message or does not answer. Some vrings may be started
    /// then.
    pub fn start_all(&mut self, connection: &mut BackendConnection) -> Result<(), Error> {
        if self.features.is_none() {
            // No DRIVER_OK, or what the driver set up was refused.
            return Ok(());
        }
        for vring in self.vrings.iter_mut().filter(|vring| !vring.started) {
            let index = vring.setup.index;
            let (kick, call) = (self.transport.kick(index), self.transport.call(index));
            let (Some(kick), Some(call)) = (kick, call) else {
                continue;
            };
            // Set first: the back end may have started it although an error follows.
            vring.started = true;
            connection.start_vring(&VringStart {
                setup: vring.setup,
                max_size: self.transport.max_queue_size(),
                base: vring.base,
                kick,
                call,
            })?;
        }
        self.resubmission_due = false;
        Ok(())
    }

    /// Stops all vrings that are started, and remembers where.
    ///
    /// # Errors
    /// When the back end does not send a proper reply.
    pub fn stop_all(&mut self, connection: &mut BackendConnection) -> Result<(), Error> {
        for vring in self.vrings.iter_mut().filter(|vring| vring.started) {
            vring.base = connection.stop_vring(vring.setup.index)?;
            vring.started = false;
        }
        Ok(())
    }

    /// Waits until the back end has completed all available requests; false if that takes
    /// longer than `limit`. The driver must not add requests meanwhile.
    pub fn drain(&self, limit: Duration) -> bool {
        // The back end may have missed the last notifications.
        self.kick_all();
        self.wait_for_all(limit, |vring| {
            !vring.started || self.used_index(&vring.setup) == self.available_index(&vring.setup)
        })
    }

    /// After [`Vrings::stop_all`], waits until the used indices reach the indices at which
    /// the back end stopped; false if that takes longer than `limit`. Some back ends
    /// (qemu-storage-daemon) answer GET_VRING_BASE with requests in flight.
    pub fn wait_for_used_index(&self, limit: Duration) -> bool {
        self.wait_for_all(limit, |vring| self.used_index(&vring.setup) == vring.base)
    }

    fn wait_for_all(&self, limit: Duration, condition: impl Fn(&EnabledVring) -> bool) -> bool {
        let deadline = Instant::now() + limit;
        while !self.vrings.iter().all(&condition) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(USED_INDEX_INTERVAL);
        }
        true
    }

    /// The back end died. Its successor continues behind the requests that are completed,
    /// and resubmits those that the in-flight table marks.
    pub fn resume_from_used_index(&mut self) {
        self.resubmission_due = true;
        let used: Vec<u16> = self
            .vrings
            .iter()
            .map(|vring| self.used_index(&vring.setup))
            .collect();
        for (vring, used) in self.vrings.iter_mut().zip(used) {
            vring.base = used;
            vring.started = false;
        }
    }

    /// How many requests a dead back end had in flight, as far as its table tells.
    pub fn count_inflight(&self) -> u64 {
        let Some(inflight) = &self.inflight else {
            return 0;
        };
        self.vrings
            .iter()
            .map(|vring| inflight.count(vring.setup.index, self.used_index(&vring.setup)))
            .sum()
    }

    /// Signals every doorbell and every interrupt once: a back end that died may have
    /// consumed a notification without acting on it, or completed a request without
    /// raising the interrupt.
    pub fn kick_all(&self) {
        for vring in &self.vrings {
            let index = vring.setup.index;
            let fds = [self.transport.kick(index), self.transport.call(index)];
            fds.into_iter().flatten().for_each(eventfd::signal);
        }
    }
}

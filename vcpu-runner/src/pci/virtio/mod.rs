//! A virtio device on PCI: its capabilities, the structures behind its BAR, its
//! doorbells and its interrupts. The type of the device makes no difference here.

mod bar;
pub mod common_config;
mod interrupts;
mod pci_config;
pub mod request;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::bar::{
    BAR_SIZE, COMMON, DEVICE, ISR, MSIX_PENDING, MSIX_TABLE, NOTIFY, NOTIFY_MULTIPLIER,
};
pub use self::bar::{CONFIG_LENGTH, MAX_QUEUES};
use self::common_config::{CommonConfig, ConfigEffect};
use self::interrupts::DeviceInterrupts;
use self::pci_config::VirtioConfigSpace;
use self::request::{TransportRequest, TransportRequestHandler};
use super::PciFunction;
use super::config::{self, register};
use super::intx::{Intx, IntxHandler};
use super::msix::MsixTable;
use crate::pci::bus;
use crate::vm::irq::IrqRouting;
use crate::{Error, eventfd};

/// What a back end says that a device is.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// The device's name.
    pub id: String,
    /// Virtio device number.
    pub virtio_id: u16,
    /// Feature bits to offer to the driver.
    pub features: u64,
    /// Number of queues.
    pub queues: usize,
    /// Largest queue size.
    pub queue_size: u16,
    /// Device-specific configuration.
    pub config: Vec<u8>,
}

/// One device. It owns what its driver sees of it: of a [`DeviceInfo`], the name and the
/// numbers never change, the features are in [`CommonConfig`], and the configuration is
/// in [`TransportState`].
pub struct VirtioPci {
    id: String,
    virtio_id: u16,
    queues: usize,
    queue_size: u16,
    /// Number of the device on the bus.
    index: usize,
    request_handler: Arc<dyn TransportRequestHandler>,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    state: Mutex<TransportState>,
}

struct TransportState {
    pci: VirtioConfigSpace,
    msix: MsixTable,
    common_config: CommonConfig,
    /// The device-specific configuration, as the back end sent it last.
    reported_config: Vec<u8>,
    /// The same as the driver reads it: padded, and with the driver's own writes until
    /// the back end has processed them.
    visible_config: Vec<u8>,
    interrupts: DeviceInterrupts,
}

fn eventfds(count: usize) -> Result<Vec<EventFd>, Error> {
    (0..count)
        .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::io("eventfd")))
        .collect()
}

fn duplicate(fds: &[EventFd]) -> Result<Vec<EventFd>, Error> {
    fds.iter()
        .map(|fd| fd.try_clone().map_err(Error::io("duplicating an eventfd")))
        .collect()
}

fn padded(mut config: Vec<u8>) -> Vec<u8> {
    config.resize(CONFIG_LENGTH, 0);
    config
}

impl VirtioPci {
    /// Device number `index` on the bus, after reset.
    ///
    /// # Errors
    /// When `info` has no queues or too many, or there are no file descriptors left.
    pub fn new(
        info: DeviceInfo,
        index: usize,
        request_handler: Arc<dyn TransportRequestHandler>,
        irq_routing: Arc<dyn IrqRouting>,
        intx: Arc<Intx>,
    ) -> Result<Arc<Self>, Error> {
        let queues = info.queues;
        if queues == 0 || queues > MAX_QUEUES {
            let why = format!("it has {queues} queues, not 1 to {MAX_QUEUES}");
            return Err(Error::device(&info.id, "setting up", why));
        }
        let vectors = queues + 1;
        let kicks = eventfds(queues)?;
        let calls = eventfds(queues)?;
        let mut sources = eventfds(1)?;
        sources.extend(duplicate(&calls)?);
        let doorbells = duplicate(&kicks)?;
        Ok(Arc::new_cyclic(|weak: &Weak<VirtioPci>| {
            let interrupts = DeviceInterrupts::new(
                info.id.clone(),
                irq_routing,
                intx,
                Weak::clone(weak) as Weak<dyn IntxHandler>,
                (index, bus::slot(index)),
                sources,
                doorbells,
            );
            let state = TransportState {
                pci: VirtioConfigSpace::new(info.virtio_id, queues, index),
                msix: MsixTable::new(vectors),
                common_config: CommonConfig::new(
                    info.features,
                    queues,
                    info.queue_size,
                    vectors as u16,
                ),
                visible_config: padded(info.config.clone()),
                reported_config: info.config,
                interrupts,
            };
            VirtioPci {
                id: info.id,
                virtio_id: info.virtio_id,
                queues,
                queue_size: info.queue_size,
                index,
                request_handler,
                kicks,
                calls,
                state: Mutex::new(state),
            }
        }))
    }

    fn lock(&self) -> MutexGuard<'_, TransportState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // For the front end.

    /// The device's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How many queues the guest sees.
    pub fn queue_count(&self) -> usize {
        self.queues
    }

    /// The largest size that the driver may choose for a queue.
    pub fn max_queue_size(&self) -> u16 {
        self.queue_size
    }

    /// What the device is now.
    pub fn info(&self) -> DeviceInfo {
        let state = self.lock();
        DeviceInfo {
            id: self.id.clone(),
            virtio_id: self.virtio_id,
            features: state.common_config.next_offer(),
            queues: self.queues,
            queue_size: self.queue_size,
            config: state.reported_config.clone(),
        }
    }

    /// Length of the device-specific configuration; `None` if there is none.
    pub fn config_length(&self) -> Option<usize> {
        Some(self.lock().reported_config.len()).filter(|&length| length > 0)
    }

    /// The doorbell of queue `queue`. It exists as long as the device, so that no
    /// notification is lost while there is no back end.
    pub fn kick(&self, queue: usize) -> Option<&EventFd> {
        self.kicks.get(queue)
    }

    /// The interrupt of queue `queue`.
    pub fn call(&self, queue: usize) -> Option<&EventFd> {
        self.calls.get(queue)
    }

    /// Whether the driver has set DRIVER_OK.
    pub fn is_activated(&self) -> bool {
        self.lock().common_config.is_activated()
    }

    /// The feature bits that the driver accepted, once it has set FEATURES_OK.
    pub fn accepted_features(&self) -> Option<u64> {
        self.lock().common_config.accepted_features()
    }

    /// The feature bits that the back end offers.
    pub fn offered_features(&self) -> u64 {
        self.lock().common_config.next_offer()
    }

    /// Offers these feature bits after the next reset.
    pub fn offer_features(&self, features: u64) {
        self.lock().common_config.offer(features);
    }

    /// All queues are stopped: completes the reset of the device.
    pub fn complete_reset(&self) {
        let state = &mut *self.lock();
        state.common_config.reset();
        state.interrupts.clear_pending();
        state.sync();
    }

    /// Queue `index` is stopped: completes its reset.
    pub fn complete_queue_reset(&self, index: usize) {
        let state = &mut *self.lock();
        state.common_config.complete_queue_reset(index);
        state.sync();
    }

    /// Sets DEVICE_NEEDS_RESET: the device cannot continue without a reset by its driver
    /// (section 2.1.2).
    pub fn set_needs_reset(&self) {
        let state = &mut *self.lock();
        state.common_config.set_needs_reset();
        if state.common_config.is_activated() {
            state.interrupts.notify_config_change();
        }
    }

    /// Takes over the device-specific configuration that the back end sent.
    pub fn set_config(&self, config: Vec<u8>) {
        let state = &mut *self.lock();
        let visible = padded(config.clone());
        state.reported_config = config;
        if state.visible_config != visible {
            state.visible_config = visible;
            state.common_config.next_generation();
            if state.common_config.is_activated() {
                state.interrupts.notify_config_change();
            }
        }
    }

    // For the guest.

    fn apply(&self, state: &mut TransportState, effect: ConfigEffect) {
        let request = match effect {
            ConfigEffect::None => return,
            ConfigEffect::VectorsChanged => None,
            ConfigEffect::WasReset => {
                state.interrupts.clear_pending();
                None
            }
            ConfigEffect::Activate => Some(TransportRequest::Activate {
                features: state.common_config.driver_features(),
                queues: state.common_config.enabled_queues(),
            }),
            ConfigEffect::Reset => Some(TransportRequest::Reset),
            ConfigEffect::StartQueue(setup) => Some(TransportRequest::StartQueue(setup)),
            ConfigEffect::StopQueue(index) => Some(TransportRequest::StopQueue(index)),
        };
        if let Some(request) = request {
            self.request_handler.submit(request);
        }
        state.sync();
    }

    fn read_structure(&self, state: &mut TransportState, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => state.common_config.read(offset as usize, data),
            ISR => {
                data[0] = state.interrupts.take_isr();
                state.sync();
            }
            DEVICE..NOTIFY => copy_from(&state.visible_config, (offset - DEVICE) as usize, data),
            MSIX_TABLE..MSIX_PENDING => state.msix.read((offset - MSIX_TABLE) as usize, data),
            MSIX_PENDING.. => {
                let pending = state.interrupts.pending_bits(&state.common_config);
                copy_from(&pending, (offset - MSIX_PENDING) as usize, data);
            }
            _ => {}
        }
    }

    fn write_structure(&self, state: &mut TransportState, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => {
                let effect = state.common_config.write(offset as usize, data);
                self.apply(state, effect);
            }
            DEVICE..NOTIFY => {
                let start = (offset - DEVICE) as usize;
                if let Some(bytes) = state.visible_config.get_mut(start..start + data.len()) {
                    bytes.copy_from_slice(data);
                    self.request_handler.submit(TransportRequest::WriteConfig {
                        offset: start,
                        data: data.to_vec(),
                    });
                }
            }
            // KVM signals doorbells by itself (ioeventfd), unless it has no room for more.
            NOTIFY..MSIX_TABLE => {
                let queue = (offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
                if let Some(kick) = self.kicks.get(queue as usize) {
                    eventfd::signal(kick);
                }
            }
            MSIX_TABLE..MSIX_PENDING => {
                let offset = (offset - MSIX_TABLE) as usize;
                if state.msix.write(offset, data).is_some() {
                    state.sync();
                }
            }
            _ => {}
        }
    }
}

impl TransportState {
    /// Makes doorbells, interrupts and the INTx pin agree with the registers.
    fn sync(&mut self) {
        let bar = self.pci.bar_address();
        self.interrupts.place_doorbells(bar.map(|bar| bar + NOTIFY));
        let intx_enabled = self.pci.command() & config::command::INTX_DISABLE == 0;
        let pending = self
            .interrupts
            .sync(&self.msix, &self.common_config, intx_enabled);
        let space = &mut self.pci.space;
        let mut status = space.word(register::STATUS) & !config::STATUS_INTERRUPT;
        if pending {
            status |= config::STATUS_INTERRUPT;
        }
        space.set(register::STATUS, &status.to_le_bytes());
    }
}

/// Fills `data` from `source` at `offset`; bytes beyond its end read as 0.
fn copy_from(source: &[u8], offset: usize, data: &mut [u8]) {
    for (at, byte) in (offset..).zip(data) {
        *byte = source.get(at).copied().unwrap_or(0);
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let state = &mut *self.lock();
        if state.pci.touches_access_data(offset, data.len())
            && let Some((at, length)) = state.pci.described_access()
        {
            let mut value = [0; 4];
            self.read_structure(state, at, &mut value[..length]);
            let access_data = state.pci.access_data();
            state.pci.space.set(access_data, &value[..length]);
        }
        state.pci.space.read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let state = &mut *self.lock();
        state.pci.space.write(offset, data);
        if state.pci.touches_access_data(offset, data.len())
            && let Some((at, length)) = state.pci.described_access()
        {
            let value = state.pci.space.long(state.pci.access_data()).to_le_bytes();
            self.write_structure(state, at, &value[..length]);
        }
        state.msix.set_control(state.pci.msix_control());
        state.sync();
    }

    fn bar(&self) -> Option<Range<u64>> {
        let base = self.lock().pci.bar_address()?;
        Some(base..base + u64::from(BAR_SIZE))
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        self.read_structure(&mut self.lock(), offset, data);
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        self.write_structure(&mut self.lock(), offset, data);
    }

    fn reset(&self) {
        let state = &mut *self.lock();
        state.pci = VirtioConfigSpace::new(self.virtio_id, self.queues, self.index);
        state.msix.reset();
        state.common_config.reset();
        state.interrupts.clear_pending();
        state.sync();
    }
}

impl IntxHandler for VirtioPci {
    fn notified(&self, source: usize) {
        let state = &mut *self.lock();
        if state.interrupts.set_isr(source) {
            state.sync();
        }
    }
}

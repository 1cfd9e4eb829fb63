//! A virtio device on PCI: capabilities, the structures behind its BAR, its
//! doorbells and interrupts. What kind of device it is makes no difference here.

pub mod backend;
pub mod common;
mod notify;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::backend::{Backend, Request};
use self::common::{Common, Effect};
use self::notify::Notifiers;
use super::Function;
use super::config::{self, ConfigSpace, Identity, register};
use super::intx::{Intx, Sink};
use super::msix::{self, Table};
use crate::layout;
use crate::pci::bus;
use crate::vm::irq::Interrupts;
use crate::{Error, eventfd};

/// Vendor ID of virtio devices (section 4.1.2).
const VENDOR: u16 = 0x1af4;
/// Device ID of a modern device, less its virtio number.
const DEVICE_BASE: u16 = 0x1040;
/// A class of its own: the runner does not know what it is.
const CLASS: u32 = 0xff_00_00;

/// Size of the BAR in bytes.
pub const BAR_SIZE: u32 = 0x1_0000;
/// Structures in the BAR: common configuration,
pub const COMMON: u64 = 0;
/// ISR status,
pub const ISR: u64 = 0x1000;
/// device-specific configuration,
pub const DEVICE: u64 = 0x2000;
/// doorbells, 4 bytes apart,
pub const NOTIFY: u64 = 0x3000;
/// MSI-X table,
pub const MSIX_TABLE: u64 = 0x4000;
/// MSI-X pending bits.
pub const MSIX_PENDING: u64 = 0x8000;
/// Distance of two queues' doorbells in bytes.
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// Most queues that fit this layout.
pub const MAX_QUEUES: usize = 256;
/// Length of the device-specific configuration in bytes.
pub const CONFIG_LENGTH: usize = 256;

const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
/// Offsets in the PCI configuration access capability (section 4.1.4.9).
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

/// What the device's process told about it.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// The device's name.
    pub id: String,
    /// Virtio device number.
    pub virtio_id: u16,
    /// Feature bits offered to the driver.
    pub features: u64,
    /// Number of queues.
    pub queues: usize,
    /// Largest ring size.
    pub queue_size: u16,
    /// Device-specific configuration.
    pub config: Vec<u8>,
}

/// One device.
pub struct VirtioPci {
    info: DeviceInfo,
    index: usize,
    backend: Arc<dyn Backend>,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    state: Mutex<State>,
}

struct State {
    config: ConfigSpace,
    window: usize,
    msix_capability: usize,
    msix: Table,
    common: Common,
    device: Vec<u8>,
    notifiers: Notifiers,
}

fn eventfds(count: usize) -> Result<Vec<EventFd>, Error> {
    (0..count)
        .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::io("eventfd")))
        .collect()
}

impl VirtioPci {
    /// A device at [`bus::devfn`] of `index`, after reset.
    ///
    /// # Errors
    /// When there are too many queues, or no descriptors left.
    pub fn new(
        info: DeviceInfo,
        index: usize,
        backend: Arc<dyn Backend>,
        interrupts: Arc<dyn Interrupts>,
        intx: Arc<Intx>,
    ) -> Result<Arc<Self>, Error> {
        if info.queues == 0 || info.queues > MAX_QUEUES {
            let why = format!("{} queues, but 1 to {MAX_QUEUES} can be had", info.queues);
            return Err(Error::device(&info.id, "setting up", why));
        }
        let vectors = info.queues + 1;
        let kicks = eventfds(info.queues)?;
        let calls = eventfds(info.queues)?;
        let (config, msix_capability, window) = config_space(&info, index);
        let common = Common::new(info.features, info.queues, info.queue_size, vectors as u16);
        let mut device = info.config.clone();
        device.resize(CONFIG_LENGTH, 0);
        let slot = bus::devfn(index) >> 3;
        let clone = |fds: &[EventFd]| {
            fds.iter()
                .map(|fd| fd.try_clone().map_err(Error::io("dup")))
                .collect::<Result<Vec<_>, _>>()
        };
        let mut sources = eventfds(1)?;
        sources.extend(clone(&calls)?);
        let doorbells = clone(&kicks)?;
        Ok(Arc::new_cyclic(|weak: &Weak<VirtioPci>| VirtioPci {
            state: Mutex::new(State {
                config,
                window,
                msix_capability,
                msix: Table::new(vectors),
                common,
                device,
                notifiers: Notifiers::new(
                    interrupts,
                    intx,
                    weak.clone(),
                    (index, slot),
                    sources,
                    doorbells,
                    vectors,
                ),
            }),
            info,
            index,
            backend,
            kicks,
            calls,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The doorbell of queue `queue`, kept for the life of the device, so that
    /// none is lost while no process listens.
    pub fn kick(&self, queue: usize) -> Option<&EventFd> {
        self.kicks.get(queue)
    }

    /// The interrupt of queue `queue`.
    pub fn call(&self, queue: usize) -> Option<&EventFd> {
        self.calls.get(queue)
    }

    /// Whether the driver has taken the device into use.
    pub fn is_live(&self) -> bool {
        self.lock().common.is_live()
    }

    /// The feature bits that the driver accepted, if it has come so far.
    pub fn accepted(&self) -> Option<u64> {
        self.lock().common.accepted()
    }

    /// Offers these feature bits from the next reset on.
    pub fn offer(&self, features: u64) {
        self.lock().common.offer(features);
    }

    /// All queues are stopped: the reset is complete.
    pub fn stopped(&self) {
        let state = &mut *self.lock();
        state.common.reset();
        state.notifiers.forget();
        state.sync();
    }

    /// Queue `index` is stopped: its reset is complete.
    pub fn queue_stopped(&self, index: usize) {
        let state = &mut *self.lock();
        state.common.queue_reset_done(index);
        state.sync();
    }

    /// The device cannot go on without a reset by its driver (section 2.1.2).
    pub fn failed(&self) {
        let state = &mut *self.lock();
        state.common.need_reset();
        if state.common.is_live() {
            state.notifiers.config_changed();
        }
    }

    /// The device's process changed its configuration.
    pub fn set_config(&self, mut bytes: Vec<u8>) {
        bytes.resize(CONFIG_LENGTH, 0);
        let state = &mut *self.lock();
        if state.device != bytes {
            state.device = bytes;
            state.common.next_generation();
            if state.common.is_live() {
                state.notifiers.config_changed();
            }
        }
    }

    fn apply(&self, state: &mut State, effect: Effect) {
        match effect {
            Effect::None => return,
            Effect::Vectors => {}
            Effect::Reset => state.notifiers.forget(),
            Effect::Start => self.backend.request(Request::Start {
                features: state.common.features(),
                queues: state.common.enabled_queues(),
            }),
            Effect::StopAll => self.backend.request(Request::Stop),
            Effect::StartQueue(index) => self
                .backend
                .request(Request::StartQueue(state.common.setup(index))),
            Effect::StopQueue(index) => self.backend.request(Request::StopQueue(index)),
        }
        state.sync();
    }

    fn read_structure(&self, state: &mut State, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => state.common.read(offset as usize, data),
            ISR => {
                data[0] = state.notifiers.take_isr();
                state.sync();
            }
            DEVICE..NOTIFY => {
                let start = (offset - DEVICE) as usize;
                for (at, byte) in (start..).zip(data) {
                    *byte = state.device.get(at).copied().unwrap_or(0);
                }
            }
            MSIX_TABLE..MSIX_PENDING => state.msix.read((offset - MSIX_TABLE) as usize, data),
            MSIX_PENDING.. => {
                let pending = state.notifiers.pending(&state.common);
                let start = (offset - MSIX_PENDING) as usize;
                for (at, byte) in (start..).zip(data) {
                    *byte = pending.get(at).copied().unwrap_or(0);
                }
            }
            _ => {}
        }
    }

    fn write_structure(&self, state: &mut State, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => {
                let effect = state.common.write(offset as usize, data);
                self.apply(state, effect);
            }
            DEVICE..NOTIFY => {
                let start = (offset - DEVICE) as usize;
                if let Some(place) = state.device.get_mut(start..start + data.len()) {
                    place.copy_from_slice(data);
                    self.backend.request(Request::WriteConfig {
                        offset: start,
                        data: data.to_vec(),
                    });
                }
            }
            // KVM takes doorbells before they get here, unless it has no room
            // for more of them.
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

    /// The access that the configuration access capability describes, if it is
    /// one that can be made.
    fn window(state: &State) -> Option<(u64, usize)> {
        let mut bar = [0];
        state.config.read(state.window + 4, &mut bar);
        let offset = state.config.long(state.window + WINDOW_OFFSET);
        let length = state.config.long(state.window + WINDOW_LENGTH) as usize;
        (bar == [0]
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length as u32)
            && offset < BAR_SIZE)
            .then_some((offset.into(), length))
    }
}

impl State {
    /// Brings doorbells, interrupts and the pin in line with the registers.
    fn sync(&mut self) {
        let enabled = self.config.word(register::COMMAND) & config::command::MEMORY != 0;
        let base = u64::from(self.config.long(register::BAR0));
        self.notifiers
            .place_doorbells(enabled.then_some(base + NOTIFY));
        let intx = self.config.word(register::COMMAND) & config::command::INTX_DISABLE == 0;
        let pending = self.notifiers.sync(&self.msix, &self.common, intx);
        let mut status = self.config.word(register::STATUS) & !config::STATUS_INTERRUPT;
        if pending {
            status |= config::STATUS_INTERRUPT;
        }
        self.config.set(register::STATUS, &status.to_le_bytes());
    }
}

/// The configuration space, and where the MSI-X capability and the
/// configuration access window are in it.
fn config_space(info: &DeviceInfo, index: usize) -> (ConfigSpace, usize, usize) {
    let devfn = bus::devfn(index);
    let mut config = ConfigSpace::new(
        &Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + info.virtio_id,
            revision: 1,
            class: CLASS,
            subsystem_vendor: VENDOR,
            subsystem: DEVICE_BASE + info.virtio_id,
        },
        false,
    );
    let address = layout::PCI_WINDOW as u32 + index as u32 * BAR_SIZE;
    config.set_bar0(address, BAR_SIZE);
    let command =
        config::command::MEMORY | config::command::BUS_MASTER | config::command::INTX_DISABLE;
    config.allow(register::COMMAND, &command.to_le_bytes());
    config.allow(register::INTERRUPT_LINE, &[0xff]);
    let line = Intx::line(devfn >> 3) as u8;
    config.set(register::INTERRUPT_LINE, &[line]);
    config.set(register::INTERRUPT_PIN, &[1]);

    let vectors = info.queues + 1;
    let mut msix = [0; 10];
    msix[..2].copy_from_slice(&(vectors as u16 - 1).to_le_bytes());
    msix[2..6].copy_from_slice(&(MSIX_TABLE as u32).to_le_bytes());
    msix[6..10].copy_from_slice(&(MSIX_PENDING as u32).to_le_bytes());
    let msix = config.add_capability(CAP_MSIX, &msix);
    config.allow(msix + 2, &msix::WRITABLE_CONTROL.to_le_bytes());

    // cfg_type, offset and length of section 4.1.4, then what some types add.
    let mut add = |kind: u8, offset: u64, length: usize, more: &[u8]| {
        let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((length as u32).to_le_bytes());
        body.extend(more);
        config.add_capability(CAP_VENDOR, &body)
    };
    add(1, COMMON, common::LENGTH, &[]);
    let notify_length = info.queues * NOTIFY_MULTIPLIER as usize;
    add(2, NOTIFY, notify_length, &NOTIFY_MULTIPLIER.to_le_bytes());
    add(3, ISR, 1, &[]);
    add(4, DEVICE, CONFIG_LENGTH, &[]);
    let window = add(5, 0, 0, &[0; 4]);
    config.allow(window + 4, &[0xff]);
    config.allow(window + WINDOW_OFFSET, &[0xff; 12]);
    (config, msix, window)
}

impl Function for VirtioPci {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let state = &mut *self.lock();
        if overlaps(offset, data.len(), state.window + WINDOW_DATA)
            && let Some((at, length)) = Self::window(state)
        {
            let mut value = [0; 4];
            self.read_structure(state, at, &mut value[..length]);
            state
                .config
                .set(state.window + WINDOW_DATA, &value[..length]);
        }
        state.config.read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let state = &mut *self.lock();
        state.config.write(offset, data);
        if overlaps(offset, data.len(), state.window + WINDOW_DATA)
            && let Some((at, length)) = Self::window(state)
        {
            let value = state.config.long(state.window + WINDOW_DATA).to_le_bytes();
            self.write_structure(state, at, &value[..length]);
        }
        let control = state.config.word(state.msix_capability + 2);
        state.msix.set_control(control);
        state.sync();
    }

    fn bar(&self) -> Option<Range<u64>> {
        let state = self.lock();
        let enabled = state.config.word(register::COMMAND) & config::command::MEMORY != 0;
        let base = u64::from(state.config.long(register::BAR0));
        enabled.then_some(base..base + u64::from(BAR_SIZE))
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        self.read_structure(&mut self.lock(), offset, data);
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        self.write_structure(&mut self.lock(), offset, data);
    }

    fn reset(&self) {
        let state = &mut *self.lock();
        (state.config, state.msix_capability, state.window) = config_space(&self.info, self.index);
        state.msix.reset();
        state.common.reset();
        state.notifiers.forget();
        state.sync();
    }
}

fn overlaps(offset: usize, len: usize, window: usize) -> bool {
    offset < window + 4 && window < offset + len
}

impl Sink for VirtioPci {
    fn notified(&self, source: usize) {
        let state = &mut *self.lock();
        if state.notifiers.note(source) {
            state.sync();
        }
    }
}

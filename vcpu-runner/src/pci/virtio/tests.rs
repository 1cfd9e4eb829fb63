//! The requirements of virtio 1.2 sections 2.1 to 2.6 and 4.1 on the device. Each test is
//! named after the section of its requirement. (The device processes implement section
//! 2.7, the virtqueues: see `tests/tests/contract.rs`.)

mod interrupts;
mod requirements_2;
mod requirements_4_1;

use std::sync::{Arc, Mutex};

use super::common_config::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
use super::request::{TransportRequest, TransportRequestHandler};
use super::*;
use crate::pci::config::{command, register};
use crate::vm::irq::{Gsi, MsiMessage};
use virtio_bindings::virtio_config::{VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1};

/// Records the calls instead of making KVM ioctls.
#[derive(Default)]
struct RecordingIrqRouting {
    routes: Mutex<Vec<MsiMessage>>,
    /// Attached irqfds: descriptor and GSI.
    attached: Mutex<Vec<(i32, Gsi)>>,
    lines: Mutex<Vec<(Gsi, bool)>>,
    doorbells: Mutex<Vec<u64>>,
}

const FIRST_GSI: Gsi = 24;

impl IrqRouting for RecordingIrqRouting {
    fn add_route(&self, message: MsiMessage) -> Result<Gsi, Error> {
        let mut routes = self.routes.lock().unwrap();
        routes.push(message);
        Ok(FIRST_GSI + routes.len() as Gsi - 1)
    }
    fn set_route(&self, gsi: Gsi, message: MsiMessage) -> Result<(), Error> {
        self.routes.lock().unwrap()[(gsi - FIRST_GSI) as usize] = message;
        Ok(())
    }
    fn attach_irqfd(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Error> {
        use std::os::fd::AsRawFd;
        self.attached.lock().unwrap().push((fd.as_raw_fd(), gsi));
        Ok(())
    }
    fn detach_irqfd(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Error> {
        use std::os::fd::AsRawFd;
        let mut attached = self.attached.lock().unwrap();
        let at = attached.iter().position(|a| *a == (fd.as_raw_fd(), gsi));
        attached.remove(at.expect("was attached"));
        Ok(())
    }
    fn set_line(&self, gsi: Gsi, level: bool) -> Result<(), Error> {
        self.lines.lock().unwrap().push((gsi, level));
        Ok(())
    }
    fn add_ioeventfd(&self, _fd: &EventFd, address: u64) -> Result<(), Error> {
        self.doorbells.lock().unwrap().push(address);
        Ok(())
    }
    fn remove_ioeventfd(&self, _fd: &EventFd, address: u64) -> Result<(), Error> {
        let mut doorbells = self.doorbells.lock().unwrap();
        let at = doorbells.iter().position(|a| *a == address);
        doorbells.remove(at.expect("was there"));
        Ok(())
    }
}

#[derive(Default)]
struct RecordedRequests(Mutex<Vec<TransportRequest>>);

impl TransportRequestHandler for RecordedRequests {
    fn submit(&self, request: TransportRequest) {
        self.0.lock().unwrap().push(request);
    }
}

/// A device under test and what a driver does with it.
struct TestDevice {
    device: Arc<VirtioPci>,
    requests: Arc<RecordedRequests>,
    irq_routing: Arc<RecordingIrqRouting>,
}

const OFFERED: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_RING_RESET | 0b101;
const QUEUES: usize = 3;

fn test_device() -> TestDevice {
    test_device_with(OFFERED, QUEUES)
}

fn test_device_with(features: u64, queues: usize) -> TestDevice {
    let irq_routing = Arc::new(RecordingIrqRouting::default());
    let requests = Arc::new(RecordedRequests::default());
    let info = DeviceInfo {
        id: "dut".into(),
        virtio_id: 2,
        features,
        queues,
        queue_size: 256,
        config: (0..60).collect(),
    };
    let routing: Arc<dyn IrqRouting> = Arc::clone(&irq_routing) as _;
    let intx = Intx::start(Arc::clone(&routing)).unwrap();
    let device = VirtioPci::new(info, 0, Arc::clone(&requests) as _, routing, intx).unwrap();
    device.write_config(register::COMMAND, &command::MEMORY.to_le_bytes());
    TestDevice {
        device,
        requests,
        irq_routing,
    }
}

impl TestDevice {
    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device.read_bar(offset, &mut data);
        data
    }
    fn get8(&self, offset: u64) -> u8 {
        self.read::<1>(offset)[0]
    }
    fn get16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }
    fn get32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }
    fn set8(&self, offset: u64, value: u8) {
        self.device.write_bar(offset, &[value]);
    }
    fn set16(&self, offset: u64, value: u16) {
        self.device.write_bar(offset, &value.to_le_bytes());
    }
    fn set32(&self, offset: u64, value: u32) {
        self.device.write_bar(offset, &value.to_le_bytes());
    }
    fn set64(&self, offset: u64, value: u64) {
        self.set32(offset, value as u32);
        self.set32(offset + 4, (value >> 32) as u32);
    }
    fn status(&self) -> u8 {
        self.get8(reg::STATUS)
    }
    fn add_status(&self, bits: u8) {
        self.set8(reg::STATUS, self.status() | bits);
    }
    fn accept(&self, features: u64) {
        self.add_status(ACKNOWLEDGE | DRIVER);
        for half in 0..2 {
            self.set32(reg::DRIVER_FEATURE_SELECT, half);
            self.set32(reg::DRIVER_FEATURE, (features >> (32 * half)) as u32);
        }
        self.add_status(FEATURES_OK);
    }
    fn set_up_queue(&self, queue: u16) {
        self.set16(reg::QUEUE_SELECT, queue);
        self.set16(reg::QUEUE_SIZE, 8);
        self.set64(reg::QUEUE_DESC, 0x1000 + u64::from(queue) * 0x1000);
        self.set64(reg::QUEUE_DRIVER, 0x1_0000_2000);
        self.set64(reg::QUEUE_DEVICE, 0x3000);
        self.set16(reg::QUEUE_ENABLE, 1);
    }
    /// Does what a driver does up to DRIVER_OK, with queues 0 and 1.
    fn activate(&self) {
        self.accept(OFFERED);
        self.set_up_queue(0);
        self.set_up_queue(1);
        self.add_status(DRIVER_OK);
    }
    fn take_requests(&self) -> Vec<TransportRequest> {
        std::mem::take(&mut *self.requests.0.lock().unwrap())
    }
    fn config<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut data = [0; N];
        self.device.read_config(offset, &mut data);
        data
    }
    /// The capabilities: offset, ID, and the 24 bytes at the offset.
    fn capabilities(&self) -> Vec<(usize, u8, [u8; 24])> {
        let mut at = usize::from(self.config::<1>(register::CAPABILITIES)[0]);
        let mut all = Vec::new();
        while at != 0 {
            let bytes = self.config::<24>(at);
            all.push((at, bytes[0], bytes));
            at = usize::from(bytes[1]);
            assert!(all.len() < 20, "the list has a loop");
        }
        all
    }
    /// The virtio structure of type `kind`: offset of its capability, cap_len, BAR, offset
    /// and length.
    fn structure(&self, kind: u8) -> (usize, u8, u8, u32, u32) {
        let (at, _, b) = self
            .capabilities()
            .into_iter()
            .find(|(_, id, bytes)| *id == 0x09 && bytes[3] == kind)
            .unwrap_or_else(|| panic!("structure {kind} is missing"));
        let word = |i: usize| u32::from_le_bytes(b[i..i + 4].try_into().unwrap());
        (at, b[2], b[4], word(8), word(12))
    }
    fn enable_msix(&self) {
        let at = self.msix();
        self.device.write_config(at + 2, &0x8000_u16.to_le_bytes());
    }
    fn msix(&self) -> usize {
        let found = self.capabilities().into_iter().find(|c| c.1 == 0x11);
        found.expect("MSI-X").0
    }
    fn set_vector(&self, vector: u64, data: u32, masked: bool) {
        let entry = MSIX_TABLE + vector * 16;
        self.set32(entry, 0xfee0_0000);
        self.set32(entry + 4, 0);
        self.set32(entry + 8, data);
        self.set32(entry + 12, u32::from(masked));
    }
    fn attached(&self) -> Vec<Gsi> {
        let attached = self.irq_routing.attached.lock().unwrap();
        attached.iter().map(|a| a.1).collect()
    }
}

/// Registers of the common configuration structure.
mod reg {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
    pub const QUEUE_RESET: u64 = 58;
}

//! Network device (virtio 1.3, 5.1), without offloads.

use super::device::Device;
use super::queue::{Chain, Queue};
use super::transport::{Completion, Transport};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use logic::packet::Mac;

const FEATURE_MAC: u64 = 1 << 5;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// `virtio_net_hdr` of a modern device; all zero without offloads.
const HEADER: usize = 12;
const LONGEST_FRAME: usize = 1514;
const RECEIVE_BUFFERS: usize = 8;

/// A network device in use; see [`super::disk::Disk`] for the order of the fields.
pub struct Net {
    transport: Transport,
    receive: Queue,
    transmit: Queue,
    mac: Mac,
}

impl Net {
    /// Sets the device up and gives it buffers to receive into.
    ///
    /// # Errors
    /// See [`Transport::start`] and [`Queue::new`]; or it has no address.
    pub fn start(device: Device) -> Result<Self, String> {
        let mut transport = Transport::start(device, FEATURE_MAC, Completion::Interrupt)?;
        let receive = Queue::new(&mut transport, RECEIVE)?;
        let transmit = Queue::new(&mut transport, TRANSMIT)?;
        if !transport.has(FEATURE_MAC) {
            return Err(format!("{}: has no MAC address", transport.device().name));
        }
        let mac = transport.config(0)?;
        transport.finish();
        let mut net = Self {
            transport,
            receive,
            transmit,
            mac,
        };
        for _ in 0..RECEIVE_BUFFERS {
            net.lend(vec![0; HEADER + LONGEST_FRAME])?;
        }
        Ok(net)
    }

    /// The device's address.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Sends a frame and waits until the device has it.
    ///
    /// # Errors
    /// See [`Queue::wait`].
    pub fn send(&mut self, frame: Vec<u8>) -> Result<(), String> {
        let chain = Chain {
            readable: vec![vec![0; HEADER], frame],
            writable: Vec::new(),
        };
        self.transmit.submit(&mut self.transport, chain)?;
        self.transmit.wait().map(drop)
    }

    /// Waits for the next frame.
    ///
    /// # Errors
    /// See [`Queue::wait`]; or the device wrote less than a header.
    pub fn receive(&mut self) -> Result<Vec<u8>, String> {
        let (mut chain, written) = self.receive.wait()?;
        let buffer = chain.writable.pop().unwrap_or_default();
        let frame = buffer
            .get(HEADER..written)
            .map(Vec::from)
            .ok_or_else(|| format!("{}: receive: {written} bytes", self.transport.device().name))?;
        self.lend(buffer)?;
        Ok(frame)
    }

    fn lend(&mut self, buffer: Vec<u8>) -> Result<(), String> {
        let chain = Chain {
            readable: Vec::new(),
            writable: vec![buffer],
        };
        self.receive.submit(&mut self.transport, chain)
    }
}

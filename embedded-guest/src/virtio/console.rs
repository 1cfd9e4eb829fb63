//! Console device (virtio 1.3, 5.3): its one port.

use super::device::Device;
use super::queue::{Chain, Queue};
use super::transport::{Completion, Transport};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

const FEATURE_SIZE: u64 = 1 << 0;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const RECEIVE_BUFFER: usize = 1024;
const RECEIVE_BUFFERS: usize = 4;

/// A console in use; see [`super::disk::Disk`] for the order of the fields.
pub struct Console {
    transport: Transport,
    receive: Queue,
    transmit: Queue,
}

impl Console {
    /// Sets the device up and gives it buffers to receive into.
    ///
    /// # Errors
    /// See [`Transport::start`] and [`Queue::new`].
    pub fn start(device: Device) -> Result<Self, String> {
        let mut transport = Transport::start(device, FEATURE_SIZE, Completion::Interrupt)?;
        let receive = Queue::new(&mut transport, RECEIVE)?;
        let transmit = Queue::new(&mut transport, TRANSMIT)?;
        transport.finish();
        let mut console = Self {
            transport,
            receive,
            transmit,
        };
        for _ in 0..RECEIVE_BUFFERS {
            console.lend(vec![0; RECEIVE_BUFFER])?;
        }
        Ok(console)
    }

    /// The device below.
    pub fn device(&self) -> &Device {
        self.transport.device()
    }

    /// Columns and rows, if the device says them.
    ///
    /// # Errors
    /// See [`Transport::config`].
    pub fn size(&self) -> Result<Option<(u16, u16)>, String> {
        if !self.transport.has(FEATURE_SIZE) {
            return Ok(None);
        }
        let [columns, rows] = self.transport.config(0)?;
        Ok(Some((columns, rows)))
    }

    /// Sends `text` and waits until the device has it.
    ///
    /// # Errors
    /// See [`Queue::wait`].
    pub fn send(&mut self, text: &[u8]) -> Result<(), String> {
        if text.is_empty() {
            return Ok(());
        }
        let chain = Chain {
            readable: vec![text.to_vec()],
            writable: Vec::new(),
        };
        self.transmit.submit(&mut self.transport, chain)?;
        self.transmit.wait().map(drop)
    }

    /// What has come in, if anything has.
    ///
    /// # Errors
    /// See [`Queue::take`].
    pub fn receive(&mut self) -> Result<Option<Vec<u8>>, String> {
        let Some((mut chain, written)) = self.receive.take()? else {
            return Ok(None);
        };
        let buffer = chain.writable.pop().unwrap_or_default();
        let text = buffer[..written.min(buffer.len())].to_vec();
        self.lend(buffer)?;
        Ok(Some(text))
    }

    /// Whether [`Console::receive`] would find something.
    pub fn has_input(&mut self) -> bool {
        self.receive.has_used()
    }

    fn lend(&mut self, buffer: Vec<u8>) -> Result<(), String> {
        let chain = Chain {
            readable: Vec::new(),
            writable: vec![buffer],
        };
        self.receive.submit(&mut self.transport, chain)
    }
}

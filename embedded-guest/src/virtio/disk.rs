//! Block device (virtio 1.3, 5.2).

use super::device::Device;
use super::queue::{Chain, Queue};
use super::transport::{Completion, Transport};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

/// Bytes in a sector.
pub const SECTOR: u64 = 512;

const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const ID_LENGTH: usize = 20;
const STATUS_OK: u8 = 0;
/// A status that no device writes: it shows that the status byte was not written.
const NO_STATUS: u8 = 0xff;

/// A disk in use. The transport is first: it is dropped, and the device reset,
/// before the queue.
pub struct Disk {
    transport: Transport,
    queue: Queue,
    capacity: u64,
}

impl Disk {
    /// Sets the device up.
    ///
    /// # Errors
    /// See [`Transport::start`] and [`Queue::new`].
    pub fn start(device: Device, completion: Completion) -> Result<Self, String> {
        Self::start_with(device, 0, completion)
    }

    /// The same, accepting these features as well.
    ///
    /// # Errors
    /// See [`Disk::start`].
    pub fn start_with(device: Device, more: u64, completion: Completion) -> Result<Self, String> {
        let features = FEATURE_READ_ONLY | FEATURE_FLUSH | more;
        let mut transport = Transport::start(device, features, completion)?;
        let queue = Queue::new(&mut transport, 0)?;
        transport.finish();
        let halves: [u32; 2] = transport.config(0)?;
        let capacity = u64::from(halves[0]) | u64::from(halves[1]) << 32;
        Ok(Self {
            transport,
            queue,
            capacity,
        })
    }

    /// For messages.
    pub fn name(&self) -> &str {
        &self.transport.device().name
    }

    /// Sectors.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Whether it can't be written to.
    pub fn read_only(&self) -> bool {
        self.transport.has(FEATURE_READ_ONLY)
    }

    /// How many requests with data it takes at once.
    pub fn depth(&self) -> usize {
        self.queue.room(3)
    }

    /// Submits a read of `length` bytes; [`Disk::complete`] returns the data.
    ///
    /// # Errors
    /// See [`Queue::submit`].
    pub fn submit_read(&mut self, sector: u64, length: usize) -> Result<(), String> {
        self.submit(IN, sector, None, length)
    }

    /// Waits for the next request, of those submitted, that the device is done with;
    /// returns the data read.
    ///
    /// # Errors
    /// See [`Queue::wait`]; or the request failed.
    pub fn complete(&mut self) -> Result<Vec<u8>, String> {
        let (mut chain, written) = self.queue.wait()?;
        let status = chain
            .writable
            .pop()
            .and_then(|status| status.first().copied());
        let data = chain.writable.pop().unwrap_or_default();
        if status != Some(STATUS_OK) || written != data.len() + 1 {
            let (name, wanted) = (self.name(), data.len() + 1);
            return Err(format!(
                "{name}: status {status:?}, {written} bytes written instead of {wanted}"
            ));
        }
        Ok(data)
    }

    /// Reads `length` bytes, a multiple of the sector size.
    ///
    /// # Errors
    /// See [`Disk::complete`].
    pub fn read(&mut self, sector: u64, length: usize) -> Result<Vec<u8>, String> {
        self.run(IN, sector, None, length)
    }

    /// Writes `data`, a multiple of the sector size.
    ///
    /// # Errors
    /// See [`Disk::complete`].
    pub fn write(&mut self, sector: u64, data: Vec<u8>) -> Result<(), String> {
        self.run(OUT, sector, Some(data), 0).map(drop)
    }

    /// Makes what was written last; nothing to do where the device has no cache.
    ///
    /// # Errors
    /// See [`Disk::complete`].
    pub fn flush(&mut self) -> Result<(), String> {
        if !self.transport.has(FEATURE_FLUSH) {
            return Ok(());
        }
        self.run(FLUSH, 0, None, 0).map(drop)
    }

    /// The device's name for itself.
    ///
    /// # Errors
    /// See [`Disk::complete`].
    pub fn id(&mut self) -> Result<String, String> {
        let mut id = self.run(GET_ID, 0, None, ID_LENGTH)?;
        id.truncate(id.iter().position(|byte| *byte == 0).unwrap_or(ID_LENGTH));
        Ok(String::from_utf8_lossy(&id).into_owned())
    }

    fn run(
        &mut self,
        kind: u32,
        sector: u64,
        data: Option<Vec<u8>>,
        length: usize,
    ) -> Result<Vec<u8>, String> {
        self.submit(kind, sector, data, length)
            .and_then(|()| self.complete())
            .map_err(|error| format!("{error} (request type {kind}, sector {sector})"))
    }

    fn submit(
        &mut self,
        kind: u32,
        sector: u64,
        data: Option<Vec<u8>>,
        length: usize,
    ) -> Result<(), String> {
        let mut header = vec![0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let mut chain = Chain {
            readable: vec![header],
            writable: Vec::new(),
        };
        chain.readable.extend(data);
        if length > 0 {
            chain.writable.push(vec![0; length]);
        }
        chain.writable.push(vec![NO_STATUS]);
        self.queue.submit(&mut self.transport, chain)
    }
}

//! virtio-blk from the driver's side (virtio 1.2 section 5.2.6).

use crate::queue::{Buffer, DriverQueue};
use crate::ram::Ram;

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// A request, ready for a queue: header, data, and a status byte of its own.
#[derive(Clone, Debug)]
pub struct Request {
    /// All its buffers.
    pub buffers: Vec<Buffer>,
    /// Guest-physical address of the status byte.
    pub status: u64,
}

/// The 16 bytes that a request begins with.
pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// One of the ranges of a discard or write-zeroes request.
pub fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(sectors.to_le_bytes());
    range.extend(flags.to_le_bytes());
    range
}

impl Request {
    /// A request of type `kind`.
    pub fn new(ram: &Ram, kind: u32, sector: u64, data: &[Buffer]) -> Self {
        // A status that no device writes, to detect that one is written.
        let status = ram.put(&[0xee]);
        let mut buffers = vec![Buffer::readable(ram.put(&header(kind, sector)), 16)];
        buffers.extend(data);
        buffers.push(Buffer::writable(status, 1));
        Request { buffers, status }
    }

    /// Submits the request and waits for it; returns the status byte.
    pub fn run(&self, ram: &Ram, queue: &mut DriverQueue) -> u32 {
        queue.run(&self.buffers);
        ram.get(self.status, 1)[0].into()
    }
}

/// Byte `at` of an image whose sectors all differ.
pub fn pattern(at: usize) -> u8 {
    (at / SECTOR * 7 + at % 251) as u8
}

/// `len` bytes of that image, from offset `from` on.
pub fn pattern_of(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(pattern).collect()
}

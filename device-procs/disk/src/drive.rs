//! The disk as all its queues share it.

use std::io;

use device_core::ConfigSpace;
use device_core::chain::Buffers;

use crate::image::{Extent, Image, SECTOR};
use crate::stats::Recorder;
use crate::{config, transfer};

/// What all queues share.
pub struct Drive {
    /// Where things are.
    pub image: Box<dyn Image>,
    /// Answer to GET_ID.
    pub serial: String,
    /// What the driver reads.
    pub config: ConfigSpace,
    /// One for each queue.
    pub recorders: Vec<Recorder>,
}

impl Drive {
    /// A disk before any driver.
    pub fn new(image: Box<dyn Image>, serial: String, queues: u16) -> Self {
        Drive {
            config: ConfigSpace::new(config::space(&image.geometry(), queues)),
            recorders: (0..queues).map(|_| Recorder::default()).collect(),
            image,
            serial,
        }
    }

    /// Makes the disk larger, or finds that it is, and tells the driver; returns its size
    /// in bytes.
    ///
    /// # Errors
    /// One line that says why not.
    pub fn grow(&self, capacity: Option<u64>) -> io::Result<u64> {
        let now = self.image.geometry().capacity;
        if capacity.is_some_and(|wanted| !wanted.is_multiple_of(SECTOR)) {
            return Err(io::Error::other("the size is no multiple of 512"));
        }
        self.image.grow(capacity.unwrap_or(now))?;
        let geometry = self.image.geometry();
        let space = config::space(&geometry, self.recorders.len() as u16);
        self.config.update(space);
        Ok(geometry.capacity)
    }

    /// Puts everything onto the medium.
    ///
    /// # Errors
    /// The medium's.
    pub fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(self.image.file())?)
    }

    /// Reads from `offset` on.
    ///
    /// # Errors
    /// The medium's.
    pub fn read(&self, mut offset: u64, mut buffers: Buffers<'_>) -> io::Result<()> {
        while !buffers.is_empty() {
            match self.image.map(offset, buffers.len() as u64)? {
                Extent::Data { offset: at, len } => {
                    transfer::read(self.image.file(), at, &take(&mut buffers, len)?)?;
                    offset += len;
                }
                Extent::Zero { len } => {
                    for slice in take(&mut buffers, len)?.slices() {
                        slice.copy_from(&vec![0u8; slice.len()]);
                    }
                    offset += len;
                }
                Extent::Special { len } => {
                    self.image.read(offset, &take(&mut buffers, len)?)?;
                    offset += len;
                }
            }
        }
        Ok(())
    }

    /// Writes from `offset` on.
    ///
    /// # Errors
    /// The medium's.
    pub fn write(&self, mut offset: u64, mut buffers: Buffers<'_>) -> io::Result<()> {
        while !buffers.is_empty() {
            match self.image.place(offset, buffers.len() as u64)? {
                Extent::Data { offset: at, len } => {
                    transfer::write(self.image.file(), at, &take(&mut buffers, len)?)?;
                    offset += len;
                }
                Extent::Zero { len } | Extent::Special { len } => {
                    self.image.write(offset, &take(&mut buffers, len)?)?;
                    offset += len;
                }
            }
        }
        Ok(())
    }
}

/// The next `len` bytes; an image that maps none or too many is broken.
fn take<'m>(buffers: &mut Buffers<'m>, len: u64) -> io::Result<Buffers<'m>> {
    usize::try_from(len)
        .ok()
        .filter(|&len| len > 0)
        .and_then(|len| buffers.take(len))
        .ok_or_else(|| io::Error::other("the image mapped a wrong length"))
}

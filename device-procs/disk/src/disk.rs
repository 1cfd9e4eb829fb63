//! A queue's worth of disk.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use device_core::{Context, Device};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};

use crate::drive::Drive;
use crate::request::{ID_SIZE, Operation, Range, Refusal, Request};
use crate::stats::Kind;

/// One worker's disk. Requests are complete when they are taken, so a stop has
/// nothing to wait for.
pub struct Disk {
    drive: Arc<Drive>,
    /// The driver does not flush, so writes must reach the medium by themselves
    /// (virtio 1.2 section 5.2.6.2).
    write_through: bool,
}

impl Disk {
    /// A disk before any driver.
    pub fn new(drive: Arc<Drive>) -> Self {
        Disk {
            drive,
            write_through: true,
        }
    }

    fn carry_out(&self, operation: Operation<'_>) -> io::Result<()> {
        let image = &self.drive.image;
        match operation {
            Operation::Read(offset, buffers) => self.drive.read(offset, buffers),
            Operation::Write(offset, buffers) => {
                self.drive.write(offset, buffers)?;
                self.settle()
            }
            Operation::Flush => Ok(rustix::fs::fdatasync(image.file())?),
            Operation::GetId(buffers) => {
                let mut id = [0; ID_SIZE];
                id[..self.drive.serial.len()].copy_from_slice(self.drive.serial.as_bytes());
                buffers.copy_from(&id);
                Ok(())
            }
            Operation::Discard(ranges) => ranges
                .iter()
                .filter(|range| range.len > 0)
                .try_for_each(|range| image.discard(range.offset, range.len)),
            Operation::WriteZeroes(ranges) => {
                for range in ranges.iter().filter(|range| range.len > 0) {
                    image.write_zeroes(range.offset, range.len, range.unmap)?;
                }
                self.settle()
            }
        }
    }

    fn settle(&self) -> io::Result<()> {
        if self.write_through {
            rustix::fs::fdatasync(self.drive.image.file())?;
        }
        Ok(())
    }
}

impl Device for Disk {
    fn negotiated(&mut self, features: u64) {
        self.write_through = features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
    }

    fn kicked(&mut self, queue: usize, cx: &mut Context<'_>) {
        let memory = cx.memory;
        let geometry = self.drive.image.geometry();
        let Some(ring) = cx.ring(queue) else { return };
        let Some(recorder) = self.drive.recorders.get(queue) else {
            return;
        };
        while let Some(chain) = ring.pop(memory) {
            let head = chain.head;
            let start = Instant::now();
            recorder.begun(1);
            let Some(request) = Request::parse(chain, &geometry) else {
                ring.complain(&format_args!(
                    "queue {queue}: request {head} has no status byte"
                ));
                ring.push(memory, head, 0);
                recorder.completed(Kind::Other, 0, false, start.elapsed());
                continue;
            };
            let (kind, bytes) = request.operation.as_ref().map_or((Kind::Other, 0), kind_of);
            let status = match request.operation.map(|operation| self.carry_out(operation)) {
                Ok(Ok(())) => VIRTIO_BLK_S_OK,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Unsupported => VIRTIO_BLK_S_UNSUPP,
                Ok(Err(error)) => {
                    ring.complain(&format_args!("queue {queue}: request {head}: {error}"));
                    VIRTIO_BLK_S_IOERR
                }
                Err(Refusal::Unsupported) => VIRTIO_BLK_S_UNSUPP,
                Err(Refusal::Invalid(why)) => {
                    ring.complain(&format_args!(
                        "queue {queue}: request {head} refused: {why}"
                    ));
                    VIRTIO_BLK_S_IOERR
                }
            };
            request.status.copy_from(&[status as u8]);
            // The status byte comes last, so all before it counts as written.
            ring.push(memory, head, written(request.data_len));
            recorder.completed(kind, bytes, status == VIRTIO_BLK_S_OK, start.elapsed());
        }
    }
}

/// Bytes that count as written: all before the status byte, and that.
fn written(data_len: usize) -> u32 {
    u32::try_from(data_len).map_or(u32::MAX, |len| len.saturating_add(1))
}

/// What it is, and of how many bytes.
fn kind_of(operation: &Operation<'_>) -> (Kind, u64) {
    let sum = |ranges: &[Range]| ranges.iter().map(|range| range.len).sum();
    match operation {
        Operation::Read(_, buffers) => (Kind::Read, buffers.len() as u64),
        Operation::Write(_, buffers) => (Kind::Write, buffers.len() as u64),
        Operation::Flush => (Kind::Flush, 0),
        Operation::Discard(ranges) => (Kind::Discard, sum(ranges)),
        Operation::WriteZeroes(ranges) => (Kind::WriteZeroes, sum(ranges)),
        Operation::GetId(_) => (Kind::Other, 0),
    }
}

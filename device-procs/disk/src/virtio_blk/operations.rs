//! What a request does to the image: at once where nothing has to wait, otherwise as
//! transfers of the [`IoEngine`](crate::io_engine::IoEngine).

use std::io;
use std::sync::Arc;

use device_vhost_user::Buffers;

use super::VirtioBlk;
use crate::block_backend::CacheMode;
use crate::bounce_buffer::BounceBuffer;
use crate::guest_iovec::GuestIovec;
use crate::image::Extent;
use crate::io_engine::{IoOp, IoPath, IoTransfer};
use crate::request::{BlockOperation, ID_SIZE};

/// The longest bounce buffer in bytes, a multiple of every block size. Longer transfers are
/// made in several parts.
const MAX_BOUNCE_BUFFER: usize = 1 << 20;
/// Page size. A write through the page cache that does not replace whole pages may have to
/// read the rest of a page from the disk first.
const PAGE_SIZE: u64 = 4096;

impl VirtioBlk {
    /// Does the operation of request `id`, or queues its transfers. Returns the result of
    /// what was done at once.
    pub(super) fn start_operation(
        &mut self,
        id: usize,
        operation: BlockOperation<'_>,
    ) -> io::Result<()> {
        let backend = Arc::clone(&self.backend);
        let durable = backend.is_write_through();
        match operation {
            BlockOperation::Read(offset, buffers) => self.read(id, offset, buffers),
            BlockOperation::Write(offset, buffers) => self.write(id, offset, buffers, durable),
            BlockOperation::Flush if backend.cache == CacheMode::Unsafe => Ok(()),
            BlockOperation::Flush => self.flush(id),
            BlockOperation::GetId(buffers) => {
                let mut serial = [0; ID_SIZE];
                serial[..backend.serial.len()].copy_from_slice(backend.serial.as_bytes());
                buffers.copy_from(&serial);
                Ok(())
            }
            BlockOperation::Discard(ranges) => ranges
                .iter()
                .filter(|range| range.len > 0)
                .try_for_each(|range| backend.image.discard(range.offset, range.len)),
            BlockOperation::WriteZeroes(ranges) => {
                for range in ranges.iter().filter(|range| range.len > 0) {
                    let image = &backend.image;
                    image.write_zeroes(range.offset, range.len, range.unmap)?;
                }
                if durable { self.flush(id) } else { Ok(()) }
            }
        }
    }

    fn read(&mut self, id: usize, mut offset: u64, mut buffers: Buffers<'_>) -> io::Result<()> {
        let backend = Arc::clone(&self.backend);
        while !buffers.is_empty() {
            let extent = backend.image.map_read(offset, buffers.len() as u64)?;
            let part = take_part(&mut buffers, &extent)?;
            let len = part.len() as u64;
            match extent {
                Extent::Data { offset, .. } => self.transfer(id, IoOp::Read, offset, part)?,
                Extent::Zero { .. } => fill_with_zeros(&part),
                Extent::Special { .. } => backend.image.read(offset, &part)?,
            }
            offset += len;
        }
        Ok(())
    }

    fn write(
        &mut self,
        id: usize,
        mut offset: u64,
        mut buffers: Buffers<'_>,
        durable: bool,
    ) -> io::Result<()> {
        let backend = Arc::clone(&self.backend);
        let op = IoOp::Write { durable };
        let mut must_flush = durable && backend.image.has_metadata();
        while !buffers.is_empty() {
            let extent = backend.image.map_write(offset, buffers.len() as u64)?;
            let part = take_part(&mut buffers, &extent)?;
            let len = part.len() as u64;
            match extent {
                Extent::Data { offset, .. } => self.transfer(id, op, offset, part)?,
                Extent::Zero { .. } | Extent::Special { .. } => {
                    backend.image.write(offset, &part)?;
                    must_flush |= durable;
                }
            }
            offset += len;
        }
        // The data are durable only once the tables that point to them are, even if another
        // request has changed those tables.
        if must_flush { self.flush(id) } else { Ok(()) }
    }

    fn flush(&mut self, id: usize) -> io::Result<()> {
        if self.engine.is_none() {
            return self.backend.flush();
        }
        self.queue_transfer(IoTransfer {
            request: id,
            op: IoOp::Flush,
            path: IoPath::Cached,
            offset: 0,
            memory: Vec::new(),
            bounce: None,
        })
    }

    /// Transfers `part` from or to `offset` of the image's file.
    fn transfer(&mut self, id: usize, op: IoOp, offset: u64, part: Buffers<'_>) -> io::Result<()> {
        let mut memory = std::mem::take(&mut self.spare);
        memory.clear();
        GuestIovec::append(&mut memory, &part);
        let backend = &*self.backend;
        if self.engine.is_none() {
            // SAFETY: `part` borrows the guest memory, so it is mapped.
            let result = unsafe { backend.transfer(op, offset, &mut memory) };
            self.spare = memory;
            return result;
        }
        let len = part.len() as u64;
        let direct = backend.direct.as_ref().filter(|it| it.takes(offset, len));
        let (path, done) = if let Some(direct) = direct {
            if direct.needs_bounce_buffer(&memory) {
                let align = direct.memory_align.max(512);
                self.spare = memory;
                return self.transfer_by_bounce_buffers(id, op, offset, part, align);
            }
            (IoPath::Direct, 0)
        } else {
            let whole_pages = (offset | len).is_multiple_of(PAGE_SIZE);
            // SAFETY: `part` borrows the guest memory, so it is mapped.
            let done =
                unsafe { backend.transfer_without_waiting(op, offset, &mut memory, whole_pages) }?;
            if done == len {
                self.spare = memory;
                return Ok(());
            }
            let left = GuestIovec::advance(&mut memory, 0).len();
            memory.drain(..memory.len() - left);
            (IoPath::Cached, done)
        };
        self.queue_transfer(IoTransfer {
            request: id,
            op,
            path,
            offset: offset + done,
            memory,
            bounce: None,
        })
    }

    /// Transfers `rest` with direct I/O, by buffers of the alignment `align`.
    fn transfer_by_bounce_buffers(
        &mut self,
        id: usize,
        op: IoOp,
        mut offset: u64,
        mut rest: Buffers<'_>,
        align: usize,
    ) -> io::Result<()> {
        while let Some(part) = rest.take(rest.len().min(MAX_BOUNCE_BUFFER))
            && !part.is_empty()
        {
            let mut memory = Vec::new();
            GuestIovec::append(&mut memory, &part);
            let mut bounce = BounceBuffer::new(part.len(), align)?;
            if matches!(op, IoOp::Write { .. }) {
                // SAFETY: `part` borrows the guest memory, so it is mapped.
                unsafe { bounce.copy_from_guest(&memory) };
            }
            self.queue_transfer(IoTransfer {
                request: id,
                op,
                path: IoPath::Direct,
                offset,
                memory,
                bounce: Some(bounce),
            })?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Queues `transfer`, after waiting until the engine has room for it.
    fn queue_transfer(&mut self, transfer: IoTransfer) -> io::Result<()> {
        let id = transfer.request;
        while let Some(engine) = &mut self.engine
            && engine.is_full()
        {
            engine.wait()?;
            self.take_results();
        }
        let Some(engine) = &mut self.engine else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        engine.queue(transfer)?;
        self.requests.transfer_started(id);
        Ok(())
    }
}

/// Takes the part of `buffers` that lies in `extent`.
fn take_part<'a>(buffers: &mut Buffers<'a>, extent: &Extent) -> io::Result<Buffers<'a>> {
    buffers
        .take(extent.len() as usize)
        .filter(|part| !part.is_empty())
        .ok_or_else(|| io::Error::other("the image mapped an invalid length"))
}

fn fill_with_zeros(buffers: &Buffers<'_>) {
    const ZEROS: [u8; 4096] = [0; 4096];
    for slice in buffers.slices() {
        let mut at = 0;
        while let Ok(rest) = slice.offset(at)
            && !rest.is_empty()
        {
            let len = rest.len().min(ZEROS.len());
            rest.copy_from(&ZEROS[..len]);
            at += len;
        }
    }
}

//! One virtio-blk request (virtio 1.2 section 5.2.6): understood and checked
//! here, before anything touches the image.

use device_vhost_user::Buffers;
use device_vhost_user::DescriptorChain;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::config::{MAX_RANGE_SECTORS, MAX_RANGES};
use crate::image::{Geometry, SECTOR};
use crate::stats::RequestKind;

/// Length of the answer to GET_ID in bytes.
pub const ID_SIZE: usize = 20;
const HEADER: usize = 16;
const RANGE: usize = 16;

/// What the guest asks, with all addresses in bytes and within the disk.
pub enum BlockOperation<'m> {
    /// Read into these buffers.
    Read(u64, Buffers<'m>),
    /// Write these buffers.
    Write(u64, Buffers<'m>),
    /// Put everything onto the medium.
    Flush,
    /// Answer with the serial number.
    GetId(Buffers<'m>),
    /// Give ranges back.
    Discard(Vec<Range>),
    /// Zero ranges.
    WriteZeroes(Vec<Range>),
}

/// A range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// The range may be given back.
    pub unmap: bool,
}

/// Why a request cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// Answered with VIRTIO_BLK_S_IOERR.
    Invalid(&'static str),
    /// Answered with VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

/// A request and where its status byte goes.
pub struct BlockRequest<'m> {
    /// What is asked, also where it is refused.
    pub kind: RequestKind,
    /// Bytes of the disk that it is about.
    pub bytes: u64,
    /// The last writable byte.
    pub status: Buffers<'m>,
    /// Writable bytes before it.
    pub data_len: usize,
    /// What to do.
    pub operation: Result<BlockOperation<'m>, RequestError>,
}

impl<'m> BlockRequest<'m> {
    /// Takes `chain` apart; header, data and status may be split over
    /// descriptors in any way. `None` when there is no status byte: such a
    /// request cannot even be refused.
    pub fn parse(chain: DescriptorChain<'m>, disk: &Geometry) -> Option<Self> {
        let DescriptorChain {
            readable,
            mut writable,
            ..
        } = chain;
        let status = writable.take_back(1)?;
        let data_len = writable.len();
        let (kind, operation) = operation(readable, writable, disk);
        Some(BlockRequest {
            kind,
            bytes: operation.as_ref().map_or(0, BlockOperation::bytes),
            status,
            data_len,
            operation,
        })
    }
}

impl BlockOperation<'_> {
    /// Bytes of the disk that it is about.
    fn bytes(&self) -> u64 {
        match self {
            BlockOperation::Read(_, buffers) | BlockOperation::Write(_, buffers) => {
                buffers.len() as u64
            }
            BlockOperation::Discard(ranges) | BlockOperation::WriteZeroes(ranges) => {
                ranges.iter().map(|range| range.len).sum()
            }
            BlockOperation::Flush | BlockOperation::GetId(_) => 0,
        }
    }
}

fn operation<'m>(
    mut readable: Buffers<'m>,
    writable: Buffers<'m>,
    disk: &Geometry,
) -> (RequestKind, Result<BlockOperation<'m>, RequestError>) {
    let mut header = [0; HEADER];
    let Some(front) = readable.take(HEADER) else {
        return (
            RequestKind::Other,
            Err(RequestError::Invalid("its header is too short")),
        );
    };
    front.copy_to(&mut header);
    let number = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let kind = match number {
        VIRTIO_BLK_T_IN => RequestKind::Read,
        VIRTIO_BLK_T_OUT => RequestKind::Write,
        VIRTIO_BLK_T_FLUSH => RequestKind::Flush,
        VIRTIO_BLK_T_DISCARD => RequestKind::Discard,
        VIRTIO_BLK_T_WRITE_ZEROES => RequestKind::WriteZeroes,
        _ => RequestKind::Other,
    };
    let sector = word64(&header[8..]);
    (kind, understand(number, sector, readable, writable, disk))
}

fn understand<'m>(
    number: u32,
    sector: u64,
    readable: Buffers<'m>,
    writable: Buffers<'m>,
    disk: &Geometry,
) -> Result<BlockOperation<'m>, RequestError> {
    match number {
        VIRTIO_BLK_T_IN => Ok(BlockOperation::Read(
            transfer(sector, writable.len(), disk)?,
            writable,
        )),
        VIRTIO_BLK_T_OUT => {
            writable_disk(disk)?;
            let offset = transfer(sector, readable.len(), disk)?;
            Ok(BlockOperation::Write(offset, readable))
        }
        VIRTIO_BLK_T_FLUSH => Ok(BlockOperation::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(BlockOperation::GetId(writable)),
        VIRTIO_BLK_T_DISCARD => {
            writable_disk(disk)?;
            Ok(BlockOperation::Discard(ranges(&readable, disk, 0)?))
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            writable_disk(disk)?;
            let known = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            Ok(BlockOperation::WriteZeroes(ranges(&readable, disk, known)?))
        }
        _ => Err(RequestError::Unsupported),
    }
}

fn word64(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(word)
}

fn writable_disk(disk: &Geometry) -> Result<(), RequestError> {
    if disk.read_only {
        return Err(RequestError::Invalid("the disk is read-only"));
    }
    Ok(())
}

/// The offset in bytes of `len` bytes at `sector`.
fn transfer(sector: u64, len: usize, disk: &Geometry) -> Result<u64, RequestError> {
    let len = len as u64;
    if !len.is_multiple_of(SECTOR) {
        return Err(RequestError::Invalid("its length is no multiple of 512"));
    }
    let block = u64::from(disk.logical_block).max(SECTOR);
    if !(len | sector.wrapping_mul(SECTOR)).is_multiple_of(block) {
        return Err(RequestError::Invalid("it is not made of whole blocks"));
    }
    span(sector, len / SECTOR, disk).map(|(offset, _)| offset)
}

fn span(sector: u64, count: u64, disk: &Geometry) -> Result<(u64, u64), RequestError> {
    match sector.checked_add(count) {
        Some(end) if end <= disk.sectors() => Ok((sector * SECTOR, count * SECTOR)),
        _ => Err(RequestError::Invalid(
            "it reaches beyond the end of the disk",
        )),
    }
}

fn ranges(
    data: &Buffers<'_>,
    disk: &Geometry,
    known_flags: u32,
) -> Result<Vec<Range>, RequestError> {
    let len = data.len();
    if len == 0 || !len.is_multiple_of(RANGE) || len / RANGE > MAX_RANGES as usize {
        return Err(RequestError::Invalid(
            "its list of ranges has a wrong length",
        ));
    }
    let mut bytes = vec![0; len];
    data.copy_to(&mut bytes);
    bytes
        .chunks_exact(RANGE)
        .map(|range| {
            let last = word64(&range[8..]);
            let (count, flags) = (last as u32, (last >> 32) as u32);
            if flags & !known_flags != 0 {
                return Err(RequestError::Unsupported);
            }
            if count > MAX_RANGE_SECTORS {
                return Err(RequestError::Invalid("one of its ranges is too long"));
            }
            let (offset, len) = span(word64(range), count.into(), disk)?;
            Ok(Range {
                offset,
                len,
                unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            })
        })
        .collect()
}

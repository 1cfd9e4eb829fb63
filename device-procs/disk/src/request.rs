//! One virtio-blk request (virtio 1.2 section 5.2.6), decoded and checked before anything
//! touches the image.

use device_vhost_user::{Buffers, DescriptorChain};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::config::{MAX_RANGE_SECTORS, MAX_RANGES};
use crate::image::{Geometry, SECTOR};
use crate::stats::RequestKind;

/// Length of the answer to GET_ID in bytes.
pub const ID_SIZE: usize = 20;
/// Length of the header: type (32 bits), reserved (32 bits), sector (64 bits).
const HEADER_SIZE: usize = 16;
/// Length of a range of a discard or write-zeroes request: sector (64 bits), number of
/// sectors (32 bits), flags (32 bits).
const RANGE_SIZE: usize = 16;

/// What the guest asks for. All offsets are in bytes and within the disk.
pub enum BlockOperation<'m> {
    /// Reads from this offset into these buffers.
    Read(u64, Buffers<'m>),
    /// Writes these buffers to this offset.
    Write(u64, Buffers<'m>),
    /// Puts all completed writes onto the disk.
    Flush,
    /// Answers with the serial number.
    GetId(Buffers<'m>),
    /// Deallocates ranges.
    Discard(Vec<Range>),
    /// Zeroes ranges.
    WriteZeroes(Vec<Range>),
}

/// A range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Whether the range may be deallocated.
    pub unmap: bool,
}

/// Why a request cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// The request is invalid, for this reason: VIRTIO_BLK_S_IOERR.
    Invalid(&'static str),
    /// The operation is not supported: VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

/// A request.
pub struct BlockRequest<'m> {
    /// What is asked for, even if the request is invalid.
    pub kind: RequestKind,
    /// Bytes of the disk that it is about.
    pub bytes: u64,
    /// The status byte: the last writable byte.
    pub status: Buffers<'m>,
    /// Number of writable bytes before it.
    pub data_len: usize,
    /// What to do.
    pub operation: Result<BlockOperation<'m>, RequestError>,
}

impl<'m> BlockRequest<'m> {
    /// Decodes `chain`. The guest may split header, data and status over descriptors in any
    /// way. `None` when there is no status byte, without which no error can be reported.
    pub fn parse(chain: DescriptorChain<'m>, disk: &Geometry) -> Option<Self> {
        let DescriptorChain {
            mut readable,
            mut writable,
            ..
        } = chain;
        let status = writable.take_back(1)?;
        let data_len = writable.len();
        let (kind, operation) = match readable.take(HEADER_SIZE) {
            Some(header) => {
                let mut bytes = [0; HEADER_SIZE];
                header.copy_to(&mut bytes);
                BlockOperation::parse(&bytes, readable, writable, disk)
            }
            None => {
                let why = "its header is too short";
                (RequestKind::Other, Err(RequestError::Invalid(why)))
            }
        };
        let bytes = match &operation {
            Ok(BlockOperation::Read(_, buffers) | BlockOperation::Write(_, buffers)) => {
                buffers.len() as u64
            }
            Ok(BlockOperation::Discard(ranges) | BlockOperation::WriteZeroes(ranges)) => {
                ranges.iter().map(|range| range.len).sum()
            }
            Ok(BlockOperation::Flush | BlockOperation::GetId(_)) | Err(_) => 0,
        };
        Some(BlockRequest {
            kind,
            bytes,
            status,
            data_len,
            operation,
        })
    }
}

impl<'m> BlockOperation<'m> {
    /// Decodes the header and checks the rest of the request.
    fn parse(
        header: &[u8; HEADER_SIZE],
        readable: Buffers<'m>,
        writable: Buffers<'m>,
        disk: &Geometry,
    ) -> (RequestKind, Result<Self, RequestError>) {
        let [a, b, c, d, _, _, _, _, sector @ ..] = *header;
        let sector = u64::from_le_bytes(sector);
        let block = disk.logical_block.max(SECTOR as u32);
        let writes = |operation: Result<Self, RequestError>| match disk.read_only {
            true => Err(RequestError::Invalid("the disk is read-only")),
            false => operation,
        };
        match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => {
                let offset = check_range(sector, writable.len() as u64, block, disk);
                let operation = offset.map(|offset| BlockOperation::Read(offset, writable));
                (RequestKind::Read, operation)
            }
            VIRTIO_BLK_T_OUT => {
                let offset = check_range(sector, readable.len() as u64, block, disk);
                let operation = offset.map(|offset| BlockOperation::Write(offset, readable));
                (RequestKind::Write, writes(operation))
            }
            VIRTIO_BLK_T_FLUSH => (RequestKind::Flush, Ok(BlockOperation::Flush)),
            VIRTIO_BLK_T_GET_ID => (RequestKind::Other, Ok(BlockOperation::GetId(writable))),
            VIRTIO_BLK_T_DISCARD => {
                let ranges = parse_ranges(&readable, disk, 0);
                let operation = ranges.map(BlockOperation::Discard);
                (RequestKind::Discard, writes(operation))
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                let ranges = parse_ranges(&readable, disk, flags);
                let operation = ranges.map(BlockOperation::WriteZeroes);
                (RequestKind::WriteZeroes, writes(operation))
            }
            _ => (RequestKind::Other, Err(RequestError::Unsupported)),
        }
    }
}

/// Checks that `len` bytes from `sector` on are on the disk and begin and end at multiples of
/// `block` bytes; returns their offset in bytes.
fn check_range(sector: u64, len: u64, block: u32, disk: &Geometry) -> Result<u64, RequestError> {
    if !len.is_multiple_of(SECTOR) {
        return Err(RequestError::Invalid("its length is not a multiple of 512"));
    }
    if !(len | sector.wrapping_mul(SECTOR)).is_multiple_of(block.into()) {
        return Err(RequestError::Invalid("it is not made of whole blocks"));
    }
    match sector.checked_add(len / SECTOR) {
        Some(end) if end <= disk.sectors() => Ok(sector * SECTOR),
        _ => Err(RequestError::Invalid(
            "it reaches beyond the end of the disk",
        )),
    }
}

fn parse_ranges(
    data: &Buffers<'_>,
    disk: &Geometry,
    known_flags: u32,
) -> Result<Vec<Range>, RequestError> {
    let len = data.len();
    if len == 0 || !len.is_multiple_of(RANGE_SIZE) || len / RANGE_SIZE > MAX_RANGES as usize {
        let why = "its list of ranges has an invalid length";
        return Err(RequestError::Invalid(why));
    }
    let mut bytes = vec![0; len];
    data.copy_to(&mut bytes);
    let parse = |range: &[u8; RANGE_SIZE]| {
        let [sector @ .., a, b, c, d, e, f, g, h] = *range;
        let count = u32::from_le_bytes([a, b, c, d]);
        let flags = u32::from_le_bytes([e, f, g, h]);
        if flags & !known_flags != 0 {
            return Err(RequestError::Unsupported);
        }
        if count > MAX_RANGE_SECTORS {
            return Err(RequestError::Invalid("one of its ranges is too long"));
        }
        let (sector, len) = (u64::from_le_bytes(sector), u64::from(count) * SECTOR);
        Ok(Range {
            offset: check_range(sector, len, SECTOR as u32, disk)?,
            len,
            unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
        })
    };
    bytes.as_chunks().0.iter().map(parse).collect()
}

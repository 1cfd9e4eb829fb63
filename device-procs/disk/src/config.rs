//! What the driver reads about the disk: features and configuration space (virtio 1.2
//! sections 5.2.3 and 5.2.4).

use std::mem::offset_of;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use crate::image::{Geometry, SECTOR};

// The limits are those of qemu-storage-daemon (QEMU, block/export/virtio-blk-handler.c and
// vhost-user-blk-server.c), so that either can replace the other while a driver that knows
// the limits runs.

/// `seg_max`: a ring of 128 entries has room for these buffers, a header and a status byte.
const SEG_MAX: u32 = 126;
/// `size_max`, in bytes: so large that it does not matter. (qemu-storage-daemon has 0, which
/// is no limit either.)
const SIZE_MAX: u32 = 1 << 30;
/// The most ranges in one discard or write-zeroes request.
pub const MAX_RANGES: u32 = 1;
/// The most sectors in one such range: 16 MiB.
pub const MAX_RANGE_SECTORS: u32 = 32_768;

/// Offset of the one field that the driver may write.
pub const WRITEBACK_OFFSET: u32 = offset_of!(VirtioBlkConfig, writeback) as u32;

/// `struct virtio_blk_config` up to the fields of the features that we offer.
#[derive(IntoBytes, Immutable, Default)]
#[repr(C)]
struct VirtioBlkConfig {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    /// Cylinders, heads and sectors: not offered.
    geometry: [u8; 4],
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// The device's feature bits.
pub fn features(geometry: &Geometry, queues: u16) -> u64 {
    let mut bits = vec![
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
    ];
    if geometry.read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.push(VIRTIO_BLK_F_WRITE_ZEROES);
        if geometry.discard.is_some() {
            bits.push(VIRTIO_BLK_F_DISCARD);
        }
    }
    if queues > 1 {
        bits.push(VIRTIO_BLK_F_MQ);
    }
    bits.iter().fold(0, |all, bit| all | 1 << bit)
}

/// The bytes of the configuration space.
pub fn space(geometry: &Geometry, queues: u16, writeback: bool) -> Vec<u8> {
    let block = geometry.logical_block.max(SECTOR as u32);
    let physical_block = geometry.physical_block.max(block);
    let config = VirtioBlkConfig {
        capacity: geometry.sectors().into(),
        size_max: SIZE_MAX.into(),
        seg_max: SEG_MAX.into(),
        blk_size: block.into(),
        physical_block_exp: (physical_block / block).ilog2() as u8,
        min_io_size: 1.into(), // in blocks, as is opt_io_size
        opt_io_size: (geometry.optimal_io / block).into(),
        writeback: writeback.into(),
        num_queues: queues.into(),
        max_discard_sectors: MAX_RANGE_SECTORS.into(),
        max_discard_seg: MAX_RANGES.into(),
        discard_sector_alignment: (geometry.discard.unwrap_or(0) / SECTOR as u32).into(),
        max_write_zeroes_sectors: MAX_RANGE_SECTORS.into(),
        max_write_zeroes_seg: MAX_RANGES.into(),
        write_zeroes_may_unmap: geometry.discard.is_some().into(),
        ..VirtioBlkConfig::default()
    };
    config.as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        capacity: 1 << 20,
        read_only: false,
        logical_block: 512,
        physical_block: 4096,
        optimal_io: 0,
        discard: Some(4096),
    };

    #[test]
    fn the_space_has_the_layout_of_the_specification() {
        let space = space(&GEOMETRY, 4, true);
        assert_eq!(space.len(), 60);
        assert_eq!(space[0..8], 2048u64.to_le_bytes());
        assert_eq!(space[12..16], 126u32.to_le_bytes()); // seg_max
        assert_eq!(space[20..24], 512u32.to_le_bytes()); // blk_size
        assert_eq!(space[24], 3); // physical_block_exp
        assert_eq!(WRITEBACK_OFFSET, 32);
        assert_eq!(space[32], 1);
        assert_eq!(space[34..36], 4u16.to_le_bytes()); // num_queues
        assert_eq!(space[44..48], 8u32.to_le_bytes()); // discard_sector_alignment
        assert_eq!(space[56], 1); // write_zeroes_may_unmap
    }

    #[test]
    fn a_read_only_disk_offers_no_writes() {
        let read_only = Geometry {
            read_only: true,
            discard: None,
            ..GEOMETRY
        };
        let bits = features(&read_only, 1);
        assert_ne!(bits & 1 << VIRTIO_BLK_F_RO, 0);
        for bit in [
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
            VIRTIO_BLK_F_MQ,
        ] {
            assert_eq!(bits & 1 << bit, 0);
        }
    }
}

//! What the driver is told about the disk: features and configuration space
//! (virtio 1.2 sections 5.2.3 and 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::image::{Geometry, SECTOR};

// The limits are those of qemu-storage-daemon (QEMU, block/export/virtio-blk-handler.c
// and vhost-user-blk-server.c), so that either can take over from the other while a
// driver that knows the limits runs.

/// Buffers of one request: as many as a ring of 128 entries has room for, besides a
/// header and a status byte.
const MAX_SEGMENTS: u32 = 126;
/// Length of one buffer in bytes: no limit that anybody would notice. (The process that
/// offers none, 0, means the same.)
const MAX_SEGMENT: u32 = 1 << 30;
/// Offset of the field `writeback`, the one that the driver may write.
pub const WRITEBACK: u32 = 32;
/// Ranges in one discard or write-zeroes request.
pub const MAX_RANGES: u32 = 1;
/// Sectors in one such range: 16 MiB.
pub const MAX_RANGE_SECTORS: u32 = 32_768;

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

/// The bytes of `struct virtio_blk_config`.
pub fn space(geometry: &Geometry, queues: u16, writeback: bool) -> Vec<u8> {
    let block = geometry.logical_block.max(SECTOR as u32);
    let blocks = |bytes: u32| bytes / block;
    let physical_exp = blocks(geometry.physical_block.max(block)).ilog2() as u8;
    let discard_sectors = geometry.discard.map_or(0, |bytes| bytes / SECTOR as u32);

    let mut space = Vec::with_capacity(60);
    space.extend(geometry.sectors().to_le_bytes());
    space.extend(MAX_SEGMENT.to_le_bytes()); // size_max
    space.extend(MAX_SEGMENTS.to_le_bytes());
    space.extend([0; 4]); // CHS geometry: not offered
    space.extend(block.to_le_bytes());
    space.push(physical_exp);
    space.push(0); // alignment_offset
    space.extend(1u16.to_le_bytes()); // min_io_size, in blocks
    space.extend(blocks(geometry.optimal_io).to_le_bytes());
    space.push(u8::from(writeback));
    space.push(0);
    space.extend(queues.to_le_bytes());
    space.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
    space.extend(MAX_RANGES.to_le_bytes()); // max_discard_seg
    space.extend(discard_sectors.to_le_bytes()); // discard_sector_alignment
    space.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    space.extend(MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
    space.push(u8::from(geometry.discard.is_some())); // write_zeroes_may_unmap
    space.extend([0; 3]);
    space
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
        assert_eq!(space[WRITEBACK as usize], 1);
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

//! The in-flight table of a back end (vhost-user, "Inflight I/O tracking"). The back end
//! creates it and writes to it. The runner keeps it for the back end's successor, and
//! reads it only to report how many requests that resubmits.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vhost::vhost_user::message::VhostUserInflight;

use crate::Error;

/// Length of `QueueRegionSplit` before its entries (features, version, desc_num,
/// last_batch_head, used_idx), in bytes.
const HEADER_LENGTH: usize = 16;
/// Offsets in it.
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
/// Length of a `DescStateSplit` in bytes.
const ENTRY_LENGTH: usize = 16;
/// Offsets in it.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;

/// Largest table that is read: enough for 256 queues of 1024 entries.
const MAX_LENGTH: u64 = 8 << 20;

/// An in-flight table.
pub struct InflightTableFile {
    /// Its layout, as GET_INFLIGHT_FD returned it.
    pub layout: VhostUserInflight,
    /// Its memory. It is never mapped here: the back end could truncate it.
    pub file: File,
}

impl InflightTableFile {
    /// A second descriptor of the same table.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub fn try_clone(&self) -> Result<Self, Error> {
        Ok(InflightTableFile {
            layout: self.layout,
            file: self
                .file
                .try_clone()
                .map_err(Error::io("duplicating a descriptor"))?,
        })
    }

    /// How many requests of queue `index` are in flight; `used` is the index in the used
    /// ring. 0 when the table is malformed.
    pub fn count(&self, index: usize, used: u16) -> u64 {
        self.read_region(index)
            .map_or(0, |region| count(&region, used) as u64)
    }

    /// Makes the region of queue `index` look as if the queue had never been used.
    ///
    /// # Errors
    /// When the table cannot be written.
    pub fn clear_queue(&self, index: usize) -> io::Result<()> {
        match self.region(index) {
            Some((start, length)) => self.file.write_all_at(&vec![0; length], start),
            None => Ok(()),
        }
    }

    /// Offset and length of the region of queue `index`.
    fn region(&self, index: usize) -> Option<(u64, usize)> {
        let queues = u64::from(self.layout.num_queues);
        let length = self.layout.mmap_size.checked_div(queues)?;
        if self.layout.mmap_size > MAX_LENGTH || index as u64 >= queues {
            return None;
        }
        let start = self.layout.mmap_offset.checked_add(length * index as u64)?;
        Some((start, length as usize))
    }

    fn read_region(&self, index: usize) -> Option<Vec<u8>> {
        let (start, length) = self.region(index)?;
        let mut region = vec![0; length];
        self.file.read_exact_at(&mut region, start).ok()?;
        Some(region)
    }
}

fn read_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Counts the entries of a queue's region that are marked, without the last batch: the
/// back end stores the used index before it clears the marks of a batch.
fn count(region: &[u8], used: u16) -> usize {
    if region.len() < HEADER_LENGTH {
        return 0;
    }
    let room = (region.len() - HEADER_LENGTH) / ENTRY_LENGTH;
    let entries = usize::from(read_u16(region, DESC_NUM)).min(room);
    let offset = |entry: usize| HEADER_LENGTH + entry * ENTRY_LENGTH;
    let mut marked: Vec<bool> = (0..entries)
        .map(|entry| region[offset(entry) + INFLIGHT] != 0)
        .collect();
    let published = used.wrapping_sub(read_u16(region, USED_IDX));
    let mut entry = usize::from(read_u16(region, LAST_BATCH_HEAD));
    for _ in 0..usize::from(published).min(entries) {
        let Some(mark) = marked.get_mut(entry) else {
            break;
        };
        *mark = false;
        entry = usize::from(read_u16(region, offset(entry) + NEXT));
    }
    marked.iter().filter(|&&mark| mark).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(marked: &[usize], used_idx: u16, head: u16, next: &[(usize, u16)]) -> Vec<u8> {
        let mut region = vec![0; HEADER_LENGTH + 8 * ENTRY_LENGTH];
        region[DESC_NUM] = 8;
        region[LAST_BATCH_HEAD..][..2].copy_from_slice(&head.to_le_bytes());
        region[USED_IDX..][..2].copy_from_slice(&used_idx.to_le_bytes());
        for &entry in marked {
            region[HEADER_LENGTH + entry * ENTRY_LENGTH] = 1;
        }
        for &(entry, next) in next {
            let at = HEADER_LENGTH + entry * ENTRY_LENGTH + NEXT;
            region[at..at + 2].copy_from_slice(&next.to_le_bytes());
        }
        region
    }

    #[test]
    fn the_last_published_batch_is_not_counted() {
        assert_eq!(count(&region(&[1, 2, 5], 7, 0, &[]), 7), 3);
        // 5 and 2 were published: the used index is two ahead of `used_idx`.
        let table = region(&[1, 2, 5], 7, 5, &[(5, 2)]);
        assert_eq!(count(&table, 9), 1);
    }

    #[test]
    fn a_malformed_region_does_no_harm() {
        assert_eq!(count(&[], 3), 0);
        assert_eq!(count(&[0xff; HEADER_LENGTH], 3), 0);
        assert_eq!(count(&[0xff; HEADER_LENGTH + ENTRY_LENGTH], 3), 1);
        // A list with a loop.
        let table = region(&[3, 4], 0, 3, &[(3, 3)]);
        assert_eq!(count(&table, 0x8000), 1);
    }
}

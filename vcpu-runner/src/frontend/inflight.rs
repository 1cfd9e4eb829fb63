//! The table of what a device's process has in work (vhost-user, "Inflight I/O
//! tracking"). The process makes it and writes to it; the runner keeps it for the
//! process's successor, and looks into it only to say how much that has to do again.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vhost::vhost_user::message::VhostUserInflight;

use crate::Error;

/// Length of `QueueRegionSplit` before its entries, and of an entry, in bytes.
const HEADER: usize = 16;
const ENTRY: usize = 16;
/// Largest table that is read: 256 queues of 1024 entries.
const LONGEST: u64 = 8 << 20;

/// A table.
pub struct Inflight {
    /// Its shape, as GET_INFLIGHT_FD told it.
    pub shape: VhostUserInflight,
    /// Its memory. Never mapped here: who can write to it can also truncate it.
    pub file: File,
}

impl Inflight {
    /// The same table once more.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn try_clone(&self) -> Result<Self, Error> {
        Ok(Inflight {
            shape: self.shape,
            file: self
                .file
                .try_clone()
                .map_err(Error::io("duplicating a descriptor"))?,
        })
    }

    /// Requests of queue `index` that were taken and not completed when the process
    /// died; `used` is the index in the used ring. 0 when the table makes no sense.
    pub fn count(&self, index: usize, used: u16) -> u64 {
        self.region(index)
            .map_or(0, |region| count(&region, used) as u64)
    }

    /// Nothing is in flight in queue `index`, which is as if it had never been used.
    pub fn forget(&self, index: usize) {
        if let Some((start, length)) = self.place(index)
            && let Err(error) = self.file.write_all_at(&vec![0; length], start)
        {
            tracing::warn!("queue {index}: inflight table: {error}");
        }
    }

    /// Where the region of queue `index` is: offset and length.
    fn place(&self, index: usize) -> Option<(u64, usize)> {
        let queues = u64::from(self.shape.num_queues);
        let length = self.shape.mmap_size.checked_div(queues)?;
        if self.shape.mmap_size > LONGEST || index as u64 >= queues {
            return None;
        }
        let start = self.shape.mmap_offset.checked_add(length * index as u64)?;
        Some((start, length as usize))
    }

    fn region(&self, index: usize) -> Option<Vec<u8>> {
        let (start, length) = self.place(index)?;
        let mut region = vec![0; length];
        self.file.read_exact_at(&mut region, start).ok()?;
        Some(region)
    }
}

fn half(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

/// Counts what is marked in a queue's region, less the last batch, which was
/// published before its marks were taken away.
fn count(region: &[u8], used: u16) -> usize {
    if region.len() < HEADER {
        return 0;
    }
    let entries = half(region, 10).min((region.len() - HEADER) / ENTRY);
    let at = |entry: usize| HEADER + entry * ENTRY;
    let mut marked: Vec<bool> = (0..entries).map(|entry| region[at(entry)] != 0).collect();
    let recorded = half(region, 14) as u16;
    let mut entry = half(region, 12);
    for _ in 0..usize::from(used.wrapping_sub(recorded)).min(entries) {
        let Some(mark) = marked.get_mut(entry) else {
            break;
        };
        *mark = false;
        entry = half(region, at(entry) + 6);
    }
    marked.iter().filter(|&&mark| mark).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(marked: &[usize], recorded: u16, last: u16, next: &[(usize, u16)]) -> Vec<u8> {
        let mut region = vec![0; HEADER + 8 * ENTRY];
        region[10] = 8;
        region[12..14].copy_from_slice(&last.to_le_bytes());
        region[14..16].copy_from_slice(&recorded.to_le_bytes());
        for &entry in marked {
            region[HEADER + entry * ENTRY] = 1;
        }
        for &(entry, next) in next {
            let at = HEADER + entry * ENTRY + 6;
            region[at..at + 2].copy_from_slice(&next.to_le_bytes());
        }
        region
    }

    #[test]
    fn the_last_batch_does_not_count() {
        assert_eq!(count(&region(&[1, 2, 5], 7, 0, &[]), 7), 3);
        // 5 and 2 were published: the used index is two ahead of the table's.
        let table = region(&[1, 2, 5], 7, 5, &[(5, 2)]);
        assert_eq!(count(&table, 9), 1);
    }

    #[test]
    fn nonsense_is_survived() {
        assert_eq!(count(&[], 3), 0);
        assert_eq!(count(&[0xff; HEADER], 3), 0);
        assert_eq!(count(&[0xff; HEADER + ENTRY], 3), 1);
        // A list that goes round.
        let table = region(&[3, 4], 0, 3, &[(3, 3)]);
        assert_eq!(count(&table, 0x8000), 1);
    }
}

//! A cache of the mapping from clusters of the disk to clusters of the file (L2 entries). A
//! lookup must cost little, for every request begins with one.

use std::sync::atomic::{AtomicU64, Ordering};

/// The most entries: 1 MiB of memory, for 8 GiB of disk in clusters of 64 KiB.
const MAX_ENTRIES: u64 = 1 << 17;
/// Bits of a cluster number in the file. Larger numbers are not cached.
const HOST_BITS: u32 = 40;

/// A direct-mapped cache. An entry holds the cluster number in the file in its lower bits and,
/// above, the tag: the cluster number on the disk without the bits that select the entry. 0
/// is an empty entry, for the first cluster of the file is the header.
pub struct MappingCache {
    cluster_bits: u32,
    index_bits: u32,
    entries: Box<[AtomicU64]>,
}

impl MappingCache {
    /// A cache for a disk of `capacity` bytes in clusters of `1 << cluster_bits` bytes.
    pub fn new(cluster_bits: u32, capacity: u64) -> Self {
        let clusters = (capacity >> cluster_bits) + 1;
        let entries = clusters.next_power_of_two().min(MAX_ENTRIES);
        MappingCache {
            cluster_bits,
            index_bits: entries.ilog2(),
            entries: (0..entries).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// The entry of `cluster`, and its tag in the upper bits. `None` if the tag is too large.
    fn entry(&self, cluster: u64) -> Option<(&AtomicU64, u64)> {
        let tag = cluster >> self.index_bits;
        let entry = self
            .entries
            .get((cluster & ((1 << self.index_bits) - 1)) as usize)?;
        (tag < 1 << (64 - HOST_BITS)).then_some((entry, tag << HOST_BITS))
    }

    fn get(&self, cluster: u64) -> Option<u64> {
        let (entry, tag) = self.entry(cluster)?;
        let host = entry.load(Ordering::Acquire) ^ tag;
        (host != 0 && host < 1 << HOST_BITS).then_some(host)
    }

    /// Returns the offset in the file of the disk's byte `offset`, and the number of bytes, up
    /// to `len`, that are contiguous in the file.
    #[inline]
    pub fn find(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let cluster = offset >> self.cluster_bits;
        let within = offset & ((1 << self.cluster_bits) - 1);
        let host = self.get(cluster)?;
        let mut found = (1 << self.cluster_bits) - within;
        let mut next = 1;
        while found < len && self.get(cluster + next) == Some(host + next) {
            found += 1 << self.cluster_bits;
            next += 1;
        }
        Some(((host << self.cluster_bits) + within, found.min(len)))
    }

    /// Caches that the `len` bytes of the disk from `offset` on are at `host` in the file.
    pub fn insert(&self, offset: u64, host: u64, len: u64) {
        let first = offset >> self.cluster_bits;
        let last = offset.saturating_add(len.saturating_sub(1)) >> self.cluster_bits;
        for cluster in first..=last {
            let host = (host >> self.cluster_bits) + (cluster - first);
            if let Some((entry, tag)) = self.entry(cluster)
                && host < 1 << HOST_BITS
            {
                entry.store(tag | host, Ordering::Release);
            }
        }
    }

    /// Removes the clusters of this range.
    pub fn remove(&self, offset: u64, len: u64) {
        let last = offset.saturating_add(len.saturating_sub(1)) >> self.cluster_bits;
        for cluster in offset >> self.cluster_bits..=last {
            if self.get(cluster).is_some()
                && let Some((entry, _)) = self.entry(cluster)
            {
                entry.store(0, Ordering::Release);
            }
        }
    }

    /// Removes all clusters.
    pub fn clear(&self) {
        for entry in &self.entries {
            entry.store(0, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contiguous_clusters_are_found_together() {
        let cache = MappingCache::new(16, 1 << 30);
        assert_eq!(cache.find(0, 512), None);
        cache.insert(0x2_0000, 0x50_0000, 0x2_0000);
        assert_eq!(cache.find(0x2_1000, 512), Some((0x50_1000, 512)));
        assert_eq!(cache.find(0x2_1000, 1 << 20), Some((0x50_1000, 0x1_f000)));
        // The next cluster on the disk is elsewhere in the file.
        cache.insert(0x4_0000, 0x10_0000, 1);
        assert_eq!(cache.find(0x3_0000, 1 << 20), Some((0x51_0000, 0x1_0000)));
        cache.remove(0x3_ffff, 1);
        assert_eq!(cache.find(0x3_0000, 512), None);
        assert_eq!(cache.find(0x2_0000, 1 << 20), Some((0x50_0000, 0x1_0000)));
        cache.clear();
        assert_eq!(cache.find(0x2_0000, 512), None);
    }

    #[test]
    fn clusters_that_share_an_entry_are_not_confused() {
        let cache = MappingCache::new(9, u64::MAX >> 1);
        let (one, other) = (512 * 5, 512 * (5 + MAX_ENTRIES));
        cache.insert(one, 0x200, 512);
        assert_eq!(cache.find(other, 512), None);
        cache.insert(other, 0x400, 512);
        assert_eq!(cache.find(one, 512), None);
        cache.remove(one, 512);
        assert_eq!(cache.find(other, 512), Some((0x400, 512)));
        // Numbers that are too large are not cached.
        cache.insert(1 << 62, 0x800, 512);
        assert_eq!(cache.find(1 << 62, 512), None);
        cache.insert(one, 1 << 60, 512);
        assert_eq!(cache.find(one, 512), None);
        assert_eq!(cache.find(u64::MAX - 511, 512), None);
    }
}

//! The positions of the tables of a qcow2 image.
//!
//! They are needed for two reasons. A table must not map data of the guest to where a table
//! is. And the process may be killed between any two writes, so a cluster must have its
//! refcount in the file before something in the file points to it. imago does that for data.
//! For a new L2 table or refcount block it writes the refcount later, so we write it first:
//! everything that imago writes passes [`Layout::write`].

use std::collections::HashSet;
use std::io::{self, IoSlice};
use std::ops::Range;

use super::super::metadata_file::{MetadataFile, beyond, damaged};
use super::header::{Qcow2Header, SIZE, V2_LEN, pointers};

/// Bits of an entry that hold an offset in the file.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an L1 entry that must be 0.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bit of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// How much of a table is read at a time, in bytes.
const READ_SIZE: u64 = 1 << 20;

/// Where the tables of an image are.
#[derive(Debug)]
pub struct Layout {
    bits: u32,
    refcount_order: u32,
    /// Size of the disk in the file.
    size: u64,
    l1: Range<u64>,
    refcounts: Range<u64>,
    /// The refcount table: the offsets of the refcount blocks, or 0.
    blocks: Vec<u64>,
    /// Clusters with the header or with active tables (not with those of snapshots).
    table_clusters: HashSet<u64>,
    /// An allocation to use again, for a table.
    buffer: Vec<u8>,
}

impl Layout {
    /// Finds the tables of the image with this header.
    ///
    /// # Errors
    /// The file cannot be read, or the tables are damaged.
    pub fn load(
        image_file: &MetadataFile,
        header: &Qcow2Header,
        writable: bool,
    ) -> io::Result<Self> {
        let range = |(offset, entries): (u64, u64)| offset..offset + entries * 8;
        let mut layout = Layout {
            bits: header.cluster_bits,
            refcount_order: header.refcount_order,
            size: header.size,
            l1: range(header.l1),
            refcounts: range(header.refcounts),
            blocks: Vec::new(),
            table_clusters: HashSet::from([0]),
            buffer: Vec::new(),
        };
        layout.add_range(layout.l1.clone())?;
        layout.add_range(layout.refcounts.clone())?;
        let l1 = layout.l1.clone();
        read_table(image_file, &l1, |entry| {
            if entry & L1_RESERVED != 0 {
                return Err(damaged(&format!(
                    "{entry:#x} is not an entry of an L1 table"
                )));
            }
            layout.add_table(image_file, entry & OFFSET_MASK)
        })?;
        layout.load_blocks(image_file)?;
        if writable {
            layout.check_refcounts(image_file)?;
        }
        Ok(layout)
    }

    fn load_blocks(&mut self, image_file: &MetadataFile) -> io::Result<()> {
        let mut blocks = Vec::new();
        read_table(image_file, &self.refcounts.clone(), |entry| {
            if entry & !OFFSET_MASK != 0 {
                let what = format!("{entry:#x} is not an entry of a refcount table");
                return Err(damaged(&what));
            }
            self.add_table(image_file, entry)?;
            blocks.push(entry);
            Ok(())
        })?;
        self.blocks = blocks;
        Ok(())
    }

    /// Checks that all tables have a refcount. Otherwise something else would be allocated
    /// where they are.
    fn check_refcounts(&self, image_file: &MetadataFile) -> io::Result<()> {
        let mut clusters: Vec<u64> = self.table_clusters.iter().copied().collect();
        clusters.sort_unstable();
        let mut block = Vec::new();
        let mut loaded = None;
        for cluster in clusters {
            let (index, at) = self.refcount_index(cluster);
            if loaded != Some(index) {
                block.clear();
                if let Some(offset) = self.block(index) {
                    block.resize(1 << self.bits, 0);
                    let mut buffers = [io::IoSliceMut::new(&mut block)];
                    image_file.read_padded(&mut buffers, offset)?;
                }
                loaded = Some(index);
            }
            let (bytes, mask) = self.refcount_bytes(at);
            let used = block.get(bytes).is_some_and(|bytes| {
                // If an entry is wider than a byte, the mask is 0xff.
                bytes.iter().any(|byte| byte & mask != 0)
            });
            if !used {
                let what = format!(
                    "the table at {:#x} has a refcount of 0",
                    cluster << self.bits
                );
                return Err(damaged(&what));
            }
        }
        Ok(())
    }

    fn add_range(&mut self, range: Range<u64>) -> io::Result<()> {
        for cluster in range.start >> self.bits..range.end.div_ceil(1 << self.bits) {
            self.add_cluster(cluster)?;
        }
        Ok(())
    }

    fn add_cluster(&mut self, cluster: u64) -> io::Result<()> {
        if !self.table_clusters.insert(cluster) {
            let offset = cluster << self.bits;
            return Err(damaged(&format!("two tables share the offset {offset:#x}")));
        }
        Ok(())
    }

    /// Adds a table of one cluster; 0 stands for no table.
    fn add_table(&mut self, image_file: &MetadataFile, offset: u64) -> io::Result<()> {
        if offset == 0 {
            return Ok(());
        }
        if !offset.is_multiple_of(1 << self.bits) {
            return Err(damaged(&format!(
                "the table at {offset:#x} is not aligned to a cluster"
            )));
        }
        if offset >= image_file.len() {
            return Err(beyond(offset));
        }
        self.add_cluster(offset >> self.bits)
    }

    /// The cluster size, and the position of the disk's byte `offset` in its cluster.
    pub fn cluster(&self, offset: u64) -> (usize, usize) {
        let size = 1 << self.bits;
        (size, offset as usize & (size - 1))
    }

    /// Whether this range of the file contains a table.
    pub fn has_table(&self, offset: u64, len: u64) -> bool {
        let last = offset.saturating_add(len.saturating_sub(1));
        (offset >> self.bits..=last >> self.bits)
            .any(|cluster| self.table_clusters.contains(&cluster))
    }

    /// The number of the refcount block for `cluster`, and the entry in it.
    fn refcount_index(&self, cluster: u64) -> (u64, u64) {
        let bits = self.bits + 3 - self.refcount_order;
        (cluster >> bits, cluster & ((1 << bits) - 1))
    }

    /// The offset of the refcount block with this number.
    fn block(&self, index: u64) -> Option<u64> {
        let index = usize::try_from(index).ok()?;
        self.blocks.get(index).copied().filter(|&offset| offset > 0)
    }

    /// The bytes of entry `at` of a refcount block, and the mask of its bits in each byte.
    fn refcount_bytes(&self, at: u64) -> (Range<usize>, u8) {
        let width = 1 << self.refcount_order;
        let bit = at * width;
        let start = (bit / 8) as usize;
        if width >= 8 {
            return (start..start + width as usize / 8, 0xff);
        }
        (start..start + 1, ((1u8 << width) - 1) << (bit % 8))
    }

    /// The first cluster in this range of the file that has a refcount of 0 in the file.
    pub fn first_free(
        &self,
        image_file: &MetadataFile,
        offset: u64,
        len: u64,
    ) -> io::Result<Option<u64>> {
        let last = offset.saturating_add(len.saturating_sub(1)) >> self.bits;
        let mut cluster = offset >> self.bits;
        while cluster <= last {
            let (index, at) = self.refcount_index(cluster);
            let Some(block) = self.block(index) else {
                return Ok(Some(cluster << self.bits));
            };
            let in_block = 1u64 << (self.bits + 3 - self.refcount_order);
            let end = in_block.min(at + (last - cluster) + 1);
            let start = self.refcount_bytes(at).0.start;
            let mut refcounts = vec![0; self.refcount_bytes(end - 1).0.end - start];
            image_file.read_padded(
                &mut [io::IoSliceMut::new(&mut refcounts)],
                block + start as u64,
            )?;
            for entry in at..end {
                let (bytes, mask) = self.refcount_bytes(entry);
                let bytes = refcounts.get(bytes.start - start..bytes.end - start);
                if !bytes.is_some_and(|bytes| bytes.iter().any(|byte| byte & mask != 0)) {
                    return Ok(Some((cluster + (entry - at)) << self.bits));
                }
            }
            cluster += end - at;
        }
        Ok(None)
    }

    /// The range of the file, offset and length, of the cluster with the disk's byte `offset`
    /// if it is compressed.
    pub fn compressed(
        &self,
        image_file: &MetadataFile,
        offset: u64,
    ) -> io::Result<Option<(u64, u64)>> {
        let entry = |at: u64| {
            let mut word = [0; 8];
            image_file.read(&mut word, at)?;
            io::Result::Ok(u64::from_be_bytes(word))
        };
        let l2_bits = self.bits - 3;
        let at = self.l1.start + (offset >> (self.bits + l2_bits)) * 8;
        let table = match self.l1.contains(&at) {
            true => entry(at)? & OFFSET_MASK,
            false => 0,
        };
        if table == 0 {
            return Ok(None);
        }
        let index = (offset >> self.bits) & ((1 << l2_bits) - 1);
        let entry = entry(table + index * 8)?;
        let bits = 70 - self.bits; // of the offset, below the number of sectors
        let start = entry & ((1 << bits) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
        let len = sectors * 512 - start % 512;
        Ok((entry & COMPRESSED != 0).then_some((start, len)))
    }

    /// Makes the refcount of `cluster` in the file 1 if it is 0. imago has done so in memory
    /// and writes it later.
    fn mark_used(&self, image_file: &MetadataFile, cluster: u64) -> io::Result<()> {
        let (index, at) = self.refcount_index(cluster);
        // A new block that contains its own refcount is not in the table yet.
        let Some(block) = self.block(index) else {
            return Ok(());
        };
        let (bytes, mask) = self.refcount_bytes(at);
        let offset = block + bytes.start as u64;
        let mut refcount = [0; 8];
        let refcount = &mut refcount[..bytes.len()];
        image_file.read(refcount, offset)?;
        if refcount.iter().all(|byte| byte & mask == 0) {
            if let Some(last) = refcount.last_mut() {
                *last |= mask & mask.wrapping_neg(); // its lowest bit, for the number 1
            }
            image_file.write_table(&mut [IoSlice::new(refcount)], offset)?;
        }
        Ok(())
    }

    /// Carries out a write of imago.
    ///
    /// # Errors
    /// The file cannot be written. If this was a write to a table, the image is broken then.
    pub fn write(
        &mut self,
        image_file: &MetadataFile,
        buffers: &mut [IoSlice<'_>],
        offset: u64,
    ) -> io::Result<()> {
        if offset < 1 << self.bits {
            return self.write_header(image_file, &mut joined(buffers), offset);
        }
        if self.l1.contains(&offset) {
            let bytes = joined(buffers);
            let old = self.mark_targets(image_file, &bytes, offset)?;
            image_file.write_table(buffers, offset)?;
            self.update_table_clusters(&old, &bytes);
        } else if self.refcounts.contains(&offset) {
            let bytes = joined(buffers);
            let old = self.mark_targets(image_file, &bytes, offset)?;
            image_file.write_table(buffers, offset)?;
            self.update_table_clusters(&old, &bytes);
            let first = ((offset - self.refcounts.start) / 8) as usize;
            for (entry, block) in entries(&bytes).zip(self.blocks.iter_mut().skip(first)) {
                *block = entry & OFFSET_MASK;
            }
        } else if self.table_clusters.contains(&(offset >> self.bits)) {
            self.write_changes(image_file, buffers, offset)?;
        } else {
            image_file.write(buffers, offset)?;
        }
        Ok(())
    }

    /// Writes the changed part of a table. imago writes the whole table for each entry, which
    /// costs more than reading it, and much more when it must be flushed.
    fn write_changes(
        &mut self,
        image_file: &MetadataFile,
        buffers: &mut [IoSlice<'_>],
        offset: u64,
    ) -> io::Result<()> {
        const CHUNK: usize = 512;
        let [new] = &*buffers else {
            return image_file.write_table(buffers, offset);
        };
        self.buffer.resize(new.len(), 0);
        image_file.read_padded(&mut [io::IoSliceMut::new(&mut self.buffer)], offset)?;
        let mut chunks = new.chunks(CHUNK).zip(self.buffer.chunks(CHUNK));
        let differ = |(new, old): (&[u8], &[u8])| new != old;
        let Some(first) = chunks.position(differ) else {
            return Ok(());
        };
        let mut chunks = new.chunks(CHUNK).zip(self.buffer.chunks(CHUNK));
        let last = chunks.rposition(differ).unwrap_or(first);
        let range = first * CHUNK..new.len().min((last + 1) * CHUNK);
        let offset = offset + range.start as u64;
        image_file.write_table(&mut [IoSlice::new(&new[range])], offset)
    }

    /// Makes sure that the clusters have a refcount that the entries `new`, to be written at
    /// `offset`, point to; returns the old entries.
    fn mark_targets(
        &self,
        image_file: &MetadataFile,
        new: &[u8],
        offset: u64,
    ) -> io::Result<Vec<u8>> {
        let mut old = vec![0; new.len()];
        image_file.read(&mut old, offset)?;
        for (new, old) in entries(new).zip(entries(&old)) {
            if new & OFFSET_MASK != old & OFFSET_MASK && new & OFFSET_MASK != 0 {
                self.mark_used(image_file, (new & OFFSET_MASK) >> self.bits)?;
            }
        }
        Ok(old)
    }

    fn update_table_clusters(&mut self, old: &[u8], new: &[u8]) {
        for (old, new) in entries(old).zip(entries(new)) {
            if old & OFFSET_MASK != 0 {
                self.table_clusters
                    .remove(&((old & OFFSET_MASK) >> self.bits));
            }
            if new & OFFSET_MASK != 0 {
                self.table_clusters.insert((new & OFFSET_MASK) >> self.bits);
            }
        }
    }

    /// Writes the size of the disk. imago would do so before its tables are in the file, so
    /// [`Layout::write`] ignores the size that it writes.
    ///
    /// # Errors
    /// The file cannot be written; the image is broken then.
    pub fn set_size(&mut self, image_file: &MetadataFile, size: u64) -> io::Result<()> {
        image_file.write_table(&mut [IoSlice::new(&size.to_be_bytes())], SIZE as u64)?;
        self.size = size;
        Ok(())
    }

    /// imago writes the version 2 part of the header, with new positions of the tables.
    fn write_header(
        &mut self,
        image_file: &MetadataFile,
        bytes: &mut [u8],
        offset: u64,
    ) -> io::Result<()> {
        if offset != 0 || bytes.len() != V2_LEN {
            let error = damaged("imago was about to overwrite its header");
            image_file.set_broken(&error);
            return Err(error);
        }
        bytes[SIZE..SIZE + 8].copy_from_slice(&self.size.to_be_bytes());
        let ((l1, entries), (refcounts, clusters)) = pointers(bytes);
        let l1 = l1..l1.saturating_add(entries * 8);
        let refcounts = refcounts..refcounts.saturating_add(clusters << self.bits);
        let clusters =
            |range: &Range<u64>| range.start >> self.bits..range.end.div_ceil(1 << self.bits);
        if l1 != self.l1 {
            for cluster in clusters(&l1) {
                self.mark_used(image_file, cluster)?;
            }
        }
        image_file.write_table(&mut [IoSlice::new(bytes)], offset)?;
        for (old, new) in [(&self.l1, &l1), (&self.refcounts, &refcounts)] {
            if old != new {
                clusters(old).for_each(|cluster| {
                    self.table_clusters.remove(&cluster);
                });
                self.table_clusters.extend(clusters(new));
            }
        }
        self.l1 = l1;
        if refcounts != self.refcounts {
            self.refcounts = refcounts;
            for block in std::mem::take(&mut self.blocks) {
                if block > 0 {
                    self.table_clusters.remove(&(block >> self.bits));
                }
            }
            self.load_blocks(image_file)
                .inspect_err(|error| image_file.set_broken(error))?;
        }
        Ok(())
    }
}

/// The entries of a table.
fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|entry| {
        let mut word = [0; 8];
        word.copy_from_slice(entry);
        u64::from_be_bytes(word)
    })
}

fn joined(buffers: &[IoSlice<'_>]) -> Vec<u8> {
    buffers
        .iter()
        .flat_map(|buffer| buffer.iter().copied())
        .collect()
}

/// Calls `each` with every entry of a table.
fn read_table(
    image_file: &MetadataFile,
    range: &Range<u64>,
    mut each: impl FnMut(u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let mut bytes = vec![0; (range.end - at).min(READ_SIZE) as usize];
        image_file.read_padded(&mut [io::IoSliceMut::new(&mut bytes)], at)?;
        entries(&bytes).try_for_each(&mut each)?;
        at += bytes.len() as u64;
    }
    Ok(())
}

//! The tables of a qcow image: the L1 table and a cache of L2 tables, in memory. An entry is
//! an offset in the file, or 0 for a cluster that is not allocated.
//!
//! An entry is written to the file first and changed in memory then.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::super::metadata_file::{MetadataFile, beyond, damaged};
use super::header::{LEN, QcowHeader};

/// Size of the cache of L2 tables in bytes.
const CACHE_SIZE: usize = 16 << 20;
/// Bit of an entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 63;

/// Where a range of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QcowEntry {
    /// It is not allocated.
    Unallocated,
    /// At this offset of the file.
    Data(u64),
    /// Its cluster is compressed, at this offset and of this length.
    Compressed(u64, usize),
}

/// An L2 table.
type L2Table = Arc<[AtomicU64]>;
/// An entry of the cache: the index of the L1 entry, and the L2 table.
type CacheSlot = RwLock<Option<(u64, L2Table)>>;

/// The image's tables.
pub struct Tables {
    cluster_bits: u32,
    l2_bits: u32,
    l1: RwLock<L1Table>,
    /// A direct-mapped cache, indexed by the index of the L1 entry.
    l2_cache: Box<[CacheSlot]>,
}

/// The L1 table, and the ranges of the file with tables.
struct L1Table {
    at: u64,
    entries: Vec<u64>,
    /// The ends of header and tables, by their offsets.
    ranges: BTreeMap<u64, u64>,
}

impl L1Table {
    fn read(image_file: &MetadataFile, header: &QcowHeader) -> io::Result<Self> {
        let mut bytes = vec![0; header.l1_entries() as usize * 8];
        image_file.read(&mut bytes, header.l1)?;
        let mut l1 = L1Table {
            at: header.l1,
            entries: words(&bytes).collect(),
            ranges: BTreeMap::from([(0, LEN as u64)]),
        };
        l1.take(header.l1, bytes.len() as u64)?;
        let len = 8 << header.l2_bits;
        for index in 0..l1.entries.len() {
            match l1.entries[index] {
                0 => {}
                at if at >= image_file.len() => return Err(beyond(at)),
                at => l1.take(at, len)?,
            }
        }
        Ok(l1)
    }

    fn take(&mut self, at: u64, len: u64) -> io::Result<()> {
        if self.has(at, len) {
            return Err(damaged(&format!("two tables share the offset {at:#x}")));
        }
        self.ranges.insert(at, at.saturating_add(len));
        Ok(())
    }

    /// Whether this range of the file contains a table.
    fn has(&self, at: u64, len: u64) -> bool {
        let before = self.ranges.range(..at.saturating_add(len)).next_back();
        before.is_some_and(|(_, &end)| end > at)
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|word| {
        let mut long = [0; 8];
        long.copy_from_slice(word);
        u64::from_be_bytes(long)
    })
}

impl Tables {
    /// Reads the L1 table.
    ///
    /// # Errors
    /// The file cannot be read, or the tables are damaged.
    pub fn load(image_file: &MetadataFile, header: &QcowHeader) -> io::Result<Self> {
        let tables = CACHE_SIZE / (8 << header.l2_bits);
        Ok(Tables {
            cluster_bits: header.cluster_bits,
            l2_bits: header.l2_bits,
            l1: RwLock::new(L1Table::read(image_file, header)?),
            l2_cache: (0..tables).map(|_| RwLock::default()).collect(),
        })
    }

    fn l1(&self) -> RwLockReadGuard<'_, L1Table> {
        self.l1.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn l1_mut(&self) -> RwLockWriteGuard<'_, L1Table> {
        self.l1.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops the cache and reads the L1 table again.
    ///
    /// # Errors
    /// As [`Tables::load`].
    pub fn reload(&self, image_file: &MetadataFile, header: &QcowHeader) -> io::Result<()> {
        if (header.cluster_bits, header.l2_bits) != (self.cluster_bits, self.l2_bits) {
            return Err(io::Error::other("it is not the same image as before"));
        }
        let l1 = L1Table::read(image_file, header)?;
        *self.l1_mut() = l1;
        for place in &self.l2_cache {
            *place.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
        Ok(())
    }

    /// The indices of the L1 entry and the L2 entry for the disk's byte `offset`.
    fn indices(&self, offset: u64) -> (u64, usize) {
        let cluster = offset >> self.cluster_bits;
        let within = cluster & ((1 << self.l2_bits) - 1);
        (cluster >> self.l2_bits, within as usize)
    }

    /// The L2 table of L1 entry `index`, if there is one.
    fn table(&self, image_file: &MetadataFile, index: u64) -> io::Result<Option<L2Table>> {
        let place = &self.l2_cache[index as usize % self.l2_cache.len()];
        if let Some((of, table)) = &*place.read().unwrap_or_else(PoisonError::into_inner)
            && *of == index
        {
            return Ok(Some(Arc::clone(table)));
        }
        // Locked until the table is in the cache, where a thread that changes it finds it.
        let mut place = place.write().unwrap_or_else(PoisonError::into_inner);
        let at = match usize::try_from(index) {
            Ok(index) => self.l1().entries.get(index).copied().unwrap_or(0),
            Err(_) => 0,
        };
        if at == 0 {
            return Ok(None);
        }
        let mut bytes = vec![0; 8 << self.l2_bits];
        image_file.read_padded(&mut [IoSliceMut::new(&mut bytes)], at)?;
        let table: L2Table = words(&bytes).map(AtomicU64::new).collect();
        *place = Some((index, Arc::clone(&table)));
        Ok(Some(table))
    }

    /// Decodes an entry.
    ///
    /// # Errors
    /// The entry is invalid.
    fn decode(&self, image_file: &MetadataFile, entry: u64) -> io::Result<QcowEntry> {
        if entry == 0 {
            return Ok(QcowEntry::Unallocated);
        }
        if entry & COMPRESSED != 0 {
            let bits = 63 - self.cluster_bits;
            let at = entry & ((1 << bits) - 1);
            let len = (entry >> bits) & ((1 << self.cluster_bits) - 1);
            return Ok(QcowEntry::Compressed(at, len as usize));
        }
        if !entry.is_multiple_of(512) {
            return Err(damaged(&format!(
                "the cluster at {entry:#x} is not aligned to a sector"
            )));
        }
        if entry >= image_file.len() && entry >= image_file.refresh_len()? {
            return Err(beyond(entry));
        }
        if self.l1().has(entry, 1 << self.cluster_bits) {
            let what = format!("a table maps data to {entry:#x}, where a table is");
            return Err(damaged(&what));
        }
        Ok(QcowEntry::Data(entry))
    }

    /// Where the disk's byte `offset` is, and the number of bytes, up to `len`, that are
    /// contiguous in the file, or not allocated either.
    ///
    /// # Errors
    /// The file cannot be read, or an entry is invalid.
    pub fn find(
        &self,
        image_file: &MetadataFile,
        offset: u64,
        len: u64,
    ) -> io::Result<(QcowEntry, u64)> {
        let cluster = 1u64 << self.cluster_bits;
        let within = offset & (cluster - 1);
        let (index, first) = self.indices(offset);
        let Some(table) = self.table(image_file, index)? else {
            let rest = ((1 << self.l2_bits) - first as u64) * cluster - within;
            return Ok((QcowEntry::Unallocated, len.min(rest)));
        };
        let get = |at: usize| table.get(at).map(|entry| entry.load(Ordering::Acquire));
        let entry = self.decode(image_file, get(first).unwrap_or(0))?;
        let mut found = cluster - within;
        for (step, at) in (first + 1..table.len()).enumerate() {
            let step = (step as u64 + 1) * cluster;
            let next = match entry {
                QcowEntry::Unallocated => 0,
                QcowEntry::Data(start) => start + step,
                QcowEntry::Compressed(..) => break,
            };
            if found >= len || get(at) != Some(next) {
                break;
            }
            if entry != QcowEntry::Unallocated && self.decode(image_file, next).is_err() {
                break; // the call for that cluster returns the error
            }
            found += cluster;
        }
        let entry = match entry {
            QcowEntry::Data(start) => QcowEntry::Data(start + within),
            other => other,
        };
        Ok((entry, found.min(len)))
    }

    /// Sets the entries of the `count` clusters from the one with the disk's byte `offset` on,
    /// which belong to one L2 table. Their data are in the file at `host` already. Only one
    /// thread at a time may call this.
    ///
    /// # Errors
    /// The file cannot be written; then no entry has changed.
    pub fn set_entries(
        &self,
        image_file: &MetadataFile,
        offset: u64,
        host: u64,
        count: u64,
    ) -> io::Result<()> {
        let (index, first) = self.indices(offset);
        let entries = (0..count).map(|step| host + (step << self.cluster_bits));
        let bytes: Vec<u8> = entries.clone().flat_map(u64::to_be_bytes).collect();
        let Some(table) = self.table(image_file, index)? else {
            return self.add_l2_table(image_file, index, first, &bytes);
        };
        let at = self.l1().entries.get(index as usize).copied();
        let at = at.ok_or(io::ErrorKind::InvalidInput)? + first as u64 * 8;
        image_file.write_table(&mut [IoSlice::new(&bytes)], at)?;
        for (word, entry) in table.iter().skip(first).zip(entries) {
            word.store(entry, Ordering::Release);
        }
        Ok(())
    }

    /// Appends a new L2 table that has the entries `bytes` from entry `first` on.
    fn add_l2_table(
        &self,
        image_file: &MetadataFile,
        index: u64,
        first: usize,
        bytes: &[u8],
    ) -> io::Result<()> {
        let mut table = vec![0; 8 << self.l2_bits];
        let here = table.get_mut(first * 8..first * 8 + bytes.len());
        here.ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(bytes);
        let at = image_file.len().next_multiple_of(1 << self.cluster_bits);
        image_file.write(&mut [IoSlice::new(&table)], at)?;
        // The L1 entry that points to it is written last.
        let mut l1 = self.l1_mut();
        let offset = l1.at + index * 8;
        image_file.write_table(&mut [IoSlice::new(&at.to_be_bytes())], offset)?;
        l1.take(at, table.len() as u64)?;
        if let Some(entry) = l1.entries.get_mut(index as usize) {
            *entry = at;
        }
        Ok(())
    }

    /// Makes the L1 table as long as `header` needs it, at a new offset, and writes the header.
    ///
    /// # Errors
    /// The file cannot be written; then nothing has changed.
    pub fn grow(&self, image_file: &MetadataFile, header: &mut QcowHeader) -> io::Result<()> {
        let mut l1 = self.l1_mut();
        let wanted = header.l1_entries() as usize;
        header.l1 = l1.at;
        if wanted > l1.entries.len() {
            let mut bytes: Vec<u8> = l1.entries.iter().flat_map(|e| e.to_be_bytes()).collect();
            bytes.resize(wanted * 8, 0);
            let at = image_file.len().next_multiple_of(1 << self.cluster_bits);
            image_file.write(&mut [IoSlice::new(&bytes)], at)?;
            header.l1 = at;
        }
        header.update(image_file)?;
        if header.l1 != l1.at {
            let old = l1.at;
            l1.ranges.remove(&old);
            l1.take(header.l1, wanted as u64 * 8)?;
            l1.entries.resize(wanted, 0);
            l1.at = header.l1;
        }
        Ok(())
    }
}

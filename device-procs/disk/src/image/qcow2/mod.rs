//! qcow2 images, versions 2 and 3. Crate imago reads and changes the tables. [`header`] and
//! [`layout`] protect against hostile images and sudden death, and [`mapping_cache`] makes
//! lookups fast.
//!
//! One thread at a time changes the tables, and the changes are in the file when the call
//! returns. Their order lets another process continue at any point: the data first, then the
//! refcount of their cluster, then the entry that points to it; and the reverse for clusters
//! that become free. A killed process may leak clusters (see `qemu-img check`), but does no
//! other damage.

mod compressed;
pub mod header;
mod layout;
mod mapping_cache;
pub mod storage;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use device_vhost_user::Buffers;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, ShallowMapping};

use super::metadata_file::MetadataFile;
use super::{Extent, Geometry, Image, ImageOrigin, SECTOR, backing};
use header::{AUTOCLEAR, Qcow2Header};
use mapping_cache::MappingCache;
use storage::Storage;

/// A qcow2 image.
pub struct Qcow2Image {
    access: FormatAccess<Storage>,
    storage: Storage,
    geometry: Geometry,
    capacity: AtomicU64,
    /// log2 of the cluster size.
    cluster_bits: u32,
    /// Version 3: clusters can be marked as zeros.
    has_zero_clusters: bool,
    /// Size of the disk in the backing file.
    backing: Option<u64>,
    mappings: MappingCache,
    /// Held while the tables are changed.
    table_lock: Mutex<()>,
    /// imago has changed tables in memory that are not in the file yet.
    tables_dirty: AtomicBool,
    /// Held for writing while mapped clusters become zeros, and for reading from a lookup in
    /// the tables until [`MappingCache`] has its result.
    zero_lock: RwLock<()>,
}

/// What the tables say about a range.
enum Mapped {
    /// Data at this offset, which may be overwritten there if `writable`.
    Data { at: u64, writable: bool },
    /// Zeros: marked so in the tables, perhaps with an allocated cluster, or not allocated.
    Zero { marked: bool },
    /// Compressed, or in a backing file.
    Special,
}

/// A qcow2 image that imago has opened.
pub struct OpenedQcow2 {
    /// The image.
    pub access: FormatAccess<Storage>,
    storage: Storage,
    header: Qcow2Header,
    /// Size of the disk in the backing file.
    backing: Option<u64>,
}

/// Opens `file` as a qcow2 image, with its backing files.
///
/// # Errors
/// The image or a backing file is invalid or not supported. The error says what to do.
pub fn access(file: File, origin: &ImageOrigin<'_>, writable: bool) -> io::Result<OpenedQcow2> {
    let image_file = MetadataFile::new(file, origin.name)?;
    let header = Qcow2Header::read(&image_file, writable)?;
    let backing = match &header.backing {
        None => None,
        Some((name, Some(format))) => Some(backing::open(name, Some(format), origin)?),
        Some((name, None)) => return Err(backing::without_format(name, origin)),
    };
    let storage = Storage::new(image_file);
    storage.load(&header, writable)?;
    if writable && header.autoclear != 0 {
        let none = 0u64.to_be_bytes();
        let image_file = storage.image_file();
        image_file.write_table(&mut [io::IoSlice::new(&none)], AUTOCLEAR)?;
    }
    let backing_size = backing.as_ref().map(FormatAccess::size);
    let image = Qcow2::<Storage>::builder(storage.clone())
        .write(writable)
        .backing(backing)
        .data_file(None)
        .open(DenyImplicitOpenGate::default())?;
    Ok(OpenedQcow2 {
        access: FormatAccess::new(image),
        storage,
        header,
        backing: backing_size,
    })
}

impl Qcow2Image {
    /// Opens `file`.
    ///
    /// # Errors
    /// As [`access`].
    pub fn open(file: File, origin: &ImageOrigin<'_>, read_only: bool) -> io::Result<Self> {
        let OpenedQcow2 {
            access,
            storage,
            header,
            backing,
        } = access(file, origin, !read_only)?;
        let cluster = 1u32 << header.cluster_bits;
        let has_zero_clusters = header.version >= 3;
        let capacity = capacity(&header)?;
        Ok(Qcow2Image {
            access,
            storage,
            geometry: Geometry {
                capacity,
                read_only,
                logical_block: SECTOR as u32,
                physical_block: 4096,
                optimal_io: 0,
                discard: (!read_only && has_zero_clusters).then_some(cluster),
            },
            capacity: AtomicU64::new(capacity),
            cluster_bits: header.cluster_bits,
            has_zero_clusters,
            backing,
            mappings: MappingCache::new(header.cluster_bits, capacity),
            table_lock: Mutex::new(()),
            tables_dirty: AtomicBool::new(false),
            zero_lock: RwLock::new(()),
        })
    }

    fn image_file(&self) -> &MetadataFile {
        self.storage.image_file()
    }

    fn lock_tables(&self) -> MutexGuard<'_, ()> {
        self.table_lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of bytes from `offset` to the end of its cluster.
    fn bytes_to_cluster_end(&self, offset: u64) -> u64 {
        let cluster = 1 << self.cluster_bits;
        cluster - (offset & (cluster - 1))
    }

    /// What the tables say about the range at `offset`, and for how many bytes.
    fn lookup(&self, offset: u64, len: u64) -> io::Result<(Mapped, u64)> {
        let (mapping, found) = self.access.get_shallow_mapping(offset, len)?;
        if found == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mapped = match mapping {
            ShallowMapping::Raw {
                offset: at,
                writable,
                ..
            } => {
                self.storage.check_existing(at, found)?;
                Mapped::Data { at, writable }
            }
            ShallowMapping::Zero { explicit, .. } => Mapped::Zero { marked: explicit },
            ShallowMapping::Special { .. } => {
                let mut at = offset;
                while at < offset.saturating_add(found) {
                    self.storage.check_compressed(at)?;
                    at += self.bytes_to_cluster_end(at);
                }
                Mapped::Special
            }
            _ => Mapped::Special,
        };
        Ok((mapped, found))
    }

    /// As [`Qcow2Image::lookup`], with the cache; also returns whether the tables in the file
    /// say the same.
    fn lookup_and_cache(&self, offset: u64, len: u64) -> io::Result<(Mapped, u64, bool)> {
        let _lock = self
            .zero_lock
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let (mapped, found) = self.lookup(offset, len)?;
        // After the lookup: `tables_dirty` is set before a new mapping can be found.
        let clean = !self.tables_dirty.load(Ordering::Acquire);
        if let Mapped::Data { at, writable } = mapped
            && (writable || self.geometry.read_only)
            && clean
        {
            if !self.geometry.read_only {
                self.storage.check_used(at, found)?;
            }
            if self.file_covers(at, found)? {
                self.mappings.insert(offset, at, found);
            }
        }
        Ok((mapped, found, clean))
    }

    /// Whether the file covers this range, up to the end of its last cluster. (The last
    /// cluster of a file may be incomplete.)
    fn file_covers(&self, at: u64, len: u64) -> io::Result<bool> {
        let end = at.saturating_add(len);
        let end = end.next_multiple_of(1 << self.cluster_bits); // `MappingCache` has whole clusters
        Ok(end <= self.image_file().len() || end <= self.image_file().refresh_len()?)
    }

    /// Makes imago write its changed tables to the file.
    fn flush_tables(&self) -> io::Result<()> {
        self.access
            .flush()
            .inspect_err(|error| self.image_file().set_broken(error))?;
        self.tables_dirty.store(false, Ordering::Release);
        Ok(())
    }

    /// Allocates clusters for a range, where it has none of its own, and calls `fill` to write
    /// each part. After an error, a part of the range is written.
    fn allocate(
        &self,
        mut offset: u64,
        mut len: u64,
        mut fill: impl FnMut(u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        while len > 0 {
            let (mapped, mut found) = self.lookup(offset, len)?;
            if let Mapped::Zero { marked: true } = mapped {
                // One cluster at a time: for a second one imago would allocate another
                // cluster than it has, where a transfer may still be in flight.
                found = found.min(self.bytes_to_cluster_end(offset));
            }
            if let Mapped::Special = mapped {
                self.check_copied_clusters(offset, found)?;
            }
            let mapping = self.access.prepare_data_mapping(offset, found, true)?;
            let (at, done) = (mapping.offset(), mapping.length());
            self.storage.check_data(at, done)?;
            fill(at, done)?;
            self.tables_dirty.store(true, Ordering::Release);
            self.access.commit_data_mapping(mapping)?;
            offset += done;
            len -= done;
        }
        Ok(())
    }

    /// Checks the compressed clusters that imago copies when a range is written: the rest of
    /// its first and of its last cluster.
    fn check_copied_clusters(&self, offset: u64, len: u64) -> io::Result<()> {
        let cluster = 1u64 << self.cluster_bits;
        for at in [offset, offset.saturating_add(len)] {
            if !at.is_multiple_of(cluster) {
                let first = at & !(cluster - 1);
                let len = cluster.min(self.access.size().saturating_sub(first));
                compressed::check(&self.access, first, len)?;
            }
        }
        Ok(())
    }

    /// Ends a change of the tables. After an error, clusters that were allocated and are not
    /// used become free again.
    fn finish_update(&self, result: io::Result<()>) -> io::Result<()> {
        let flushed = self.flush_tables();
        result.and(flushed)
    }

    /// Zeroes a range: all of it, which may be deallocated if `unmap` is true; or, if `unmap`
    /// is `None`, only whole clusters.
    fn zero(&self, offset: u64, len: u64, unmap: Option<bool>) -> io::Result<()> {
        self.image_file().check_writable()?;
        let _lock = self.lock_tables();
        let result = self.zero_locked(offset, len, unmap);
        self.finish_update(result)
    }

    fn zero_locked(&self, offset: u64, len: u64, unmap: Option<bool>) -> io::Result<()> {
        let cluster = 1u64 << self.cluster_bits;
        let end = offset.saturating_add(len);
        let first = offset.next_multiple_of(cluster);
        // The last cluster of the disk counts as whole.
        let last = match end == self.access.size() {
            true => end,
            false => end & !(cluster - 1),
        };
        if !self.has_zero_clusters || first >= last {
            return match unmap {
                Some(unmap) => self.write_zero_bytes(offset, end, unmap),
                None => Ok(()),
            };
        }
        if let Some(unmap) = unmap {
            self.write_zero_bytes(offset, first, unmap)?;
            self.write_zero_bytes(last, end, unmap)?;
        }
        self.mark_zeroes(first, last)
    }

    /// Marks whole clusters as zeros. They keep their ranges of the file, where transfers may
    /// still be in flight, but those are deallocated.
    fn mark_zeroes(&self, mut at: u64, end: u64) -> io::Result<()> {
        let mut freed = Vec::new();
        while at < end {
            let (mapped, mut len) = self.lookup(at, end - at)?;
            if !matches!(mapped, Mapped::Zero { .. }) {
                let _lock = self
                    .zero_lock
                    .write()
                    .unwrap_or_else(PoisonError::into_inner);
                self.mappings.remove(at, len);
                let (start, done) = self.access.inner().ensure_zero_mapping(at, len)?;
                if start != at || done == 0 {
                    return Err(io::Error::other("clusters could not be marked as zeros"));
                }
                len = done;
            }
            if let Mapped::Data { at, writable: true } = mapped {
                freed.push((at, len));
            }
            at += len;
        }
        // After the tables in the file say that they are zeros.
        self.flush_tables()?;
        freed
            .into_iter()
            .try_for_each(|(at, len)| self.image_file().punch_hole(at, len))
    }

    /// Writes zeros to the parts of a range that do not read as zeros.
    fn write_zero_bytes(&self, mut at: u64, end: u64, unmap: bool) -> io::Result<()> {
        while at < end {
            let (mapped, len) = self.lookup(at, end - at)?;
            match mapped {
                Mapped::Zero { .. } => {}
                Mapped::Data { at, writable: true } => self.image_file().zero(at, len, unmap)?,
                _ => self.allocate(at, len, |at, len| self.image_file().zero(at, len, unmap))?,
            }
            at += len;
        }
        Ok(())
    }
}

/// Size of the disk, rounded down to whole sectors as in QEMU.
fn capacity(header: &Qcow2Header) -> io::Result<u64> {
    match header.size / SECTOR * SECTOR {
        0 => Err(io::Error::other(
            "it is empty: a disk has at least one sector",
        )),
        capacity => Ok(capacity),
    }
}

impl Image for Qcow2Image {
    fn geometry(&self) -> Geometry {
        Geometry {
            capacity: self.capacity.load(Ordering::Acquire),
            ..self.geometry
        }
    }

    fn file(&self) -> BorrowedFd<'_> {
        self.image_file().file()
    }

    #[cfg(test)]
    fn metadata_file(&self) -> Option<&MetadataFile> {
        Some(self.image_file())
    }

    fn map_read(&self, offset: u64, len: u64) -> io::Result<Extent> {
        if let Some((offset, len)) = self.mappings.find(offset, len) {
            return Ok(Extent::Data { offset, len });
        }
        let (mapped, len, _) = self.lookup_and_cache(offset, len)?;
        Ok(match mapped {
            Mapped::Data { at, .. } if self.file_covers(at, len)? => {
                Extent::Data { offset: at, len }
            }
            Mapped::Zero { .. } => Extent::Zero { len },
            Mapped::Data { .. } | Mapped::Special => Extent::Special { len },
        })
    }

    fn map_write(&self, offset: u64, len: u64) -> io::Result<Extent> {
        self.image_file().check_writable()?;
        if let Some((offset, len)) = self.mappings.find(offset, len) {
            return Ok(Extent::Data { offset, len });
        }
        Ok(match self.lookup_and_cache(offset, len)? {
            // Only if the next process finds the cluster, too, after a death of this one.
            (Mapped::Data { at, writable: true }, len, true) => Extent::Data { offset: at, len },
            // The whole range, so that the tables are written once.
            _ => Extent::Special { len },
        })
    }

    fn read(&self, offset: u64, buffers: &Buffers<'_>) -> io::Result<()> {
        compressed::read(&self.access, offset, buffers)
    }

    fn write(&self, offset: u64, buffers: &Buffers<'_>) -> io::Result<()> {
        self.image_file().check_writable()?;
        let _lock = self.lock_tables();
        let mut left = buffers.clone();
        let result = self.allocate(offset, buffers.len() as u64, |at, len| {
            let part = usize::try_from(len).ok().and_then(|len| left.take(len));
            let part = part.ok_or_else(|| io::Error::other("imago mapped an invalid length"))?;
            self.image_file().write_guest(&part, at)
        });
        self.finish_update(result)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.has_zero_clusters {
            return Ok(());
        }
        self.zero(offset, len, None)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.zero(offset, len, Some(unmap))
    }

    fn grow(&self, capacity: u64) -> io::Result<()> {
        self.image_file().check_writable()?;
        let _lock = self.lock_tables();
        super::check_growth(self.access.size() / SECTOR * SECTOR, capacity)?;
        if self.geometry.read_only || capacity <= self.access.size() {
            return match self.geometry.read_only && capacity > self.access.size() {
                true => Err(io::Error::other("the disk is read-only")),
                false => Ok(()),
            };
        }
        // Data of the backing file must not appear in the new part of the disk.
        let mode = match self.backing {
            Some(size) if size > self.access.size() => PreallocateMode::Zero,
            _ => PreallocateMode::None,
        };
        let result = self.access.resize_grow(capacity, mode);
        self.finish_update(result)?;
        self.storage.set_size(capacity)?;
        self.capacity.store(capacity, Ordering::Release);
        Ok(())
    }

    fn reload(&self) -> io::Result<()> {
        let _lock = self.lock_tables();
        let _lock = self
            .zero_lock
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let header = Qcow2Header::read(self.image_file(), !self.geometry.read_only)?;
        self.storage.load(&header, !self.geometry.read_only)?;
        self.mappings.clear();
        // SAFETY: imago has no changes that are not in the file, for `flush_tables` follows
        // every change; or that failed, and then the file is right.
        unsafe { self.access.inner().invalidate_cache() }?;
        self.tables_dirty.store(false, Ordering::Release);
        self.capacity.store(capacity(&header)?, Ordering::Release);
        Ok(())
    }
}

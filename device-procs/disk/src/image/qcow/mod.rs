//! qcow images, version 1: two levels of tables, and clusters in the order in which they were
//! first written. There are no refcounts: new clusters are appended to the file. The data are
//! written first, then the L2 entry that points to them, then, for a new L2 table, the L1
//! entry that points to it.

pub mod header;
mod tables;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use device_vhost_user::Buffers;
use imago::FormatAccess;
use imago::io_buffers::IoVectorMut;

use super::inflate::inflate;
use super::metadata_file::MetadataFile;
use super::qcow2::storage::Storage;
use super::{Extent, Geometry, Image, ImageOrigin, SECTOR, backing};
use header::QcowHeader;
use tables::{QcowEntry, Tables};

/// A qcow image.
pub struct QcowImage {
    image_file: MetadataFile,
    geometry: Geometry,
    capacity: AtomicU64,
    cluster: u64,
    tables: Tables,
    backing: Option<FormatAccess<Storage>>,
    /// The header in the file; locked while the image is changed.
    header: Mutex<QcowHeader>,
}

impl QcowImage {
    /// Opens `file` and its backing files.
    ///
    /// # Errors
    /// The image or a backing file is invalid or not supported. The error says what to do.
    pub fn open(file: File, origin: &ImageOrigin<'_>, read_only: bool) -> io::Result<Self> {
        if !file.metadata()?.is_file() {
            let why = "a qcow image must be a regular file, because it grows";
            return Err(io::Error::other(why));
        }
        let image_file = MetadataFile::new(file, origin.name)?;
        let header = QcowHeader::read(&image_file)?;
        // The image does not say the format of its backing file. So that is raw, unless it
        // begins like another format.
        let backing = match &header.backing {
            Some(name) => Some(backing::open(name, None, origin)?),
            None => None,
        };
        let capacity = header.size / SECTOR * SECTOR;
        let cluster = 1u64 << header.cluster_bits;
        Ok(QcowImage {
            geometry: Geometry {
                capacity,
                read_only,
                logical_block: SECTOR as u32,
                physical_block: 4096,
                optimal_io: 0,
                discard: (!read_only).then_some(4096),
            },
            capacity: AtomicU64::new(capacity),
            cluster,
            tables: Tables::load(&image_file, &header)?,
            backing,
            header: Mutex::new(header),
            image_file,
        })
    }

    fn find(&self, offset: u64, len: u64) -> io::Result<(QcowEntry, u64)> {
        self.tables.find(&self.image_file, offset, len)
    }

    /// Reads the range from `offset` on, which `entry` maps, into `bytes`.
    fn read_range(&self, entry: QcowEntry, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        match entry {
            QcowEntry::Unallocated => match &self.backing {
                Some(backing) => backing.read(bytes, offset),
                None => {
                    bytes.fill(0);
                    Ok(())
                }
            },
            QcowEntry::Data(at) => self
                .image_file
                .read_padded(&mut [IoSliceMut::new(bytes)], at),
            QcowEntry::Compressed(at, len) => {
                let cluster = inflate(&self.image_file, at, len, self.cluster as usize)?;
                let within = (offset & (self.cluster - 1)) as usize;
                let part = cluster
                    .get(within..)
                    .and_then(|rest| rest.get(..bytes.len()));
                bytes.copy_from_slice(part.ok_or(io::ErrorKind::InvalidInput)?);
                Ok(())
            }
        }
    }

    /// Allocates clusters at the end of the file for a range that `entry` maps and that belongs
    /// to one L2 table, and writes `data` or zeros to it. After an error nothing has changed.
    fn append(
        &self,
        entry: QcowEntry,
        offset: u64,
        len: u64,
        data: Option<&Buffers<'_>>,
    ) -> io::Result<()> {
        let before = self.image_file.len();
        self.append_clusters(entry, offset..offset + len, data)
            .inspect_err(|_| self.image_file.truncate_back(before))
    }

    fn append_clusters(
        &self,
        entry: QcowEntry,
        range: Range<u64>,
        data: Option<&Buffers<'_>>,
    ) -> io::Result<()> {
        let first = range.start & !(self.cluster - 1);
        let end = range.end.next_multiple_of(self.cluster);
        let before = self.image_file.len();
        let host = before.next_multiple_of(self.cluster);
        // The new part of the file reads as zeros.
        self.image_file
            .zero(before, host - before + (end - first), true)?;
        if entry != QcowEntry::Unallocated || self.backing.is_some() {
            for around in [first..range.start, range.end..end] {
                let mut bytes = vec![0; (around.end - around.start) as usize];
                self.read_range(entry, around.start, &mut bytes)?;
                let at = host + (around.start - first);
                self.image_file.write(&mut [IoSlice::new(&bytes)], at)?;
            }
        }
        if let Some(data) = data {
            self.image_file
                .write_guest(data, host + (range.start - first))?;
        }
        let count = (end - first) / self.cluster;
        self.tables
            .set_entries(&self.image_file, first, host, count)
    }

    fn lock_header(&self) -> MutexGuard<'_, QcowHeader> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Image for QcowImage {
    fn geometry(&self) -> Geometry {
        Geometry {
            capacity: self.capacity.load(Ordering::Acquire),
            ..self.geometry
        }
    }

    fn file(&self) -> BorrowedFd<'_> {
        self.image_file.file()
    }

    #[cfg(test)]
    fn metadata_file(&self) -> Option<&MetadataFile> {
        Some(&self.image_file)
    }

    fn map_read(&self, offset: u64, len: u64) -> io::Result<Extent> {
        let (entry, len) = self.find(offset, len)?;
        Ok(match entry {
            // The last cluster of a file may be incomplete.
            QcowEntry::Data(at) if at.saturating_add(len) <= self.image_file.len() => {
                Extent::Data { offset: at, len }
            }
            QcowEntry::Unallocated if self.backing.is_none() => Extent::Zero { len },
            _ => Extent::Special { len },
        })
    }

    fn map_write(&self, offset: u64, len: u64) -> io::Result<Extent> {
        self.image_file.check_writable()?;
        Ok(match self.find(offset, len)? {
            (QcowEntry::Data(offset), len) => Extent::Data { offset, len },
            _ => Extent::Special { len },
        })
    }

    fn read(&self, mut offset: u64, buffers: &Buffers<'_>) -> io::Result<()> {
        let mut left = buffers.clone();
        while !left.is_empty() {
            let (entry, found) = self.find(offset, left.len() as u64)?;
            let part = take(&mut left, found)?;
            match (entry, &self.backing) {
                (QcowEntry::Unallocated, Some(backing)) => {
                    let (vector, _guards) = IoVectorMut::from_volatile_slice(part.slices());
                    backing.readv(vector, offset)?;
                }
                _ => {
                    let mut bytes = vec![0; part.len()];
                    self.read_range(entry, offset, &mut bytes)?;
                    part.copy_from(&bytes);
                }
            }
            offset += found;
        }
        Ok(())
    }

    fn write(&self, mut offset: u64, buffers: &Buffers<'_>) -> io::Result<()> {
        self.image_file.check_writable()?;
        let _lock = self.lock_header();
        let mut left = buffers.clone();
        while !left.is_empty() {
            let (entry, found) = self.find(offset, left.len() as u64)?;
            let part = take(&mut left, found)?;
            match entry {
                QcowEntry::Data(at) => self.image_file.write_guest(&part, at)?,
                _ => self.append(entry, offset, found, Some(&part))?,
            }
            offset += found;
        }
        Ok(())
    }

    /// Clusters keep their ranges of the file, but those are deallocated.
    fn discard(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        self.image_file.check_writable()?;
        while len > 0 {
            let (entry, found) = self.find(offset, len)?;
            if let QcowEntry::Data(at) = entry {
                self.image_file.punch_hole(at, found)?;
            }
            offset += found;
            len -= found;
        }
        Ok(())
    }

    fn write_zeroes(&self, mut offset: u64, mut len: u64, unmap: bool) -> io::Result<()> {
        self.image_file.check_writable()?;
        let _lock = self.lock_header();
        while len > 0 {
            let (entry, found) = self.find(offset, len)?;
            match entry {
                QcowEntry::Data(at) => self.image_file.zero(at, found, unmap)?,
                QcowEntry::Unallocated if self.backing.is_none() => {}
                _ => self.append(entry, offset, found, None)?,
            }
            offset += found;
            len -= found;
        }
        Ok(())
    }

    fn grow(&self, capacity: u64) -> io::Result<()> {
        self.image_file.check_writable()?;
        let mut header = self.lock_header();
        let now = self.capacity.load(Ordering::Acquire);
        super::check_growth(now, capacity)?;
        if capacity == now {
            return Ok(());
        }
        if self.geometry.read_only {
            return Err(io::Error::other("the disk is read-only"));
        }
        if self.backing.as_ref().is_some_and(|it| it.size() > now) {
            let why = "its backing file is larger, and its data would appear in the new part";
            return Err(io::Error::other(why));
        }
        let mut larger = QcowHeader {
            size: capacity,
            ..header.clone()
        };
        larger.check_size().map_err(io::Error::other)?;
        let before = self.image_file.len();
        self.tables
            .grow(&self.image_file, &mut larger)
            .inspect_err(|_| self.image_file.truncate_back(before))?;
        *header = larger;
        self.capacity.store(capacity, Ordering::Release);
        Ok(())
    }

    fn reload(&self) -> io::Result<()> {
        let mut header = self.lock_header();
        let now = QcowHeader::read(&self.image_file)?;
        if now.backing != header.backing {
            return Err(io::Error::other("it is not the same image as before"));
        }
        self.tables.reload(&self.image_file, &now)?;
        let capacity = now.size / SECTOR * SECTOR;
        self.capacity.store(capacity, Ordering::Release);
        *header = now;
        Ok(())
    }
}

fn take<'m>(buffers: &mut Buffers<'m>, len: u64) -> io::Result<Buffers<'m>> {
    let part = usize::try_from(len).ok().and_then(|len| buffers.take(len));
    part.ok_or_else(|| io::Error::other("the image mapped an invalid length"))
}

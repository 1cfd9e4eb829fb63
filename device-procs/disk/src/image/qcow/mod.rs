//! qcow images, version 1: two levels of tables, and clusters in the order in which they
//! were first written. There are no refcounts: what is not in a table yet is behind the
//! end of the file. So data comes first, then the entry that points to it, then, if that
//! is in a new table, the one that points to that.

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
    /// The header as it is in the file; held by whoever changes the image.
    header: Mutex<QcowHeader>,
}

impl QcowImage {
    /// Opens `file`, and what it lies on.
    ///
    /// # Errors
    /// One line that says what is wrong with the image.
    pub fn open(file: File, origin: &ImageOrigin<'_>, read_only: bool) -> io::Result<Self> {
        if !file.metadata()?.is_file() {
            let why = "a qcow image grows with its file, so it must be a regular one";
            return Err(io::Error::other(why));
        }
        let image_file = MetadataFile::new(file, origin.name)?;
        let header = QcowHeader::read(&image_file)?;
        // The format has no word for what the other file is. As everywhere, that is raw,
        // unless it looks like something else.
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

    /// What the range from `offset` on, of which `entry` is true, reads as.
    fn content(&self, entry: QcowEntry, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        match entry {
            QcowEntry::Nothing => match &self.backing {
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
                let piece = cluster
                    .get(within..)
                    .and_then(|rest| rest.get(..bytes.len()));
                bytes.copy_from_slice(piece.ok_or(io::ErrorKind::InvalidInput)?);
                Ok(())
            }
        }
    }

    /// Puts a range, of which `entry` is true and which belongs to one L2 table, at the end
    /// of the file: with these bytes, or as zeros. After an error all is as before.
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
        // All of it is in the file then, as zeros.
        self.image_file
            .zero(before, host - before + (end - first), true)?;
        if entry != QcowEntry::Nothing || self.backing.is_some() {
            for around in [first..range.start, range.end..end] {
                let mut bytes = vec![0; (around.end - around.start) as usize];
                self.content(entry, around.start, &mut bytes)?;
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
            // The last cluster of a file need not be there as a whole.
            QcowEntry::Data(at) if at.saturating_add(len) <= self.image_file.len() => {
                Extent::Data { offset: at, len }
            }
            QcowEntry::Nothing if self.backing.is_none() => Extent::Zero { len },
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
            let piece = take(&mut left, found)?;
            match (entry, &self.backing) {
                (QcowEntry::Nothing, Some(backing)) => {
                    let (vector, _guards) = IoVectorMut::from_volatile_slice(piece.slices());
                    backing.readv(vector, offset)?;
                }
                _ => {
                    let mut bytes = vec![0; piece.len()];
                    self.content(entry, offset, &mut bytes)?;
                    piece.copy_from(&bytes);
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
            let piece = take(&mut left, found)?;
            match entry {
                QcowEntry::Data(at) => self.image_file.write_guest(&piece, at)?,
                _ => self.append(entry, offset, found, Some(&piece))?,
            }
            offset += found;
        }
        Ok(())
    }

    /// Clusters keep their places, but not the space there.
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
                QcowEntry::Nothing if self.backing.is_none() => {}
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
            return Err(io::Error::other("it is read-only"));
        }
        if self.backing.as_ref().is_some_and(|it| it.size() > now) {
            let why = "what it lies on is larger than it and would come to light";
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
            return Err(io::Error::other("it is another image than before"));
        }
        self.tables.reload(&self.image_file, &now)?;
        let capacity = now.size / SECTOR * SECTOR;
        self.capacity.store(capacity, Ordering::Release);
        *header = now;
        Ok(())
    }
}

fn take<'m>(buffers: &mut Buffers<'m>, len: u64) -> io::Result<Buffers<'m>> {
    let piece = usize::try_from(len).ok().and_then(|len| buffers.take(len));
    piece.ok_or_else(|| io::Error::other("a place of a wrong length"))
}

//! What imago reads and writes: the image's file, by way of [`MetadataFile`] and [`Layout`].

use std::fmt;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;

use super::super::inflate::inflate;
use super::super::metadata_file::{MetadataFile, beyond, damaged};
use super::header::Qcow2Header;
use super::layout::Layout;

/// A file that imago works on.
#[derive(Clone, Debug)]
pub struct Storage(Arc<StorageInner>);

#[derive(Debug)]
struct StorageInner {
    image_file: MetadataFile,
    /// Of a qcow2 image.
    layout: RwLock<Option<Layout>>,
    helper: CommonStorageHelper,
}

impl Storage {
    /// A file without tables, or one whose tables come later.
    pub fn new(image_file: MetadataFile) -> Self {
        Storage(Arc::new(StorageInner {
            image_file,
            layout: RwLock::new(None),
            helper: CommonStorageHelper::default(),
        }))
    }

    /// The file.
    pub fn image_file(&self) -> &MetadataFile {
        &self.0.image_file
    }

    /// Finds the image's tables.
    ///
    /// # Errors
    /// As [`Layout::load`].
    pub fn load(&self, header: &Qcow2Header, writable: bool) -> io::Result<()> {
        let layout = Layout::load(&self.0.image_file, header, writable)?;
        *self
            .0
            .layout
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Some(layout);
        Ok(())
    }

    /// Writes the size of the disk, once the tables for it are in the file.
    ///
    /// # Errors
    /// The medium's; the image is read-only then.
    pub fn set_size(&self, size: u64) -> io::Result<()> {
        let mut layout = self
            .0
            .layout
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let layout = layout.as_mut().ok_or(io::ErrorKind::InvalidInput)?;
        layout.set_size(&self.0.image_file, size)
    }

    /// Whether the disk's bytes can be in this range of the file.
    ///
    /// # Errors
    /// One that says that and why they cannot.
    pub fn check_data(&self, offset: u64, len: u64) -> io::Result<()> {
        let layout = self.0.layout.read().unwrap_or_else(PoisonError::into_inner);
        if layout.as_ref().is_some_and(|it| it.has_table(offset, len)) {
            let what = format!("a table has data at {offset:#x}, where tables are");
            return Err(damaged(&what));
        }
        Ok(())
    }

    /// Whether the bytes at `offset` of the disk, which are compressed, are where the disk's
    /// bytes can be: that is free once they are written.
    ///
    /// # Errors
    /// As there; and the medium's.
    pub fn check_compressed(&self, offset: u64) -> io::Result<()> {
        let layout = self.0.layout.read().unwrap_or_else(PoisonError::into_inner);
        let range = match layout.as_ref() {
            Some(layout) => layout.compressed(&self.0.image_file, offset)?,
            None => None,
        };
        drop(layout);
        range.map_or(Ok(()), |(at, len)| self.check_data(at, len))
    }

    /// The cluster with the disk's byte `offset`, if the file says that it is compressed, and
    /// where in it that is.
    ///
    /// # Errors
    /// The medium's; or that it is damaged.
    pub fn inflate(&self, offset: u64) -> io::Result<Option<(usize, Vec<u8>)>> {
        let layout = self.0.layout.read().unwrap_or_else(PoisonError::into_inner);
        let Some(layout) = layout.as_ref() else {
            return Ok(None);
        };
        let Some((at, len)) = layout.compressed(&self.0.image_file, offset)? else {
            return Ok(None);
        };
        let (size, within) = layout.cluster(offset);
        let cluster = inflate(&self.0.image_file, at, len as usize, size)?;
        Ok(Some((within, cluster)))
    }

    /// Whether these bytes, which are the disk's, count as used: else something else, and
    /// that may be a table, will lie there soon.
    ///
    /// # Errors
    /// One that says that they do not; and the medium's.
    pub fn check_used(&self, offset: u64, len: u64) -> io::Result<()> {
        let layout = self.0.layout.read().unwrap_or_else(PoisonError::into_inner);
        let free = match layout.as_ref() {
            Some(layout) => layout.first_free(&self.0.image_file, offset, len)?,
            None => None,
        };
        free.map_or(Ok(()), |at| {
            let what = format!("a table has data at {at:#x}, which counts as free");
            Err(damaged(&what))
        })
    }

    /// As [`Storage::check_data`], of bytes that were written before.
    ///
    /// # Errors
    /// As there.
    pub fn check_existing(&self, offset: u64, len: u64) -> io::Result<()> {
        if offset >= self.0.image_file.len() && offset >= self.0.image_file.refresh_len()? {
            return Err(beyond(offset));
        }
        self.check_data(offset, len)
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.image_file.name())
    }
}

impl imago::Storage for Storage {
    fn size(&self) -> io::Result<u64> {
        self.0.image_file.refresh_len()
    }

    // SAFETY: as the trait says.
    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        self.0
            .image_file
            .read_padded(&mut bufv.into_inner(), offset)
    }

    // SAFETY: as the trait says.
    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut buffers = bufv.into_inner();
        let mut layout = self
            .0
            .layout
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        match layout.as_mut() {
            Some(layout) => layout.write(&self.0.image_file, &mut buffers, offset),
            None => self.0.image_file.write(&mut buffers, offset),
        }
    }

    // SAFETY: as the trait says.
    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // It zeroes data only.
        self.check_data(offset, length)?;
        self.0.image_file.zero(offset, length, false)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(self.0.image_file.file())?)
    }

    // SAFETY: as the trait says.
    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.0.helper
    }

    fn resize(&self, new_size: u64, _prealloc_mode: PreallocateMode) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(self.0.image_file.file(), new_size)?)
    }
}

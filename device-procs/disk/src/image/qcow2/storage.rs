//! The image's file as crate imago reads and writes it, through [`MetadataFile`] and [`Layout`].

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

/// The file of an image or a backing file, as imago sees it.
#[derive(Clone, Debug)]
pub struct Storage(Arc<StorageInner>);

#[derive(Debug)]
struct StorageInner {
    image_file: MetadataFile,
    /// Of a qcow2 image, once its tables are loaded.
    layout: RwLock<Option<Layout>>,
    helper: CommonStorageHelper,
}

impl Storage {
    /// A file whose tables, if it has any, are loaded later.
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

    /// Loads the positions of the image's tables.
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

    /// Writes the size of the disk, after the tables for it are in the file.
    ///
    /// # Errors
    /// The file cannot be written; the image is broken then.
    pub fn set_size(&self, size: u64) -> io::Result<()> {
        let mut layout = self
            .0
            .layout
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let layout = layout.as_mut().ok_or(io::ErrorKind::InvalidInput)?;
        layout.set_size(&self.0.image_file, size)
    }

    /// Checks that data of the disk can be in this range of the file.
    ///
    /// # Errors
    /// A table is there.
    pub fn check_data(&self, offset: u64, len: u64) -> io::Result<()> {
        let layout = self.0.layout.read().unwrap_or_else(PoisonError::into_inner);
        if layout.as_ref().is_some_and(|it| it.has_table(offset, len)) {
            let what = format!("a table maps data to {offset:#x}, where a table is");
            return Err(damaged(&what));
        }
        Ok(())
    }

    /// As [`Storage::check_data`], for the compressed cluster with the disk's byte `offset`,
    /// whose range becomes free when the cluster is written.
    ///
    /// # Errors
    /// As there, or the file cannot be read.
    pub fn check_compressed(&self, offset: u64) -> io::Result<()> {
        let layout = self.0.layout.read().unwrap_or_else(PoisonError::into_inner);
        let range = match layout.as_ref() {
            Some(layout) => layout.compressed(&self.0.image_file, offset)?,
            None => None,
        };
        drop(layout);
        range.map_or(Ok(()), |(at, len)| self.check_data(at, len))
    }

    /// Inflates the cluster with the disk's byte `offset`; returns the position of that byte
    /// in it, and the cluster. `None` if the cluster is not compressed in the file.
    ///
    /// # Errors
    /// The file cannot be read, or the image is damaged.
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

    /// Checks that these bytes, which are data of the disk, have a refcount. Otherwise
    /// something else, perhaps a table, will be allocated there.
    ///
    /// # Errors
    /// They have none, or the file cannot be read.
    pub fn check_used(&self, offset: u64, len: u64) -> io::Result<()> {
        let layout = self.0.layout.read().unwrap_or_else(PoisonError::into_inner);
        let free = match layout.as_ref() {
            Some(layout) => layout.first_free(&self.0.image_file, offset, len)?,
            None => None,
        };
        free.map_or(Ok(()), |at| {
            let what = format!("a table maps data to {at:#x}, which has a refcount of 0");
            Err(damaged(&what))
        })
    }

    /// As [`Storage::check_data`], for data that must be in the file already.
    ///
    /// # Errors
    /// As there, or the file ends before the range.
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

    // SAFETY: the caller keeps the contract of the trait; nothing here adds to it.
    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        self.0
            .image_file
            .read_padded(&mut bufv.into_inner(), offset)
    }

    // SAFETY: the caller keeps the contract of the trait; nothing here adds to it.
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

    // SAFETY: the caller keeps the contract of the trait; nothing here adds to it.
    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // imago zeroes only data with this.
        self.check_data(offset, length)?;
        self.0.image_file.zero(offset, length, false)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(self.0.image_file.file())?)
    }

    // SAFETY: the caller keeps the contract of the trait; nothing here adds to it.
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

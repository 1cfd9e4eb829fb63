//! `device-disk create`: makes images.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::Args;
use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use rustix::fs::{AtFlags, CWD, RenameFlags};

use super::metadata_file::MetadataFile;
use super::qcow::header::QcowHeader;
use super::qcow2::storage::Storage;
use super::{BackingPolicy, ImageFormat, ImageOrigin, SECTOR, backing, open_file};
use crate::lock;

/// Longest name of another file that QEMU, and we, read in an image.
const MAX_NAME: usize = 1023;

/// What image to make.
#[derive(Args, Clone, Debug)]
pub struct CreateOptions {
    /// The image's file
    file: PathBuf,

    /// Its format
    #[arg(long, value_enum, value_name = "raw|qcow2|qcow")]
    format: ImageFormat,

    /// Size of the disk: a number of bytes, or with K, M, G or T
    #[arg(long, value_name = "SIZE", value_parser = outrigger_cli::size::parse)]
    size: u64,

    /// Size of a cluster, which qcow2 and qcow images consist of [default: 64K; of qcow 4K, or
    /// 512 on another image]
    #[arg(long, value_name = "SIZE", value_parser = outrigger_cli::size::parse)]
    cluster_size: Option<u64>,

    /// Image that this one is to lie on: what has not been written here is read there; a
    /// relative path is relative to the new image
    #[arg(long, value_name = "PATH", requires = "backing_format")]
    backing: Option<String>,

    /// Format of that image
    #[arg(long, value_name = "raw|qcow2", requires = "backing",
          value_parser = ["raw", "qcow2"])]
    backing_format: Option<String>,

    /// Replace the file if there is one
    #[arg(long)]
    force: bool,
}

impl CreateOptions {
    /// Makes the image: all of it, or nothing.
    ///
    /// # Errors
    /// One line that names the file.
    pub fn make(&self) -> io::Result<()> {
        let name = self.file.display().to_string();
        let made = self.check().and_then(|()| self.place());
        made.map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))
    }

    /// What can be seen before there is a file.
    fn check(&self) -> io::Result<()> {
        let refused = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if self.size == 0 || !self.size.is_multiple_of(SECTOR) {
            return refused("--size: a disk has one or more sectors of 512 bytes");
        }
        if self.size > i64::MAX as u64 {
            return refused("--size: no disk is that large");
        }
        let largest = match self.format {
            ImageFormat::Raw => 0,
            ImageFormat::Qcow2 => 2 << 20,
            ImageFormat::Qcow => 64 << 10,
        };
        if let Some(cluster) = self.cluster_size {
            if self.format == ImageFormat::Raw {
                return refused("--cluster-size: a raw image has no clusters");
            }
            if !cluster.is_power_of_two() || !(512..=largest).contains(&cluster) {
                let why = format!("--cluster-size: a power of two from 512 to {largest}");
                return refused(&why);
            }
        }
        if let Some((name, format)) = self.below() {
            if self.format == ImageFormat::Raw {
                return refused("--backing: a raw image cannot lie on another one");
            }
            let origin = ImageOrigin {
                name: "",
                directory: Some(self.directory()),
                backing: BackingPolicy::Allow,
                lock: false,
                depth: 0,
            };
            // That it can be opened is all that matters here.
            let said = match self.format {
                // It has no room for the word.
                ImageFormat::Qcow if format != "raw" => {
                    return refused("--backing-format: a qcow image can lie on a raw one only");
                }
                ImageFormat::Qcow => None,
                _ => Some(format),
            };
            drop(backing::open(name, said, &origin)?);
            if is_same(&self.directory().join(name), &self.file) {
                return refused("--backing: an image cannot lie on itself");
            }
            if name.len() > MAX_NAME {
                let why = format!("--backing: a name has at most {MAX_NAME} bytes");
                return refused(&why);
            }
        }
        Ok(())
    }

    fn below(&self) -> Option<(&str, &str)> {
        self.backing.as_deref().zip(self.backing_format.as_deref())
    }

    /// Where the file is to be.
    fn directory(&self) -> &Path {
        match self.file.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        }
    }

    /// Makes the image beside where it is to be, and moves it there.
    fn place(&self) -> io::Result<()> {
        let Some(name) = self.file.file_name() else {
            return Err(io::ErrorKind::IsADirectory.into());
        };
        let replaced = match self.file.symlink_metadata() {
            Ok(metadata) if !metadata.is_file() => {
                return Err(io::Error::other("there is something that is no file"));
            }
            Ok(_) if !self.force => return Err(there_already()),
            Ok(metadata) => {
                lock::take(&open_file(&self.file, false)?, lock::ImageAccess::Grow)?;
                Some(metadata)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.new", std::process::id()));
        let new = Unplaced(self.directory().join(hidden));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&new.0)?;
        if let Some(replaced) = replaced {
            // Who could not read the old one must not read this one.
            file.set_permissions(replaced.permissions())?;
        }
        self.fill(file.try_clone()?)?;
        file.sync_all()?;
        if self.force {
            std::fs::rename(&new.0, &self.file)?;
        } else {
            move_to_nothing(&new.0, &self.file)?;
        }
        // So that it is there after a power cut as well.
        File::open(self.directory())?.sync_all()
    }

    fn fill(&self, file: File) -> io::Result<()> {
        let image_file = MetadataFile::new(file, &self.file.display().to_string())?;
        match self.format {
            ImageFormat::Raw => image_file.zero(0, self.size, true),
            ImageFormat::Qcow => {
                let bits = self.cluster_size.map(u64::ilog2);
                let name = self.below().map(|(name, _)| name);
                QcowHeader::new(self.size, bits, name).create(&image_file)
            }
            ImageFormat::Qcow2 => {
                let mut image =
                    Qcow2::<Storage>::create_builder(Storage::new(image_file)).size(self.size);
                if let Some(cluster) = self.cluster_size {
                    image = image.cluster_size(cluster as usize);
                }
                if let Some((name, format)) = self.below() {
                    image = image.backing(name.to_owned(), format.to_owned());
                }
                image.create()
            }
        }
    }
}

fn is_same(one: &Path, other: &Path) -> bool {
    let id = |path: &Path| path.metadata().map(|it| (it.dev(), it.ino())).ok();
    id(one).is_some_and(|one| id(other) == Some(one))
}

fn there_already() -> io::Error {
    let why = "there is a file already (--force replaces it)";
    io::Error::new(io::ErrorKind::AlreadyExists, why)
}

/// Moves a file to where there is none.
fn move_to_nothing(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::io::Errno;
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not all file systems can.
        Err(Errno::INVAL | Errno::NOSYS) => {
            match rustix::fs::linkat(CWD, from, CWD, to, AtFlags::empty()) {
                Err(Errno::EXIST) => Err(there_already()),
                result => Ok(result?),
            }
        }
        Err(Errno::EXIST) => Err(there_already()),
        result => Ok(result?),
    }
}

/// A file that is removed unless it has got another name.
struct Unplaced(PathBuf);

impl Drop for Unplaced {
    fn drop(&mut self) {
        // Nothing is left to do about an error; mostly there is no such file any more.
        let _ = std::fs::remove_file(&self.0);
    }
}

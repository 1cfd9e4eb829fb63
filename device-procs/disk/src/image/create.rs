//! `device-disk create`: creates images.

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

/// The longest name of a backing file, in QEMU and here.
const MAX_BACKING_NAME: usize = 1023;

/// Which image to create.
#[derive(Args, Clone, Debug)]
pub struct CreateOptions {
    /// The image's file
    file: PathBuf,

    /// The format of the image
    #[arg(long, value_enum, value_name = "raw|qcow2|qcow")]
    format: ImageFormat,

    /// Size of the disk: a number of bytes, or with K, M, G or T
    #[arg(long, value_name = "SIZE", value_parser = outrigger_cli::size::parse)]
    size: u64,

    /// Cluster size of a qcow2 or qcow image [default: 64K; for qcow 4K, or 512 with a backing
    /// file]
    #[arg(long, value_name = "SIZE", value_parser = outrigger_cli::size::parse)]
    cluster_size: Option<u64>,

    /// Backing file: what is not written in the new image is read from there. A relative path
    /// is relative to the new image
    #[arg(long, value_name = "PATH", requires = "backing_format")]
    backing: Option<String>,

    /// Format of the backing file
    #[arg(long, value_name = "raw|qcow2", requires = "backing",
          value_parser = ["raw", "qcow2"])]
    backing_format: Option<String>,

    /// Replace the file if there is one
    #[arg(long)]
    force: bool,
}

impl CreateOptions {
    /// Creates the image, completely or not at all.
    ///
    /// # Errors
    /// The options are invalid or the file cannot be created. The error names the file.
    pub fn make(&self) -> io::Result<()> {
        let name = self.file.display().to_string();
        let made = self.check().and_then(|()| self.create());
        made.map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))
    }

    /// Checks the options.
    fn check(&self) -> io::Result<()> {
        let refused = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if self.size == 0 || !self.size.is_multiple_of(SECTOR) {
            return refused("--size: it must be a multiple of 512, and not 0");
        }
        if self.size > i64::MAX as u64 {
            return refused("--size: it is too large");
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
                let why =
                    format!("--cluster-size: it must be a power of two from 512 to {largest}");
                return refused(&why);
            }
        }
        if let Some((name, format)) = self.backing() {
            if self.format == ImageFormat::Raw {
                return refused("--backing: a raw image cannot have a backing file");
            }
            let origin = ImageOrigin {
                name: "",
                directory: Some(self.directory()),
                backing: BackingPolicy::Allow,
                lock: false,
                depth: 0,
            };
            // Checks that the backing file can be opened.
            let format = match self.format {
                // A qcow image does not store the format.
                ImageFormat::Qcow if format != "raw" => {
                    return refused(
                        "--backing-format: the backing file of a qcow image must be raw",
                    );
                }
                ImageFormat::Qcow => None,
                _ => Some(format),
            };
            drop(backing::open(name, format, &origin)?);
            if is_same(&self.directory().join(name), &self.file) {
                return refused("--backing: an image cannot be its own backing file");
            }
            if name.len() > MAX_BACKING_NAME {
                let why = format!("--backing: its name is longer than {MAX_BACKING_NAME} bytes");
                return refused(&why);
            }
        }
        Ok(())
    }

    /// Name and format of the backing file.
    fn backing(&self) -> Option<(&str, &str)> {
        self.backing.as_deref().zip(self.backing_format.as_deref())
    }

    /// The directory of the new file.
    fn directory(&self) -> &Path {
        match self.file.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        }
    }

    /// Creates the image under a temporary name, and renames it.
    fn create(&self) -> io::Result<()> {
        let Some(name) = self.file.file_name() else {
            return Err(io::ErrorKind::IsADirectory.into());
        };
        let replaced = match self.file.symlink_metadata() {
            Ok(metadata) if !metadata.is_file() => {
                return Err(io::Error::other("it exists and is not a regular file"));
            }
            Ok(_) if !self.force => return Err(already_exists()),
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
        let new = TemporaryFile(self.directory().join(hidden));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&new.0)?;
        if let Some(replaced) = replaced {
            // Users that could not read the old file must not read the new one.
            file.set_permissions(replaced.permissions())?;
        }
        self.fill(file.try_clone()?)?;
        file.sync_all()?;
        if self.force {
            std::fs::rename(&new.0, &self.file)?;
        } else {
            rename_without_replacing(&new.0, &self.file)?;
        }
        // So that the file is there after a power failure.
        File::open(self.directory())?.sync_all()
    }

    fn fill(&self, file: File) -> io::Result<()> {
        let image_file = MetadataFile::new(file, &self.file.display().to_string())?;
        match self.format {
            ImageFormat::Raw => image_file.zero(0, self.size, true),
            ImageFormat::Qcow => {
                let bits = self.cluster_size.map(u64::ilog2);
                let name = self.backing().map(|(name, _)| name);
                QcowHeader::new(self.size, bits, name).create(&image_file)
            }
            ImageFormat::Qcow2 => {
                let mut image =
                    Qcow2::<Storage>::create_builder(Storage::new(image_file)).size(self.size);
                if let Some(cluster) = self.cluster_size {
                    image = image.cluster_size(cluster as usize);
                }
                if let Some((name, format)) = self.backing() {
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

fn already_exists() -> io::Error {
    let why = "it exists already (use --force to replace it)";
    io::Error::new(io::ErrorKind::AlreadyExists, why)
}

/// Renames a file, unless the new name exists.
fn rename_without_replacing(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::io::Errno;
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not all file systems support this.
        Err(Errno::INVAL | Errno::NOSYS) => {
            match rustix::fs::linkat(CWD, from, CWD, to, AtFlags::empty()) {
                Err(Errno::EXIST) => Err(already_exists()),
                result => Ok(result?),
            }
        }
        Err(Errno::EXIST) => Err(already_exists()),
        result => Ok(result?),
    }
}

/// A file that is removed when this is dropped, unless it was renamed.
struct TemporaryFile(PathBuf);

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        // After a rename there is no such file.
        let _ = std::fs::remove_file(&self.0);
    }
}

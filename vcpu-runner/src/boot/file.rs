//! Files that the guest boots from.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::Error;
use crate::vm::memory::GuestRam;

/// An open file and its name for messages.
pub(super) struct NamedFile {
    path: PathBuf,
    pub file: File,
}

impl NamedFile {
    /// Opens a regular file that is not empty.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let error = |why: String| Error::Boot {
            path: path.to_owned(),
            why,
        };
        let file = File::open(path).map_err(|e| error(e.to_string()))?;
        let metadata = file.metadata().map_err(|e| error(e.to_string()))?;
        if !metadata.is_file() {
            return Err(error("not a regular file".into()));
        }
        if metadata.len() == 0 {
            return Err(error("empty".into()));
        }
        Ok(NamedFile {
            path: path.to_owned(),
            file,
        })
    }

    /// Its present size in bytes.
    pub fn size(&self) -> Result<u64, Error> {
        rustix::fs::fstat(&self.file)
            .map(|stat| stat.st_size as u64)
            .map_err(|e| self.error(e))
    }

    /// Its name for messages.
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// An error that names the file.
    pub fn error(&self, why: impl ToString) -> Error {
        Error::Boot {
            path: self.path.clone(),
            why: why.to_string(),
        }
    }

    /// Copies its first `size` bytes to `address`.
    pub fn read_to(&self, ram: &GuestRam, address: u64, size: u64) -> Result<(), Error> {
        let length = usize::try_from(size).map_err(|e| self.error(e))?;
        let slice = ram
            .memory()
            .get_slice(GuestAddress(address), length)
            .map_err(|e| self.error(e))?;
        let mut buffer = vec![0; length.min(1 << 20)];
        let mut done = 0;
        while done < length {
            let count = buffer.len().min(length - done);
            self.file
                .read_exact_at(&mut buffer[..count], done as u64)
                .map_err(|e| self.error(e))?;
            slice
                .subslice(done, count)
                .map_err(|e| self.error(e))?
                .copy_from(&buffer[..count]);
            done += count;
        }
        Ok(())
    }
}

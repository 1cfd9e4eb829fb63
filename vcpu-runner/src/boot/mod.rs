//! What is in memory and in the registers when the first vCPU starts.

pub mod acpi;
pub mod cpuid;
mod image;
mod linux;
mod pvh;
pub mod registers;

use std::fs::File;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use crate::Error;
use crate::layout;
use crate::vm::memory::Ram;

/// How the first vCPU enters the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, EBX = PVH start info (Xen's PVH
    /// boot protocol).
    Pvh(u64),
    /// 64-bit long mode, RSI = zero page (Linux' 64-bit boot protocol).
    Linux64(u64),
}

/// The files and words that the guest boots from. The files stay open, because
/// a reset boots again.
pub struct BootSource {
    kernel: NamedFile,
    initrd: Option<NamedFile>,
    cmdline: String,
}

struct NamedFile {
    path: PathBuf,
    file: File,
}

impl NamedFile {
    fn open(path: &Path) -> Result<Self, Error> {
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

    fn size(&self) -> Result<u64, Error> {
        rustix::fs::fstat(&self.file)
            .map(|stat| stat.st_size as u64)
            .map_err(|e| self.error(e))
    }

    fn error(&self, why: impl ToString) -> Error {
        Error::Boot {
            path: self.path.clone(),
            why: why.to_string(),
        }
    }
}

impl BootSource {
    /// Opens the files.
    ///
    /// # Errors
    /// Names the file that is missing, empty or no file, or the command line if
    /// it is too long.
    pub fn open(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<Self, Error> {
        if cmdline.len() >= layout::CMDLINE_SIZE || cmdline.contains('\0') {
            return Err(Error::BootSetup(format!(
                "the kernel command line must be shorter than {} bytes and without NUL",
                layout::CMDLINE_SIZE
            )));
        }
        Ok(BootSource {
            kernel: NamedFile::open(kernel)?,
            initrd: initrd.map(NamedFile::open).transpose()?,
            cmdline: cmdline.to_owned(),
        })
    }

    /// Fills `ram` for a start with `cpus` vCPUs.
    ///
    /// # Errors
    /// Says what does not fit or is no kernel.
    pub fn load(&self, ram: &Ram, cpus: usize) -> Result<Entry, Error> {
        let image = image::load(&self.kernel, ram)?;
        let initrd = self
            .initrd
            .as_ref()
            .map(|initrd| place_initrd(initrd, ram, image.end))
            .transpose()?;
        let memory = ram.memory();
        let mut cmdline = self.cmdline.clone().into_bytes();
        cmdline.push(0);
        memory
            .write_slice(&cmdline, GuestAddress(layout::CMDLINE))
            .map_err(|e| Error::BootSetup(format!("command line: {e}")))?;
        let rsdp = acpi::write(ram, cpus)?;
        match image.entry {
            Entry::Pvh(_) => pvh::write_start_info(ram, initrd, rsdp)?,
            Entry::Linux64(_) => {
                linux::write_zero_page(ram, image.setup_header, initrd, self.cmdline.len(), rsdp)?
            }
        }
        Ok(image.entry)
    }
}

/// Where the initrd is.
#[derive(Clone, Copy, Debug)]
struct Initrd {
    address: u64,
    size: u64,
}

/// Reads the initrd to the end of the RAM below the hole, where no kernel
/// unpacks itself.
fn place_initrd(initrd: &NamedFile, ram: &Ram, kernel_end: u64) -> Result<Initrd, Error> {
    let size = initrd.size()?;
    let end = ram.low_end();
    let address = end
        .checked_sub(size)
        .map(|address| address & !0xfff)
        .filter(|&address| address >= kernel_end.max(layout::HIGH_MEMORY))
        .ok_or_else(|| {
            initrd.error(format!(
                "its {size} bytes do not fit between the kernel's end at {kernel_end:#x} and the \
                 end of memory at {end:#x}"
            ))
        })?;
    let slice = vm_memory::GuestMemoryBackend::get_slice(
        ram.memory(),
        GuestAddress(address),
        size as usize,
    )
    .map_err(|e| initrd.error(e))?;
    image::read_at(&initrd.file, 0, &slice).map_err(|e| initrd.error(e))?;
    Ok(Initrd { address, size })
}

/// The memory map: start, size and whether it is RAM.
fn memory_map(ram: &Ram) -> Vec<(u64, u64, bool)> {
    let mut map = vec![
        (0, layout::LOW_MEMORY_END, true),
        (layout::ACPI, layout::ACPI_SIZE, false),
        (layout::ECAM, layout::ECAM_SIZE, false),
    ];
    for (start, size) in ram.ranges() {
        let from = start.max(layout::HIGH_MEMORY);
        map.push((from, start + size - from, true));
    }
    map.sort_unstable();
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_is_sorted_and_has_all_ram() {
        let ram = Ram::new("6G".parse().unwrap()).unwrap();
        let map = memory_map(&ram);
        assert!(map.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        let total: u64 = map.iter().filter(|m| m.2).map(|m| m.1).sum();
        let lost = layout::HIGH_MEMORY - layout::LOW_MEMORY_END;
        assert_eq!(total, (6 << 30) - lost);
    }

    #[test]
    fn files_that_are_no_kernels_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let ram = Ram::new("16M".parse().unwrap()).unwrap();
        let text = |e: Error| e.to_string();
        let missing = dir.path().join("missing");
        assert!(text(BootSource::open(&missing, None, "").err().unwrap()).contains("missing"));
        let error = BootSource::open(dir.path(), None, "").err().unwrap();
        assert!(text(error).contains("not a regular file"));
        let path = dir.path().join("k");
        std::fs::write(&path, "").unwrap();
        let error = BootSource::open(&path, None, "").err().unwrap();
        assert!(text(error).contains("empty"));
        std::fs::write(&path, "not a kernel at all").unwrap();
        let source = BootSource::open(&path, None, "").unwrap();
        assert!(source.load(&ram, 1).is_err());
        std::fs::write(&path, b"\x7fELF\x02\x01\x01").unwrap();
        let source = BootSource::open(&path, None, "").unwrap();
        assert!(source.load(&ram, 1).is_err());
    }
}

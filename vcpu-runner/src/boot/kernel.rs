//! A kernel with its initrd and command line, and what its boot protocol wants to
//! find in memory.

use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use super::file::NamedFile;
use super::image::{self, Protocol};
use super::{Entry, acpi, linux, pvh};
use crate::Error;
use crate::layout;
use crate::vm::memory::Ram;

/// The files and words that a kernel boots from.
pub struct Kernel {
    kernel: NamedFile,
    initrd: Option<NamedFile>,
    cmdline: String,
}

impl Kernel {
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
        Ok(Kernel {
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
        Ok(match image.protocol {
            Protocol::Pvh => {
                pvh::write_start_info(ram, initrd, rsdp)?;
                Entry::Pvh(image.entry)
            }
            Protocol::Linux64(header) => {
                linux::write_zero_page(ram, header, initrd, self.cmdline.len(), rsdp)?;
                Entry::Linux64(image.entry)
            }
        })
    }
}

/// Where the initrd is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Initrd {
    pub address: u64,
    pub size: u64,
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
    initrd.read_to(ram, address, size)?;
    Ok(Initrd { address, size })
}

/// The memory map: start, size and whether it is RAM.
pub(super) fn memory_map(ram: &Ram) -> Vec<(u64, u64, bool)> {
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
        assert!(text(Kernel::open(&missing, None, "").err().unwrap()).contains("missing"));
        let error = Kernel::open(dir.path(), None, "").err().unwrap();
        assert!(text(error).contains("not a regular file"));
        let path = dir.path().join("k");
        std::fs::write(&path, "").unwrap();
        let error = Kernel::open(&path, None, "").err().unwrap();
        assert!(text(error).contains("empty"));
        std::fs::write(&path, "not a kernel at all").unwrap();
        let source = Kernel::open(&path, None, "").unwrap();
        assert!(source.load(&ram, 1).is_err());
        std::fs::write(&path, b"\x7fELF\x02\x01\x01").unwrap();
        let source = Kernel::open(&path, None, "").unwrap();
        assert!(source.load(&ram, 1).is_err());
    }
}

//! A kernel with its initrd and command line, and what its boot protocol expects in
//! memory.

use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use super::file::NamedFile;
use super::kernel_image::{self, BootProtocol};
use super::memory_map::Initrd;
use super::{EntryPoint, acpi, linux, pvh};
use crate::Error;
use crate::layout;
use crate::vm::memory::GuestRam;

/// A kernel, its initrd and its command line.
pub struct KernelBoot {
    kernel: NamedFile,
    initrd: Option<NamedFile>,
    cmdline: String,
}

impl KernelBoot {
    /// Opens the files.
    ///
    /// # Errors
    /// Names the file that is missing, empty or not a regular file; or says that the command
    /// line is too long.
    pub fn open(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<Self, Error> {
        if cmdline.len() >= layout::CMDLINE_SIZE || cmdline.contains('\0') {
            return Err(Error::BootSetup(format!(
                "the kernel command line of {} bytes is longer than {} bytes or contains a NUL",
                cmdline.len(),
                layout::CMDLINE_SIZE - 1
            )));
        }
        Ok(KernelBoot {
            kernel: NamedFile::open(kernel)?,
            initrd: initrd.map(NamedFile::open).transpose()?,
            cmdline: cmdline.to_owned(),
        })
    }

    /// Fills `ram` for a start with `cpus` vCPUs.
    ///
    /// # Errors
    /// Says what does not fit into memory, or that the file is not a kernel.
    pub fn load(&self, ram: &GuestRam, cpus: usize) -> Result<EntryPoint, Error> {
        let image = kernel_image::load(&self.kernel, ram)?;
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
            BootProtocol::Pvh => {
                pvh::write_start_info(ram, initrd, rsdp)?;
                EntryPoint::Pvh(image.entry)
            }
            BootProtocol::Linux64(header) => {
                linux::write_zero_page(ram, header, initrd, self.cmdline.len(), rsdp)?;
                EntryPoint::Linux64(image.entry)
            }
        })
    }
}

/// Loads the initrd at the end of the RAM below the device hole, where no kernel
/// decompresses itself to.
fn place_initrd(initrd: &NamedFile, ram: &GuestRam, kernel_end: u64) -> Result<Initrd, Error> {
    let size = initrd.size()?;
    let end = ram.low_end();
    let address = end
        .checked_sub(size)
        .map(|address| address & !0xfff)
        .filter(|&address| address >= kernel_end.max(layout::HIGH_MEMORY))
        .ok_or_else(|| {
            initrd.error(format!(
                "its {size} bytes do not fit between the end of the kernel at {kernel_end:#x} and \
                 the end of memory at {end:#x}"
            ))
        })?;
    initrd.read_to(ram, address, size)?;
    Ok(Initrd { address, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_a_kernel_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let ram = GuestRam::new("16M".parse().unwrap()).unwrap();
        let text = |e: Error| e.to_string();
        let missing = dir.path().join("missing");
        assert!(text(KernelBoot::open(&missing, None, "").err().unwrap()).contains("missing"));
        let error = KernelBoot::open(dir.path(), None, "").err().unwrap();
        assert!(text(error).contains("not a regular file"));
        let path = dir.path().join("k");
        std::fs::write(&path, "").unwrap();
        let error = KernelBoot::open(&path, None, "").err().unwrap();
        assert!(text(error).contains("empty"));
        std::fs::write(&path, "not a kernel at all").unwrap();
        let source = KernelBoot::open(&path, None, "").unwrap();
        assert!(source.load(&ram, 1).is_err());
        std::fs::write(&path, b"\x7fELF\x02\x01\x01").unwrap();
        let source = KernelBoot::open(&path, None, "").unwrap();
        assert!(source.load(&ram, 1).is_err());
    }
}

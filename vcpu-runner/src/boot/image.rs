//! Kernel images: ELF and bzImage, by crate linux-loader.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::{XLF_KERNEL_64, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{GuestAddress, VolatileSlice};

use super::{Entry, NamedFile};
use crate::Error;
use crate::layout::HIGH_MEMORY;
use crate::vm::memory::Ram;

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// The 64-bit entry point of a bzImage, from where it was loaded.
const ENTRY_64: u64 = 0x200;

/// A loaded kernel.
pub(super) struct Image {
    pub entry: Entry,
    /// First byte after all that it needs at first.
    pub end: u64,
    pub setup_header: Option<setup_header>,
}

/// Loads `kernel` into `ram`.
pub(super) fn load(kernel: &NamedFile, ram: &Ram) -> Result<Image, Error> {
    let mut magic = [0; 4];
    let mut file = &kernel.file;
    kernel
        .file
        .read_exact_at(&mut magic, 0)
        .map_err(|_| kernel.error("shorter than any kernel"))?;
    let highest = Some(GuestAddress(HIGH_MEMORY));
    let image = if magic == ELF_MAGIC {
        let loaded = Elf::load(ram.memory(), None, &mut file, None)
            .map_err(|e| kernel.error(format!("not a kernel for this memory: {e}")))?;
        let entry = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(address) => Entry::Pvh(address.0),
            _ => Entry::Linux64(loaded.kernel_load.0),
        };
        Image {
            entry,
            end: loaded.kernel_end,
            setup_header: None,
        }
    } else {
        let loaded = BzImage::load(ram.memory(), None, &mut file, highest)
            .map_err(|e| kernel.error(format!("neither ELF nor bzImage: {e}")))?;
        let header = loaded
            .setup_header
            .ok_or_else(|| kernel.error("a bzImage without setup header"))?;
        if header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(kernel.error("a bzImage without 64-bit entry point"));
        }
        let start = loaded.kernel_load.0;
        // It unpacks itself to its preferred address and needs this much there.
        let unpacked = header.pref_address.max(start) + u64::from(header.init_size);
        Image {
            entry: Entry::Linux64(start + ENTRY_64),
            end: loaded.kernel_end.max(unpacked),
            setup_header: Some(header),
        }
    };
    if image.end > ram.low_end() {
        return Err(kernel.error(format!(
            "it needs memory up to {:#x}, and there is none beyond {:#x}",
            image.end,
            ram.low_end()
        )));
    }
    Ok(image)
}

/// Fills `slice` from `file` at `offset`, without moving the file's position.
pub(super) fn read_at(file: &File, mut offset: u64, slice: &VolatileSlice) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    while done < slice.len() {
        let count = buffer.len().min(slice.len() - done);
        file.read_exact_at(&mut buffer[..count], offset)?;
        slice
            .subslice(done, count)
            .map_err(io::Error::other)?
            .copy_from(&buffer[..count]);
        done += count;
        offset += count as u64;
    }
    Ok(())
}

//! Loads kernel images, ELF and bzImage, with crate linux-loader.

use std::mem::offset_of;
use std::os::unix::fs::FileExt;

use libc::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, EM_X86_64, Elf64_Ehdr, Elf64_Phdr, PT_INTERP,
};
use linux_loader::bootparam::{XLF_KERNEL_64, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{self, BzImage, Elf, KernelLoader, bzimage, elf};
use vm_memory::GuestAddress;

use super::file::NamedFile;
use crate::Error;
use crate::layout::HIGH_MEMORY;
use crate::vm::memory::GuestRam;

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Offset of the 64-bit entry point of a bzImage.
const ENTRY_64: u64 = 0x200;
/// Unit of the length of the real-mode part of a bzImage, in bytes.
const SECTOR: u64 = 512;

/// The boot protocol of a kernel.
pub(super) enum BootProtocol {
    /// Xen's PVH boot protocol.
    Pvh,
    /// The 64-bit boot protocol of Linux; a bzImage has a setup header.
    Linux64(Option<setup_header>),
}

/// A loaded kernel.
pub(super) struct LoadedKernel {
    pub protocol: BootProtocol,
    /// Address of its first instruction.
    pub entry: u64,
    /// First byte after the memory that it uses at first.
    pub end: u64,
}

/// Loads `kernel` into `ram`.
pub(super) fn load(kernel: &NamedFile, ram: &GuestRam) -> Result<LoadedKernel, Error> {
    let mut magic = [0; 4];
    let mut file = &kernel.file;
    kernel
        .file
        .read_exact_at(&mut magic, 0)
        .map_err(|_| kernel.error("shorter than any kernel"))?;
    let highest = Some(GuestAddress(HIGH_MEMORY));
    let image = if magic == ELF_MAGIC {
        let headers = ElfHeaders::read(kernel)?;
        check_length(kernel, headers.length)?;
        let loaded = Elf::load(ram.memory(), None, &mut file, None).map_err(|e| match e {
            // The file is complete, so it is memory that is missing.
            loader::Error::Elf(elf::Error::ReadKernelImage) => too_large(kernel, ram),
            other => kernel.error(format!("not a kernel: {other}")),
        })?;
        let (protocol, entry) = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(address) => (BootProtocol::Pvh, address.0),
            // The kernel of FreeBSD has an interpreter as well, and a PVH entry point.
            _ if headers.has_interpreter => {
                return Err(kernel.error("a program for Linux, not a kernel"));
            }
            _ => (BootProtocol::Linux64(None), loaded.kernel_load.0),
        };
        LoadedKernel {
            protocol,
            entry,
            end: loaded.kernel_end,
        }
    } else {
        let loaded =
            BzImage::load(ram.memory(), None, &mut file, highest).map_err(|e| match e {
                loader::Error::Bzimage(bzimage::Error::InvalidBzImage) => {
                    kernel.error("neither an ELF file nor a bzImage")
                }
                loader::Error::Bzimage(bzimage::Error::ReadBzImageCompressedKernel) => {
                    too_large(kernel, ram)
                }
                other => kernel.error(format!("not a kernel: {other}")),
            })?;
        let header = loaded
            .setup_header
            .ok_or_else(|| kernel.error("a bzImage without a setup header"))?;
        if header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(kernel.error("a bzImage without 64-bit entry point"));
        }
        let sectors = match header.setup_sects {
            0 => 4,
            count => u64::from(count),
        };
        check_length(
            kernel,
            (sectors + 1) * SECTOR + u64::from(header.syssize) * 16,
        )?;
        let start = loaded.kernel_load.0;
        // It decompresses itself to its preferred address and needs this much memory there.
        let unpacked = header
            .pref_address
            .max(start)
            .saturating_add(header.init_size.into());
        LoadedKernel {
            protocol: BootProtocol::Linux64(Some(header)),
            entry: start + ENTRY_64,
            end: loaded.kernel_end.max(unpacked),
        }
    };
    if image.end > ram.low_end() {
        return Err(kernel.error(format!(
            "it needs memory up to {:#x}, but RAM below the device hole ends at {:#x}",
            image.end,
            ram.low_end()
        )));
    }
    Ok(image)
}

/// Checks that the file has at least `length` bytes.
fn check_length(kernel: &NamedFile, length: u64) -> Result<(), Error> {
    let size = kernel.size()?;
    if size < length {
        return Err(kernel.error(format!("truncated: it has {size} bytes of {length}")));
    }
    Ok(())
}

/// What the runner needs of the headers of an ELF file.
struct ElfHeaders {
    /// The least length of the file: up to the end of its last segment, and of its section
    /// headers, which linkers put last.
    length: u64,
    /// It has a PT_INTERP segment (elf(5)), so a dynamic linker has to load it.
    has_interpreter: bool,
}

impl ElfHeaders {
    fn read(kernel: &NamedFile) -> Result<Self, Error> {
        let mut header = [0; size_of::<Elf64_Ehdr>()];
        read(kernel, &mut header, 0)?;
        if header[EI_CLASS] != ELFCLASS64
            || header[EI_DATA] != ELFDATA2LSB
            || word16(&header, offset_of!(Elf64_Ehdr, e_machine)) != u64::from(EM_X86_64)
        {
            return Err(kernel.error("an ELF file, but not for 64-bit x86"));
        }
        let sections = word64(&header, offset_of!(Elf64_Ehdr, e_shoff));
        let section_size = word16(&header, offset_of!(Elf64_Ehdr, e_shentsize));
        let section_count = word16(&header, offset_of!(Elf64_Ehdr, e_shnum));
        let mut length = sections.saturating_add(section_size * section_count);
        let mut has_interpreter = false;

        let segments = word64(&header, offset_of!(Elf64_Ehdr, e_phoff));
        let segment_count = word16(&header, offset_of!(Elf64_Ehdr, e_phnum));
        let mut segment = [0; size_of::<Elf64_Phdr>()];
        for index in 0..segment_count {
            let at = segments.saturating_add(index * segment.len() as u64);
            read(kernel, &mut segment, at)?;
            let start = word64(&segment, offset_of!(Elf64_Phdr, p_offset));
            let size = word64(&segment, offset_of!(Elf64_Phdr, p_filesz));
            length = length.max(start.saturating_add(size));
            let kind = word32(&segment, offset_of!(Elf64_Phdr, p_type));
            has_interpreter |= kind == PT_INTERP;
        }
        Ok(ElfHeaders {
            length,
            has_interpreter,
        })
    }
}

fn read(kernel: &NamedFile, bytes: &mut [u8], at: u64) -> Result<(), Error> {
    kernel
        .file
        .read_exact_at(bytes, at)
        .map_err(|_| kernel.error("truncated: an ELF file whose headers are incomplete"))
}

/// Read the little-endian number at `at`.
fn word64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn word16(bytes: &[u8], at: usize) -> u64 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]]).into()
}

fn too_large(kernel: &NamedFile, ram: &GuestRam) -> Error {
    let end = ram.low_end();
    kernel.error(format!(
        "it does not fit into RAM, which ends at {end:#x} below the device hole"
    ))
}

//! PVH start info (Xen's public/arch-x86/hvm/start_info.h).

use vm_memory::{Bytes, GuestAddress};

use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};

use super::memory_map::{Initrd, memory_map};
use crate::Error;
use crate::layout::{BOOT_INFO, CMDLINE};
use crate::vm::memory::GuestRam;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// The module list and the memory map follow the start info in its page.
const MODULES: u64 = BOOT_INFO + 0x100;
const MEMORY_MAP: u64 = BOOT_INFO + 0x200;

/// Writes start info, module list and memory map from [`BOOT_INFO`] on.
pub(super) fn write_start_info(
    ram: &GuestRam,
    initrd: Option<Initrd>,
    rsdp: u64,
) -> Result<(), Error> {
    let map = memory_map(ram);
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let memory = ram.memory();
    let error = |e| Error::BootSetup(format!("PVH start info: {e}"));
    memory
        .write_obj(info, GuestAddress(BOOT_INFO))
        .map_err(error)?;
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.size,
            ..Default::default()
        };
        memory
            .write_obj(module, GuestAddress(MODULES))
            .map_err(error)?;
    }
    let mut at = MEMORY_MAP;
    for (addr, size, is_ram) in map {
        let entry = hvm_memmap_table_entry {
            addr,
            size,
            type_: if is_ram { RAM } else { RESERVED },
            reserved: 0,
        };
        memory.write_obj(entry, GuestAddress(at)).map_err(error)?;
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    Ok(())
}

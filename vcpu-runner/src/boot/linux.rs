//! The zero page of the Linux boot protocol (Documentation/arch/x86/boot.rst and
//! zero-page.rst of the kernel).

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::memory_map::{Initrd, memory_map};
use crate::Error;
use crate::layout;
use crate::vm::memory::GuestRam;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// `type_of_loader` of a boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const MINIMUM_ALIGNMENT: u32 = 0x100_0000;

/// Writes the zero page to [`layout::BOOT_INFO`]. A kernel without a setup header (an ELF
/// file) gets a minimal one.
pub(super) fn write_zero_page(
    ram: &GuestRam,
    header: Option<setup_header>,
    initrd: Option<Initrd>,
    cmdline_len: usize,
    rsdp: u64,
) -> Result<(), Error> {
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: MINIMUM_ALIGNMENT,
            ..Default::default()
        }),
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_len as u32;
    if let Some(initrd) = initrd {
        // Both fit into 32 bits: the initrd lies below 3 GiB.
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    let map = memory_map(ram);
    for (entry, &(addr, size, is_ram)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr,
            size,
            r#type: if is_ram { E820_RAM } else { E820_RESERVED },
        };
    }
    params.e820_entries = map.len() as u8;
    ram.memory()
        .write_obj(params, GuestAddress(layout::BOOT_INFO))
        .map_err(|e| Error::BootSetup(format!("zero page: {e}")))
}

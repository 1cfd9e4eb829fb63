//! The loader's start info: `hvm_start_info`
//! (https://xenbits.xen.org/docs/unstable/misc/pvh.html).

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

const MAGIC: u32 = 0x336e_c578;
const TYPE_RAM: u32 = 1;
const LONGEST_COMMAND_LINE: usize = 4096;
const MOST_RANGES: usize = 128;

#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    /// From version 1 on.
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// A copy of what the guest needs of it.
pub struct Machine {
    /// Words after the kernel's name.
    pub command_line: String,
    /// Address of the ACPI root pointer; 0 if the loader gave none.
    pub rsdp: u64,
    /// Address ranges of RAM.
    pub ram: Vec<Range<u64>>,
}

/// Reads the structure at `address`.
///
/// # Errors
/// It is not a start info, or has no memory map.
///
/// # Safety
/// `address` is what the loader passed in EBX.
pub unsafe fn read(address: u64) -> Result<Machine, &'static str> {
    // SAFETY: by the caller's promise; everything in it is below 4 GiB and mapped.
    let info = unsafe { &*(address as *const StartInfo) };
    if info.magic != MAGIC {
        return Err("EBX is not the address of a hvm_start_info");
    }
    if info.version < 1 || info.memory_map == 0 {
        return Err("the hvm_start_info has no memory map");
    }
    let mut line = Vec::new();
    for offset in 0..LONGEST_COMMAND_LINE as u64 {
        if info.command_line == 0 {
            break;
        }
        // SAFETY: the string ends with a zero byte, which ends this loop.
        match unsafe { *((info.command_line + offset) as *const u8) } {
            0 => break,
            byte => line.push(byte),
        }
    }
    let mut ram = Vec::new();
    for index in 0..(info.memory_map_entries as usize).min(MOST_RANGES) {
        // SAFETY: the loader says that so many entries are there.
        let entry = unsafe { *(info.memory_map as *const MemoryMapEntry).add(index) };
        if entry.kind == TYPE_RAM && entry.size > 0 {
            ram.push(entry.address..entry.address.saturating_add(entry.size));
        }
    }
    Ok(Machine {
        command_line: String::from_utf8_lossy(&line).into_owned(),
        rsdp: info.rsdp,
        ram,
    })
}

//! The registers of the first vCPU, and the descriptor and page tables that they refer to.

use std::ops::Range;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use super::entry::{CpuMode, EntryPoint};
use crate::Error;
use crate::layout::{BOOT_GDT, BOOT_INFO, BOOT_PAGE_TABLES, BOOT_STACK};
use crate::vm::memory::GuestRam;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS: u64 = 2;

const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;
const PAGE: u64 = 0x1000;
/// Five descriptors.
const GDT_SIZE: u64 = 40;

/// Selectors, as the boot protocol of Linux requires.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// The general registers for `entry`.
pub fn general(entry: EntryPoint) -> kvm_regs {
    match entry {
        EntryPoint::Pvh(rip) => kvm_regs {
            rip,
            rbx: BOOT_INFO,
            rflags: RFLAGS,
            ..Default::default()
        },
        EntryPoint::Linux64(rip) => kvm_regs {
            rip,
            rsi: BOOT_INFO,
            rsp: BOOT_STACK,
            rbp: BOOT_STACK,
            rflags: RFLAGS,
            ..Default::default()
        },
        // IP is the offset in the 64 KiB that the address lies in; CS is set in `real_mode`.
        EntryPoint::Flat(CpuMode::Real, address) => kvm_regs {
            rip: address & 0xffff,
            rflags: RFLAGS,
            ..Default::default()
        },
        EntryPoint::Flat(CpuMode::Protected | CpuMode::Long, rip) => kvm_regs {
            rip,
            rsp: BOOT_STACK,
            rflags: RFLAGS,
            ..Default::default()
        },
    }
}

/// Real mode: the state after reset, with CS at the 64 KiB that `address` lies in.
fn real_mode(address: u64, sregs: &mut kvm_sregs) {
    sregs.cs.base = address & !0xffff;
    sregs.cs.selector = (sregs.cs.base >> 4) as u16;
}

fn is_long(entry: EntryPoint) -> bool {
    matches!(
        entry,
        EntryPoint::Linux64(_) | EntryPoint::Flat(CpuMode::Long, _)
    )
}

/// Where [`special`] writes tables for `entry`.
pub fn tables(entry: EntryPoint) -> &'static [Range<u64>] {
    const GDT: Range<u64> = BOOT_GDT..BOOT_GDT + GDT_SIZE;
    const PAGING: Range<u64> = BOOT_PAGE_TABLES..BOOT_PAGE_TABLES + 6 * PAGE;
    match entry {
        EntryPoint::Flat(CpuMode::Real, _) => &[],
        _ if is_long(entry) => &[GDT, PAGING],
        _ => &[GDT],
    }
}

/// A flat segment that covers the whole address space.
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// The 8-byte descriptor of `segment` (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// Changes `sregs` from the state after reset to that for `entry`. Writes the GDT and, for
/// long mode, page tables to memory.
///
/// # Errors
/// When the tables lie outside guest memory.
pub fn special(entry: EntryPoint, ram: &GuestRam, sregs: &mut kvm_sregs) -> Result<(), Error> {
    if let EntryPoint::Flat(CpuMode::Real, address) = entry {
        real_mode(address, sregs);
        return Ok(());
    }
    let long = is_long(entry);
    let code = segment(CODE, 0xb, long);
    let data = segment(DATA, 0x3, false);
    let task = kvm_segment {
        s: 0,
        g: 0,
        db: 0,
        limit: 0x67,
        ..segment(TASK, 0xb, false)
    };
    let gdt = [
        0,
        0,
        descriptor(&code),
        descriptor(&data),
        descriptor(&task),
    ];
    let memory = ram.memory();
    let error = |e| Error::BootSetup(format!("descriptor and page tables: {e}"));
    for (at, entry) in (BOOT_GDT..).step_by(8).zip(gdt) {
        memory.write_obj(entry, GuestAddress(at)).map_err(error)?;
    }
    sregs.gdt.base = BOOT_GDT;
    sregs.gdt.limit = GDT_SIZE as u16 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    sregs.cr0 = CR0_PE | CR0_ET;
    if long {
        write_page_tables(ram).map_err(error)?;
        sregs.cr3 = BOOT_PAGE_TABLES;
        sregs.cr4 |= CR4_PAE;
        sregs.cr0 |= CR0_PG;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
    Ok(())
}

/// Identity-maps the first 4 GiB with 2 MiB pages.
fn write_page_tables(ram: &GuestRam) -> Result<(), vm_memory::GuestMemoryError> {
    let memory = ram.memory();
    let write = |table: u64, index: u64, value: u64| {
        memory.write_obj(value, GuestAddress(table + index * 8))
    };
    let (pml4, pdpt) = (BOOT_PAGE_TABLES, BOOT_PAGE_TABLES + PAGE);
    write(pml4, 0, pdpt | PRESENT_WRITABLE)?;
    for gib in 0..4 {
        let directory = pdpt + PAGE + gib * PAGE;
        write(pdpt, gib, directory | PRESENT_WRITABLE)?;
        for page in 0..512 {
            let address = gib << 30 | page << 21;
            write(directory, page, address | PRESENT_WRITABLE | LARGE_PAGE)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_descriptors_are_encoded() {
        assert_eq!(
            descriptor(&segment(CODE, 0xb, false)),
            0x00cf_9b00_0000_ffff
        );
        assert_eq!(descriptor(&segment(CODE, 0xb, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(
            descriptor(&segment(DATA, 0x3, false)),
            0x00cf_9300_0000_ffff
        );
    }

    #[test]
    fn long_mode_is_on_only_where_the_entry_asks_for_it() {
        let ram = GuestRam::new("16M".parse().unwrap()).unwrap();
        let mut sregs = kvm_sregs::default();
        special(EntryPoint::Pvh(0x10_0000), &ram, &mut sregs).unwrap();
        assert_eq!((sregs.cr0 & CR0_PG, sregs.efer, sregs.cs.l), (0, 0, 0));
        special(EntryPoint::Linux64(0x10_0000), &ram, &mut sregs).unwrap();
        assert_eq!((sregs.efer, sregs.cs.l), (EFER_LME | EFER_LMA, 1));
        special(EntryPoint::Flat(CpuMode::Long, 0x10_0000), &ram, &mut sregs).unwrap();
        assert_eq!((sregs.efer, sregs.cs.l), (EFER_LME | EFER_LMA, 1));
        let last: u64 = ram
            .memory()
            .read_obj(GuestAddress(BOOT_PAGE_TABLES + 6 * PAGE - 8))
            .unwrap();
        assert_eq!(last, 0xffe0_0000 | PRESENT_WRITABLE | LARGE_PAGE);
    }

    #[test]
    fn real_mode_begins_in_the_segment_of_its_address() {
        let ram = GuestRam::new("16M".parse().unwrap()).unwrap();
        for (address, selector, ip) in [(0xf_fff0, 0xf000, 0xfff0), (0x7c00, 0, 0x7c00)] {
            let entry = EntryPoint::Flat(CpuMode::Real, address);
            let mut sregs = kvm_sregs::default();
            special(entry, &ram, &mut sregs).unwrap();
            assert_eq!(sregs.cs.selector, selector);
            assert_eq!((sregs.cs.base + ip, general(entry).rip), (address, ip));
            assert!(tables(entry).is_empty());
        }
    }
}

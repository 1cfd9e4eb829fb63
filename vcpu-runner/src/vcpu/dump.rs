//! Prints the registers of a vCPU, always in the same layout: before the guest runs, if
//! asked for, and when the vCPU cannot continue.

use std::fmt::Write as _;
use std::io::Write as _;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::vm::memory::GuestRam;

/// How many bytes of code are printed: one more than the longest instruction has.
const CODE_LENGTH: u64 = 16;
const PAGE: u64 = 0x1000;
const CR0_PE: u64 = 1;
const EFER_LMA: u64 = 1 << 10;

/// Prints the registers of vCPU `index` and the code at its instruction pointer to
/// stderr, in one write, so that the output of several vCPUs does not mix.
pub fn print(fd: &VcpuFd, index: usize, ram: &GuestRam, title: &str) {
    let mut text = format!("vCPU {index}: {title}\n");
    match (fd.get_regs(), fd.get_sregs()) {
        (Ok(regs), Ok(sregs)) => {
            text += &registers(&regs, &sregs);
            let address = instruction_address(&regs, &sregs);
            let translate = |address| {
                let answer = fd.translate_gva(address).ok()?;
                (answer.valid != 0).then_some(answer.physical_address)
            };
            text += &code(address, translate, ram);
        }
        (Err(e), _) | (_, Err(e)) => text += &format!("  the registers cannot be read: {e}\n"),
    }
    // stderr may be closed.
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// All registers as text.
fn registers(regs: &kvm_regs, sregs: &kvm_sregs) -> String {
    let mut text = String::new();
    let general = [
        [
            ("rax", regs.rax),
            ("rbx", regs.rbx),
            ("rcx", regs.rcx),
            ("rdx", regs.rdx),
        ],
        [
            ("rsi", regs.rsi),
            ("rdi", regs.rdi),
            ("rbp", regs.rbp),
            ("rsp", regs.rsp),
        ],
        [
            ("r8", regs.r8),
            ("r9", regs.r9),
            ("r10", regs.r10),
            ("r11", regs.r11),
        ],
        [
            ("r12", regs.r12),
            ("r13", regs.r13),
            ("r14", regs.r14),
            ("r15", regs.r15),
        ],
    ];
    let control = [
        ("cr0", sregs.cr0),
        ("cr2", sregs.cr2),
        ("cr3", sregs.cr3),
        ("cr4", sregs.cr4),
    ];
    for line in general {
        text += &row(&line);
    }
    text += &row(&[("rip", regs.rip), ("rfl", regs.rflags)]);
    for (name, segment) in [
        ("cs", &sregs.cs),
        ("ds", &sregs.ds),
        ("es", &sregs.es),
        ("fs", &sregs.fs),
        ("gs", &sregs.gs),
        ("ss", &sregs.ss),
        ("tr", &sregs.tr),
        ("ldt", &sregs.ldt),
    ] {
        text += &segment_row(name, segment);
    }
    text += &table_row("gdt", &sregs.gdt);
    text += &table_row("idt", &sregs.idt);
    text += &row(&control);
    text += &row(&[("cr8", sregs.cr8), ("efer", sregs.efer)]);
    text
}

fn row(registers: &[(&str, u64)]) -> String {
    let cells: Vec<String> = registers
        .iter()
        .map(|(name, value)| format!("{name:<4} {value:016x}"))
        .collect();
    format!("  {}\n", cells.join("  "))
}

fn segment_row(name: &str, s: &kvm_segment) -> String {
    let unusable = if s.unusable != 0 { " unusable" } else { "" };
    format!(
        "  {name:<4} {:04x} base {:016x} limit {:08x} type {:x} s {} dpl {} p {} avl {} l {} db {} g {}{unusable}\n",
        s.selector, s.base, s.limit, s.type_, s.s, s.dpl, s.present, s.avl, s.l, s.db, s.g,
    )
}

fn table_row(name: &str, table: &kvm_dtable) -> String {
    format!(
        "  {name:<4}      base {:016x} limit {:08x}\n",
        table.base, table.limit
    )
}

/// The linear address of the next instruction (Intel SDM volume 3, chapter 3).
fn instruction_address(regs: &kvm_regs, sregs: &kvm_sregs) -> u64 {
    if sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0 {
        regs.rip
    } else if sregs.cr0 & CR0_PE != 0 {
        sregs.cs.base.wrapping_add(regs.rip) & 0xffff_ffff
    } else {
        sregs.cs.base.wrapping_add(regs.rip & 0xffff)
    }
}

/// The bytes at linear address `address`, or why they cannot be read.
fn code(address: u64, translate: impl Fn(u64) -> Option<u64>, ram: &GuestRam) -> String {
    let mut bytes = Vec::new();
    let mut why = None;
    while bytes.len() < CODE_LENGTH as usize && why.is_none() {
        let at = address.wrapping_add(bytes.len() as u64);
        // The mapping can change at each page boundary.
        let count = (CODE_LENGTH - bytes.len() as u64).min(PAGE - at % PAGE);
        let mut part = vec![0; count as usize];
        match translate(at) {
            None => why = Some(format!("no page is mapped at {at:#x}")),
            Some(physical) => match ram.memory().read_slice(&mut part, GuestAddress(physical)) {
                Ok(()) => bytes.extend(part),
                Err(_) => {
                    why = Some(format!(
                        "{at:#x} is mapped to {physical:#x}, which is not RAM"
                    ))
                }
            },
        }
    }
    let mut text = format!("  code at {address:#x}:");
    for byte in &bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, " {byte:02x}");
    }
    match why {
        Some(why) if bytes.is_empty() => text += &format!(" not readable: {why}"),
        Some(why) => text += &format!(" ({why})"),
        None => {}
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_is_printed_once() {
        let mut regs = kvm_regs {
            rax: 0xa,
            r15: 0xf,
            rip: 0x1234,
            ..Default::default()
        };
        regs.rflags = 2;
        let mut sregs = kvm_sregs::default();
        sregs.cs.selector = 0xf000;
        sregs.cs.base = 0xf_0000;
        sregs.gdt.limit = 0x27;
        let text = registers(&regs, &sregs);
        for line in [
            "  rax  000000000000000a  rbx  0000000000000000  rcx  0000000000000000  rdx  0000000000000000",
            "  rip  0000000000001234  rfl  0000000000000002",
            "  gdt       base 0000000000000000 limit 00000027",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        let words: Vec<&str> = text.split_whitespace().collect();
        for name in [
            "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15", "rip", "rfl", "cs", "ds", "es", "fs", "gs", "ss", "tr",
            "ldt", "gdt", "idt", "cr0", "cr2", "cr3", "cr4", "cr8", "efer",
        ] {
            assert_eq!(words.iter().filter(|w| **w == name).count(), 1, "{name}");
        }
    }

    #[test]
    fn the_instruction_address_is_right_in_every_mode() {
        let mut regs = kvm_regs::default();
        let mut sregs = kvm_sregs::default();
        (regs.rip, sregs.cs.base) = (0xfff0, 0xf_0000);
        assert_eq!(instruction_address(&regs, &sregs), 0xf_fff0);
        sregs.cr0 = CR0_PE;
        (regs.rip, sregs.cs.base) = (0x20, 0xffff_fff0);
        assert_eq!(instruction_address(&regs, &sregs), 0x10);
        (sregs.efer, sregs.cs.l) = (EFER_LMA, 1);
        regs.rip = 0xffff_ffff_8000_0000;
        assert_eq!(instruction_address(&regs, &sregs), regs.rip);
    }

    #[test]
    fn code_is_read_page_by_page_up_to_the_first_unmapped_page() {
        let ram = GuestRam::new("16M".parse().unwrap()).unwrap();
        ram.memory()
            .write_slice(&[0x0f, 0x0b], GuestAddress(0x2ffe))
            .unwrap();
        ram.memory()
            .write_slice(&[0xcc], GuestAddress(0x7000))
            .unwrap();
        // Two adjacent linear pages that are far apart in memory.
        let both = |at: u64| {
            Some(if at < 0x5000 {
                at - 0x2000
            } else {
                at + 0x2000
            })
        };
        let text = code(0x4ffe, both, &ram);
        assert!(text.starts_with("  code at 0x4ffe: 0f 0b cc 00"), "{text}");
        let first = |at: u64| (at < 0x5000).then_some(at - 0x2000);
        let text = code(0x4ffe, first, &ram);
        assert!(
            text.contains("0f 0b (no page is mapped at 0x5000)"),
            "{text}"
        );
        let text = code(0x9000, |_| None, &ram);
        assert!(
            text.contains("not readable: no page is mapped at 0x9000"),
            "{text}"
        );
        let text = code(0x9000, |_| Some(0xfee0_0000), &ram);
        assert!(
            text.contains("mapped to 0xfee00000, which is not RAM"),
            "{text}"
        );
    }
}

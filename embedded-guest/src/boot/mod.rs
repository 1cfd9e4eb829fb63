//! Start-up and the only code that runs in kernel mode: `start.s` enters user mode
//! within some 70 instructions, `interrupts.s` counts interrupts, `services.s` does
//! what user mode cannot do.

use core::arch::{asm, global_asm};

global_asm!(include_str!("tables.s"), options(att_syntax));
global_asm!(include_str!("start.s"), options(att_syntax));
global_asm!(include_str!("interrupts.s"), options(att_syntax));
global_asm!(include_str!("services.s"), options(att_syntax));

/// Sleeps until an interrupt comes; returns at once if the number of interrupts is
/// no longer `seen`.
pub fn sleep(seen: u64) {
    // SAFETY: the service changes no register but RAX and RDX.
    unsafe { asm!("int3", inout("eax") 0 => _, in("rdi") seen) }
}

/// Writes `text` to the 16550 at `port` and returns how many bytes it did not take
/// in about a million reads of its line status.
pub fn write_uart(port: u16, text: &[u8]) -> usize {
    if text.is_empty() {
        return 0;
    }
    let left;
    // SAFETY: the service reads `text` within its bounds and changes the registers
    // named here.
    unsafe {
        asm!("int3", inout("eax") 1 => _, in("edi") u32::from(port),
            inout("rsi") text.as_ptr() => _, inout("rcx") text.len() => left,
            out("rdx") _, out("r8") _);
    }
    left
}

/// How often [`read_port_in_kernel`] reads.
pub const KERNEL_READS: u64 = 64;

/// Reads a port [`KERNEL_READS`] times from kernel mode.
pub fn read_port_in_kernel(port: u16) {
    // SAFETY: the service changes RAX only; which ports are harmless to read is the
    // caller's matter, none touches memory.
    unsafe { asm!("int3", inout("eax") 2 => _, in("edx") u32::from(port)) }
}

/// Writes a model-specific register.
///
/// # Safety
/// The register must not be one that changes how memory is reached.
pub unsafe fn write_msr(number: u32, value: u64) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!("int3", inout("eax") 3 => _, in("ecx") number,
            in("esi") value as u32, in("edx") (value >> 32) as u32);
    }
}

/// Makes the processor shut down by a triple fault, which resets the machine.
pub fn triple_fault() {
    // SAFETY: it does not come back.
    unsafe { asm!("int3", in("eax") 4) }
}

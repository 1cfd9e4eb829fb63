//! How the first vCPU enters the guest.

/// The mode and address of the first instruction, and what the guest expects in the
/// registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryPoint {
    /// 32-bit protected mode without paging, EBX = address of the start info (Xen's PVH
    /// boot protocol).
    Pvh(u64),
    /// 64-bit long mode, RSI = address of the zero page (64-bit boot protocol of Linux).
    Linux64(u64),
    /// The mode that the user asked for; the registers hold nothing.
    Flat(CpuMode, u64),
}

/// The mode of the processor at the first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuMode {
    /// 16-bit real mode.
    Real,
    /// 32-bit protected mode, flat segments, no paging.
    Protected,
    /// 64-bit long mode, the first 4 GiB identity-mapped.
    Long,
}

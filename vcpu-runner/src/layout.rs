//! Where things are in the guest's physical address space and on its I/O bus.

/// RAM ends here at the latest, and goes on at [`HIGH_RAM`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// RAM beyond the hole for devices.
pub const HIGH_RAM: u64 = 1 << 32;

/// Window for the BARs of PCI devices.
pub const PCI_WINDOW: u64 = 0xc000_0000;
/// Size of [`PCI_WINDOW`] in bytes.
pub const PCI_WINDOW_SIZE: u64 = 0x2000_0000;
/// Memory-mapped PCI configuration space (PCI Express ECAM) of bus 0.
pub const ECAM: u64 = 0xe000_0000;
/// Size of [`ECAM`] in bytes: one bus.
pub const ECAM_SIZE: u64 = 1 << 20;

/// I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC.
pub const LAPIC: u32 = 0xfee0_0000;
/// One page for KVM's identity map and three for its TSS (Intel hosts).
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// See [`KVM_IDENTITY_MAP`].
pub const KVM_TSS: u64 = 0xfeff_d000;

/// Boot structures: GDT.
pub const BOOT_GDT: u64 = 0x500;
/// Boot structures: PVH start info, or the Linux zero page.
pub const BOOT_INFO: u64 = 0x7000;
/// Stack of the start-up code, growing down.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables for entering in long mode: PML4, PDPT and four page directories.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for [`CMDLINE`] in bytes.
pub const CMDLINE_SIZE: usize = 0x1_0000;
/// Low memory ends here; then come the old BIOS and video areas.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// ACPI tables, found by a scan of the BIOS area as well as by pointer.
pub const ACPI: u64 = 0xe_0000;
/// Room for ACPI tables in bytes.
pub const ACPI_SIZE: u64 = 0x2_0000;
/// Kernels are loaded from here on.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// PCI configuration mechanism 1: address port.
pub const PCI_CONFIG_ADDRESS: u16 = 0xcf8;
/// PCI configuration mechanism 1: first data port.
pub const PCI_CONFIG_DATA: u16 = 0xcfc;

/// ACPI fixed hardware, served by the platform process: PM1a event block.
pub const PM1_EVENT: u16 = 0x600;
/// PM1a control block.
pub const PM1_CONTROL: u16 = 0x604;
/// Reset control register; the value 6 resets.
pub const RESET_CONTROL: u16 = 0xcf9;
/// System control interrupt.
pub const SCI: u8 = 9;

/// Interrupt lines that PCI's INTx pins share, I/O APIC inputs.
pub const INTX_FIRST: u32 = 16;
/// How many of them.
pub const INTX_COUNT: u32 = 4;
/// Inputs of the I/O APIC, which are GSIs 0 to 23; message-signalled ones follow.
pub const IOAPIC_PINS: u32 = 24;

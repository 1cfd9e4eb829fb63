//! The guest-physical address map and the I/O port map.

/// RAM ends here at the latest, and continues at [`HIGH_RAM`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// RAM above the device hole.
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
/// Top of the stack of the start-up code.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables for entering in long mode: PML4, PDPT and four page directories.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Size of the area of [`CMDLINE`] in bytes.
pub const CMDLINE_SIZE: usize = 0x1_0000;
/// End of low memory. The video and BIOS areas follow.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// ACPI tables. They are in the BIOS area, which kernels without a pointer to them scan.
pub const ACPI: u64 = 0xe_0000;
/// Size of the area for ACPI tables in bytes.
pub const ACPI_SIZE: u64 = 0x2_0000;
/// Lowest address that kernels are loaded to.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// PCI configuration mechanism 1: address port.
pub const PCI_CONFIG_ADDRESS: u16 = 0xcf8;
/// PCI configuration mechanism 1: first data port.
pub const PCI_CONFIG_DATA: u16 = 0xcfc;

/// ACPI fixed hardware, emulated by the platform process: PM1a event block.
pub const PM1_EVENT: u16 = 0x600;
/// PM1a control block.
pub const PM1_CONTROL: u16 = 0x604;
/// Reset control register: writing 6 resets the machine.
pub const RESET_CONTROL: u16 = 0xcf9;
/// System control interrupt.
pub const SCI: u8 = 9;

/// First of the I/O APIC inputs that the INTx pins of PCI devices share.
pub const INTX_FIRST: u32 = 16;
/// Number of these inputs.
pub const INTX_COUNT: u32 = 4;
/// Inputs of the I/O APIC: GSIs 0 to 23. Those of message-signalled interrupts follow.
pub const IOAPIC_PINS: u32 = 24;

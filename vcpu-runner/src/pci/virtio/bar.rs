//! The layout of BAR 0, which holds all structures of a virtio device (virtio 1.2
//! section 4.1.4) and the MSI-X table.

/// Size of the BAR in bytes.
pub const BAR_SIZE: u32 = 0x1_0000;
/// Common configuration.
pub const COMMON: u64 = 0;
/// ISR status.
pub const ISR: u64 = 0x1000;
/// Device-specific configuration.
pub const DEVICE: u64 = 0x2000;
/// Doorbells, [`NOTIFY_MULTIPLIER`] bytes apart.
pub const NOTIFY: u64 = 0x3000;
/// MSI-X table.
pub const MSIX_TABLE: u64 = 0x4000;
/// MSI-X pending bit array.
pub const MSIX_PENDING: u64 = 0x8000;
/// Distance between the doorbells of two queues, in bytes.
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// Largest number of queues that fits this layout.
pub const MAX_QUEUES: usize = 256;
/// Length of the device-specific configuration in bytes.
pub const CONFIG_LENGTH: usize = 256;

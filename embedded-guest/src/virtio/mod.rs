//! Drivers for virtio devices on PCI, with MSI-X.

pub mod console;
pub mod device;
pub mod disk;
pub mod hal;
pub mod net;
pub mod queue;
pub mod split;
pub mod transport;

/// Device types (virtio 1.3, chapter 5).
pub const NET: u16 = 1;
/// Block device.
pub const BLOCK: u16 = 2;
/// Console.
pub const CONSOLE: u16 = 3;

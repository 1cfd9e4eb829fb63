//! PCI: a bus whose functions have a configuration space and one BAR each, and virtio
//! over PCI (virtio 1.2 section 4.1).

pub mod bus;
pub mod config;
pub mod intx;
pub mod msix;
pub mod virtio;

use std::ops::Range;

/// A PCI function. Accesses have 1 to 8 bytes, whatever the guest does, and never fail.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Writes configuration space.
    fn write_config(&self, offset: usize, data: &[u8]);

    /// The guest-physical addresses of the BAR; `None` while memory decoding is off.
    fn bar(&self) -> Option<Range<u64>>;

    /// Reads from the BAR.
    fn read_bar(&self, offset: u64, data: &mut [u8]);

    /// Writes to the BAR.
    fn write_bar(&self, offset: u64, data: &[u8]);

    /// Resets the function to its state at power-on. The BAR gets the address that
    /// firmware would assign.
    fn reset(&self);
}

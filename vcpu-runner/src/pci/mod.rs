//! PCI: a bus of functions with configuration space and one BAR each, and the
//! virtio transport over it (virtio 1.2 section 4.1).

pub mod bus;
pub mod config;
pub mod intx;
pub mod msix;
pub mod virtio;

use std::ops::Range;

/// A function on the bus. Accesses are 1 to 8 bytes long, as the guest makes
/// them; a function never fails one.
pub trait Function: Send + Sync {
    /// Reads configuration space.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Writes configuration space.
    fn write_config(&self, offset: usize, data: &[u8]);

    /// The guest-physical addresses that the BAR answers at now; `None` while
    /// decoding is off.
    fn bar(&self) -> Option<Range<u64>>;

    /// Reads from the BAR.
    fn read_bar(&self, offset: u64, data: &mut [u8]);

    /// Writes to the BAR.
    fn write_bar(&self, offset: u64, data: &[u8]);

    /// Back to the state at power-on; the BAR goes where firmware would put it.
    fn reset(&self);
}

//! What is in memory and in the registers when the first vCPU starts.
//!
//! | source | what it is |
//! |---|---|
//! | [`kernel`] | an ELF file or bzImage, entered as its boot protocol says |
//! | [`flat`] | files that are copied to addresses that the user gives |

pub mod acpi;
pub mod cpuid;
pub mod entry;
mod file;
pub mod flat;
pub mod kernel;
mod kernel_image;
mod linux;
mod memory_map;
mod pvh;
pub mod registers;

pub use self::entry::EntryPoint;
use self::flat::FlatImages;
use self::kernel::KernelBoot;
use crate::Error;
use crate::vm::memory::GuestRam;

/// What the guest boots from. The files stay open, because a reset boots again.
pub enum BootSource {
    /// A kernel.
    Kernel(KernelBoot),
    /// Flat images.
    Flat(FlatImages),
}

impl BootSource {
    /// Fills `ram` for a start with `cpus` vCPUs.
    ///
    /// # Errors
    /// Says what does not fit into memory, or which file is not a kernel.
    pub fn load(&self, ram: &GuestRam, cpus: usize) -> Result<EntryPoint, Error> {
        match self {
            Self::Kernel(kernel) => kernel.load(ram, cpus),
            Self::Flat(flat) => flat.load(ram),
        }
    }
}

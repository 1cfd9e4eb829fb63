//! What is in memory and in the registers when the first vCPU starts.
//!
//! | source | what it is |
//! |---|---|
//! | [`kernel`] | an ELF file or bzImage, entered as its boot protocol says |
//! | [`flat`] | files as they are, at addresses of the user's choice |

pub mod acpi;
pub mod cpuid;
mod file;
pub mod flat;
mod image;
pub mod kernel;
mod linux;
mod pvh;
pub mod registers;

use self::flat::{Flat, Mode};
use self::kernel::Kernel;
use crate::Error;
use crate::options::Options;
use crate::vm::memory::Ram;

/// How the first vCPU enters the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, EBX = PVH start info (Xen's PVH
    /// boot protocol).
    Pvh(u64),
    /// 64-bit long mode, RSI = zero page (Linux' 64-bit boot protocol).
    Linux64(u64),
    /// The mode that the user asked for, and nothing in the registers.
    Flat(Mode, u64),
}

/// What the guest boots from. Its files stay open, because a reset boots again.
pub enum BootSource {
    /// A kernel.
    Kernel(Kernel),
    /// Flat images.
    Flat(Flat),
}

impl BootSource {
    /// Opens the files that `options` name.
    ///
    /// # Errors
    /// Names the file that is missing, empty or no file, or the command line if
    /// it is too long.
    pub fn open(options: &Options) -> Result<Self, Error> {
        Ok(match &options.kernel {
            Some(kernel) => Self::Kernel(Kernel::open(
                kernel,
                options.initrd.as_deref(),
                &options.cmdline,
            )?),
            None => Self::Flat(Flat::open(
                &options.loads,
                options.entry.unwrap_or_default(),
            )?),
        })
    }

    /// Fills `ram` for a start with `cpus` vCPUs.
    ///
    /// # Errors
    /// Says what does not fit or is no kernel.
    pub fn load(&self, ram: &Ram, cpus: usize) -> Result<Entry, Error> {
        match self {
            Self::Kernel(kernel) => kernel.load(ram, cpus),
            Self::Flat(flat) => flat.load(ram),
        }
    }
}

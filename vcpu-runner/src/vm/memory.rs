//! Guest RAM: sealed memfds that the runner and all device processes map. Its pages are
//! allocated when the guest first accesses them.

use std::os::fd::AsRawFd;
use std::str::FromStr;

use memfd::{FileSeal, HugetlbSize, MemfdOptions};
use outrigger_protocol::memory::USER_ADDRESS_OFFSET;
use rustix::fs::FallocateFlags;
use rustix::mm::Advice;
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use crate::Error;
use crate::layout::{HIGH_RAM, LOW_RAM_END};

/// Guest memory, addressed by guest-physical address.
pub type GuestRamMapping = GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;
/// The smallest RAM that has room for the boot structures and a small kernel.
const MINIMUM: u64 = 8 * MIB;

/// The kind of pages of guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Ordinary pages.
    #[default]
    Small,
    /// Ordinary pages that the kernel may combine (transparent huge pages).
    Transparent,
    /// From the pool of 2 MiB pages.
    Huge2M,
    /// From the pool of 1 GiB pages.
    Huge1G,
}

impl Pages {
    fn size(self) -> u64 {
        match self {
            Pages::Small | Pages::Transparent => 4096,
            Pages::Huge2M => 2 * MIB,
            Pages::Huge1G => 1024 * MIB,
        }
    }
}

/// `--memory SIZE[,hugepages=2M|1G|thp]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySpec {
    /// Size in bytes.
    pub size: u64,
    /// Kind of pages.
    pub pages: Pages,
}

impl MemorySpec {
    /// Checks the size against the memory and swap of this host. Pages are allocated late,
    /// so nothing else would notice a size that is far too large.
    ///
    /// # Errors
    /// Says how much memory the host has.
    pub fn check_host(self) -> Result<(), Error> {
        let host = host_memory();
        if self.size > host {
            return Err(Error::Memory {
                bytes: self.size,
                why: format!("this host has only {host} bytes, including swap"),
            });
        }
        Ok(())
    }
}

impl FromStr for MemorySpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let size = outrigger_cli::size::parse(parts.next().unwrap_or_default())?;
        let mut pages = None;
        for part in parts {
            let value = match part.split_once('=') {
                Some(("hugepages", "2M")) => Pages::Huge2M,
                Some(("hugepages", "1G")) => Pages::Huge1G,
                Some(("hugepages", "thp")) => Pages::Transparent,
                _ => return Err(format!("{part:?} is not hugepages=2M|1G|thp")),
            };
            if pages.replace(value).is_some() {
                return Err("hugepages= is given twice".into());
            }
        }
        let pages = pages.unwrap_or_default();
        if size < MINIMUM {
            return Err(format!(
                "{size} bytes are less than the minimum of {} MiB",
                MINIMUM / MIB
            ));
        }
        if size % pages.size() != 0 {
            return Err(format!(
                "{size} bytes are not a multiple of the page size of {} bytes",
                pages.size()
            ));
        }
        Ok(MemorySpec { size, pages })
    }
}

/// Guest RAM.
pub struct GuestRam {
    memory: GuestRamMapping,
    size: u64,
}

impl GuestRam {
    /// Creates and maps RAM: up to 3 GiB below the device hole, the rest from 4 GiB on.
    ///
    /// # Errors
    /// When the host does not map that much, or has too few free huge pages.
    pub fn new(spec: MemorySpec) -> Result<Self, Error> {
        let error = |why: String| Error::Memory {
            bytes: spec.size,
            why,
        };
        let low = spec.size.min(LOW_RAM_END);
        let mut ranges = vec![(0, low)];
        if spec.size > low {
            ranges.push((HIGH_RAM, spec.size - low));
        }
        let regions = ranges
            .into_iter()
            .map(|(start, size)| region(start, size, spec.pages).map_err(error))
            .collect::<Result<Vec<_>, _>>()?;
        let memory = GuestRamMapping::from_regions(regions).map_err(|e| error(e.to_string()))?;
        Ok(GuestRam {
            memory,
            size: spec.size,
        })
    }

    /// The mapped memory.
    pub fn memory(&self) -> &GuestRamMapping {
        &self.memory
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// End of the RAM below the device hole.
    pub fn low_end(&self) -> u64 {
        self.size.min(LOW_RAM_END)
    }

    /// Start and size of each range of RAM, in bytes.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        self.memory
            .iter()
            .map(|region| (region.start_addr().raw_value(), region.len()))
            .collect()
    }

    /// The memory table for a vhost-user back end.
    pub fn vhost_regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.memory
            .iter()
            .filter_map(|region| {
                let file = region.file_offset()?;
                let start = region.start_addr().raw_value();
                Some(VhostUserMemoryRegionInfo {
                    guest_phys_addr: start,
                    memory_size: region.len(),
                    userspace_addr: start + USER_ADDRESS_OFFSET,
                    mmap_offset: file.start(),
                    mmap_handle: file.file().as_raw_fd(),
                })
            })
            .collect()
    }

    /// Fills all RAM with zeros and frees its pages, for a reset.
    ///
    /// # Errors
    /// When fallocate(2) fails.
    pub fn clear(&self) -> Result<(), Error> {
        for region in self.memory.iter() {
            let Some(file) = region.file_offset() else {
                continue;
            };
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file.file(), mode, file.start(), region.len())
                .map_err(|e| Error::io("clearing guest memory")(e.into()))?;
        }
        Ok(())
    }
}

/// Memory and swap of this host in bytes (sysinfo(2)).
fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram
        .saturating_add(info.totalswap)
        .saturating_mul(info.mem_unit.into())
}

fn region(start: u64, size: u64, pages: Pages) -> Result<GuestRegionMmap<()>, String> {
    let hugetlb = match pages {
        Pages::Huge2M => Some(HugetlbSize::Huge2MB),
        Pages::Huge1G => Some(HugetlbSize::Huge1GB),
        Pages::Small | Pages::Transparent => None,
    };
    let memfd = MemfdOptions::default()
        .allow_sealing(true)
        .close_on_exec(true)
        .hugetlb(hugetlb)
        .create("outrigger-ram")
        .map_err(|e| format!("memfd_create: {e}"))?;
    memfd
        .as_file()
        .set_len(size)
        .map_err(|e| format!("ftruncate: {e}"))?;
    // If the file could shrink, every process that maps it could get SIGBUS.
    for seal in [FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal] {
        memfd.add_seal(seal).map_err(|e| format!("seal: {e}"))?;
    }
    let length = usize::try_from(size).map_err(|_| "too large".to_string())?;
    // Huge pages are reserved now: if the pool is empty later, the process gets SIGBUS.
    // Other pages are allocated at the first access.
    let reserve = if hugetlb.is_some() {
        0
    } else {
        libc::MAP_NORESERVE
    };
    let mapping = MmapRegion::build(
        Some(FileOffset::new(memfd.into_file(), 0)),
        length,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | reserve,
    )
    .map_err(|e| match hugetlb {
        Some(_) => format!(
            "not enough free huge pages of {} MiB: {e}",
            pages.size() / MIB
        ),
        None => format!("mmap: {e}"),
    })?;
    if pages == Pages::Transparent {
        // SAFETY: the range is the mapping just made, and advice changes no content.
        unsafe { rustix::mm::madvise(mapping.as_ptr().cast(), length, Advice::LinuxHugepage) }
            .map_err(|e| format!("madvise: {e}"))?;
    }
    GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or_else(|| "too large".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn options_are_parsed() {
        let spec = |text: &str| text.parse::<MemorySpec>();
        assert_eq!(spec("512M").unwrap().size, 512 * MIB);
        assert_eq!(spec("6G,hugepages=thp").unwrap().pages, Pages::Transparent);
        for bad in [
            "",
            "M",
            "1",
            "4M",
            "512M,",
            "512M,hugepages=3M",
            "513M,hugepages=2M",
            "99999999999T",
            "64M,hugepages=2M,hugepages=2M",
        ] {
            assert!(spec(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ram_has_a_hole_below_4_gib_and_is_cleared_by_a_reset() {
        let ram = GuestRam::new("6G".parse().unwrap()).unwrap();
        assert_eq!(
            ram.ranges(),
            [(0, LOW_RAM_END), (HIGH_RAM, (6 << 30) - LOW_RAM_END)]
        );
        let last = GuestAddress(HIGH_RAM + (3 << 30) - 8);
        ram.memory().write_obj(0x1234_5678_u64, last).unwrap();
        assert_eq!(ram.memory().read_obj::<u64>(last).unwrap(), 0x1234_5678);
        assert!(
            ram.memory()
                .read_obj::<u8>(GuestAddress(LOW_RAM_END))
                .is_err()
        );
        ram.clear().unwrap();
        assert_eq!(ram.memory().read_obj::<u64>(last).unwrap(), 0);
    }

    #[test]
    fn ram_is_sealed_against_resizing() {
        let ram = GuestRam::new("64M".parse().unwrap()).unwrap();
        let region = ram.memory().iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        assert!(file.set_len(4096).is_err());
        assert!(file.set_len(1 << 30).is_err());
    }
}

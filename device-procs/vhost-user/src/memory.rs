//! The memory table: guest memory that the front end shares (SET_MEM_TABLE, ADD_MEM_REG).

use std::fs::File;
use std::sync::Arc;

use vm_memory::{Address, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::Error;

/// Guest memory, addressed by guest-physical address.
pub type GuestMemory = GuestMemoryMmap<()>;

/// The most memory regions; the same limit as in QEMU.
pub const MAX_REGIONS: usize = 509;

/// One region as SET_MEM_TABLE or ADD_MEM_REG describes it (vhost-user,
/// "Memory region description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Guest-physical address.
    pub guest: u64,
    /// Size in bytes.
    pub size: u64,
    /// Front-end user address.
    pub user: u64,
    /// Offset of the region in its file, in bytes.
    pub offset: u64,
}

impl RegionInfo {
    fn error(&self, why: impl Into<String>) -> Error {
        Error::Region {
            address: self.guest,
            size: self.size,
            why: why.into(),
        }
    }

    fn map(&self, file: File) -> Result<GuestRegionMmap<()>, Error> {
        let end = self.offset.checked_add(self.size);
        if self.size == 0
            || self.guest.checked_add(self.size).is_none()
            || self.user.checked_add(self.size).is_none()
        {
            return Err(self.error("it is empty, or reaches beyond the address space"));
        }
        // fstat(2), not statx(2), which the sandbox does not allow.
        let file_size = rustix::fs::fstat(&file)
            .map_err(|e| self.error(format!("fstat: {e}")))?
            .st_size as u64;
        // An access to a mapping beyond the end of the file would raise SIGBUS.
        if end.is_none_or(|end| end > file_size) {
            return Err(self.error(format!("its file has only {file_size:#x} bytes")));
        }
        let size = usize::try_from(self.size).map_err(|_| self.error("it is too large"))?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, self.offset), size)
            .map_err(|e| self.error(format!("mmap: {e}")))?;
        GuestRegionMmap::new(mapping, GuestAddress(self.guest))
            .ok_or_else(|| self.error("it reaches beyond the address space"))
    }
}

/// The memory regions, mapped, and their user addresses.
#[derive(Clone, Default)]
pub struct MemoryTable {
    infos: Vec<RegionInfo>,
    memory: Arc<GuestMemory>,
}

impl MemoryTable {
    /// Builds a whole table (SET_MEM_TABLE).
    ///
    /// # Errors
    /// A region is invalid, or two of them overlap.
    pub fn new(regions: impl IntoIterator<Item = (RegionInfo, File)>) -> Result<Self, Error> {
        let mut table = MemoryTable::default();
        for (info, file) in regions {
            table.add(info, file)?;
        }
        Ok(table)
    }

    /// Adds one region (ADD_MEM_REG); the table is unchanged on an error.
    ///
    /// # Errors
    /// The region is invalid, overlaps another one, or exceeds [`MAX_REGIONS`].
    pub fn add(&mut self, info: RegionInfo, file: File) -> Result<(), Error> {
        if self.infos.len() == MAX_REGIONS {
            return Err(info.error(format!("the table already has {MAX_REGIONS} regions")));
        }
        let overlaps = |other: &RegionInfo| {
            info.user < other.user + other.size && other.user < info.user.saturating_add(info.size)
        };
        if self.infos.iter().any(overlaps) {
            return Err(info.error("its user addresses overlap those of another region"));
        }
        let region = Arc::new(info.map(file)?);
        self.memory = Arc::new(self.memory.insert_region(region)?);
        self.infos.push(info);
        Ok(())
    }

    /// Removes one region (REM_MEM_REG), matched by guest-physical address, user
    /// address and size.
    ///
    /// # Errors
    /// The table has no such region.
    pub fn remove(&mut self, guest: u64, user: u64, size: u64) -> Result<(), Error> {
        let index = self
            .infos
            .iter()
            .position(|i| (i.guest, i.user, i.size) == (guest, user, size))
            .ok_or_else(|| Error::Region {
                address: guest,
                size,
                why: "it is not in the table".into(),
            })?;
        let (memory, _) = self.memory.remove_region(GuestAddress(guest), size)?;
        self.memory = Arc::new(memory);
        self.infos.remove(index);
        Ok(())
    }

    /// The mapped memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Translates a front-end user address to a guest-physical one.
    pub fn to_guest(&self, user: u64) -> Option<GuestAddress> {
        let info = self
            .infos
            .iter()
            .find(|i| user >= i.user && user - i.user < i.size)?;
        GuestAddress(info.guest).checked_add(user - info.user)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

    fn file(size: u64) -> File {
        // SAFETY: memfd_create returns a new descriptor, which has no other owner.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), 0)) };
        file.set_len(size).unwrap();
        file
    }

    fn region(guest: u64, size: u64, user: u64) -> RegionInfo {
        RegionInfo {
            guest,
            size,
            user,
            offset: 0,
        }
    }

    /// Size of all regions together, in bytes.
    fn total_size(memory: &GuestMemory) -> u64 {
        memory.iter().map(GuestMemoryRegion::len).sum()
    }

    #[test]
    fn user_addresses_are_translated_and_bounded() {
        let table = MemoryTable::new([(region(0x1000, 0x2000, 1 << 52), file(0x2000))]).unwrap();
        assert_eq!(table.to_guest(1 << 52), Some(GuestAddress(0x1000)));
        assert_eq!(
            table.to_guest((1 << 52) + 0x1fff),
            Some(GuestAddress(0x2fff))
        );
        assert_eq!(table.to_guest((1 << 52) + 0x2000), None);
        assert_eq!(table.to_guest(0), None);
    }

    #[test]
    fn invalid_regions_are_refused_and_change_nothing() {
        let mut table = MemoryTable::new([(region(0, 0x1000, 0), file(0x1000))]).unwrap();
        for bad in [
            region(0x1000, 0, 0x1000),
            region(u64::MAX, 0x1000, 0x1000),
            region(0x1000, 0x1000, u64::MAX - 1),
            region(0x1000, 0x2000, 0x1000), // longer than its file
            region(0x800, 0x1000, 0x1000),  // overlaps
            region(0x1000, 0x1000, 0x800),  // overlaps in user addresses
        ] {
            assert!(table.add(bad, file(0x1000)).is_err(), "{bad:?}");
        }
        assert_eq!(total_size(table.memory()), 0x1000);
        assert!(table.remove(0, 1, 0x1000).is_err());
        table.remove(0, 0, 0x1000).unwrap();
        assert_eq!(total_size(table.memory()), 0);
    }

    #[test]
    fn regions_are_added_and_removed_in_any_order() {
        let mut table = MemoryTable::default();
        for i in (0..20).rev() {
            let at = i * 0x1000;
            table
                .add(region(at, 0x1000, at + (1 << 52)), file(0x1000))
                .unwrap();
        }
        table.remove(0x3000, 0x3000 + (1 << 52), 0x1000).unwrap();
        assert_eq!(table.to_guest(0x3000 + (1 << 52)), None);
        assert_eq!(total_size(table.memory()), 19 * 0x1000);
    }
}

//! Guest memory as the runner shares it: a sealed memfd, in which the regions lie
//! in such an order that guest-physical address, offset in the file and user
//! address are three different numbers. A device that mixes them up fails.

use std::fs::File;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::sync::Mutex;

use outrigger_protocol::memory::USER_ADDRESS_OFFSET;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

/// Gap before each region in the file, in bytes.
const GAP: u64 = 0x10_0000;

/// Guest memory; dereferences to the memory itself for reading and writing.
pub struct Ram {
    file: File,
    memory: GuestMemoryMmap<()>,
    /// End of the allocations of [`Ram::alloc`] in each region.
    taken: Mutex<Vec<u64>>,
}

impl Ram {
    /// Memory with a region for each `(guest-physical address, size)`, sorted by
    /// address.
    pub fn new(regions: &[(u64, u64)]) -> Self {
        let file: File = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .unwrap()
            .into();
        let total: u64 = regions.iter().map(|(_, size)| size + GAP).sum();
        file.set_len(total).unwrap();
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).unwrap();
        // The last region comes first in the file.
        let mut end = total;
        let mapped = regions.iter().map(|&(address, size)| {
            end -= size;
            let offset = FileOffset::new(file.try_clone().unwrap(), end);
            end -= GAP;
            (GuestAddress(address), size as usize, Some(offset))
        });
        let memory = GuestMemoryMmap::from_ranges_with_files(mapped.collect::<Vec<_>>()).unwrap();
        let taken = regions.iter().map(|&(address, _)| address).collect();
        Ram {
            file,
            memory,
            taken: Mutex::new(taken),
        }
    }

    /// As [`Ram::new`], in the layout of a small virtual machine: 1 MiB at 0 and
    /// 4 MiB above 4 GiB.
    pub fn small() -> Self {
        Self::new(&[(0, 1 << 20), (1 << 32, 4 << 20)])
    }

    /// Allocates memory in the region with number `region`.
    pub fn alloc_in(&self, region: usize, len: u64, align: u64) -> u64 {
        let mut taken = self.taken.lock().unwrap();
        let address = taken[region].next_multiple_of(align);
        taken[region] = address + len;
        assert!(
            self.address_in_range(GuestAddress(address + len - 1)),
            "guest memory is used up"
        );
        address
    }

    /// Allocates memory in the last region.
    pub fn alloc(&self, len: u64) -> u64 {
        self.alloc_in(self.memory.num_regions() - 1, len, 16)
    }

    /// Allocates memory as [`Ram::alloc`] does and writes `bytes` to it.
    pub fn put(&self, bytes: &[u8]) -> u64 {
        let address = self.alloc(bytes.len() as u64);
        self.set(address, bytes);
        address
    }

    /// Writes `bytes` at `address`.
    pub fn set(&self, address: u64, bytes: &[u8]) {
        self.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Reads `len` bytes at `address`.
    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// User address of the byte at `address`.
    pub fn user(&self, address: u64) -> u64 {
        address + USER_ADDRESS_OFFSET
    }

    /// The memory table with user addresses. Its descriptors are valid as long as `self`.
    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let info = |region: &GuestRegionMmap<()>| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: self.user(region.start_addr().0),
            mmap_offset: region.file_offset().unwrap().start(),
            mmap_handle: self.file.as_raw_fd(),
        };
        self.memory.iter().map(info).collect()
    }

    /// All memory, including the gaps in the file. A comparison of two of these shows whether
    /// anything was written.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.file.metadata().unwrap().len() as usize];
        std::os::unix::fs::FileExt::read_exact_at(&self.file, &mut bytes, 0).unwrap();
        bytes
    }
}

impl Deref for Ram {
    type Target = GuestMemoryMmap<()>;

    fn deref(&self) -> &Self::Target {
        &self.memory
    }
}

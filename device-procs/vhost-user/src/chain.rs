//! Descriptor chains: each descriptor is copied once, checked, and turned into slices of
//! guest memory.

use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    VolatileSlice,
};

use crate::split_ring::{DESCRIPTOR, Descriptor, SplitRing};
use crate::{Buffers, Error, GuestMemory};

/// The most descriptors of one chain. The limit of virtio is the ring's size, but an
/// indirect table may claim up to 65,535 entries, with which one request could occupy a
/// worker for long.
pub const MAX_DESCRIPTORS: usize = 1024;

/// A request: the buffers that the device may read and those that it may write.
pub struct DescriptorChain<'m> {
    /// Index of the head descriptor, which identifies the chain in the used ring.
    pub head: u16,
    /// Where the ring found it.
    pub(crate) origin: ChainOrigin,
    /// Device-readable buffers in order.
    pub readable: Buffers<'m>,
    /// Device-writable buffers in order.
    pub writable: Buffers<'m>,
}

/// Where a ring found a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChainOrigin {
    /// At this index of the available ring.
    Available(u16),
    /// In the in-flight table: an earlier process had popped it.
    Resubmitted,
}

impl<'m> DescriptorChain<'m> {
    /// Walks the chain that begins at `head` of the descriptor table of `ring`. Each
    /// descriptor is loaded once, so the values that are checked are the values that are
    /// used, whatever the guest changes meanwhile.
    pub(crate) fn parse(
        origin: ChainOrigin,
        head: u16,
        ring: &SplitRing,
        memory: &'m GuestMemory,
    ) -> Result<Self, Error> {
        let malformed = |why: &str| Error::Chain(why.into());
        let mut readable = Buffers::default();
        let mut writable = Buffers::default();
        let mut count = 0;
        let mut walk = Walk::new(memory, ring, head);
        while let Some(descriptor) = walk.next().map_err(malformed)? {
            count += 1;
            if count > MAX_DESCRIPTORS {
                return Err(malformed("it has too many descriptors"));
            }
            let target = if descriptor.is_writable() {
                &mut writable
            } else if !writable.is_empty() {
                return Err(malformed("a readable descriptor follows a writable one"));
            } else {
                &mut readable
            };
            let (address, len) = (descriptor.address, descriptor.len as usize);
            if let Some(slice) = walk.lookup.slice(address, len) {
                target.push(slice);
                continue;
            }
            // The buffer crosses regions, or is not in guest memory.
            for slice in memory.get_slices(address, len) {
                let slice = slice.map_err(|_| Error::buffer(address, descriptor.len))?;
                target.push(slice);
            }
        }
        Ok(DescriptorChain {
            head,
            origin,
            readable,
            writable,
        })
    }
}

/// Finds slices of guest memory, and tries the region of the last one first.
struct Lookup<'m> {
    memory: &'m GuestMemory,
    last: Option<&'m GuestRegionMmap<()>>,
}

impl<'m> Lookup<'m> {
    /// The `len` bytes from `address` on, if they are in one region.
    fn slice(&mut self, address: GuestAddress, len: usize) -> Option<VolatileSlice<'m>> {
        let within = |region: &'m GuestRegionMmap<()>| {
            let at = region.to_region_addr(address)?;
            GuestMemoryRegion::get_slice(region, at, len).ok()
        };
        self.last.and_then(within).or_else(|| {
            self.last = self.memory.find_region(address);
            self.last.and_then(within)
        })
    }
}

/// The descriptors of a chain (virtio 1.2 section 2.7.5).
struct Walk<'a, 'm> {
    lookup: Lookup<'m>,
    ring: &'a SplitRing,
    /// The indirect table that the walk is in, if any.
    indirect: Option<GuestAddress>,
    /// Number of descriptors in the table.
    size: u16,
    /// Index of the next descriptor; `None` after the last one.
    next: Option<u16>,
    /// How many more descriptors the chain may have in this table, which ends loops.
    left: u16,
    /// Length of all buffers so far, in bytes.
    total: u32,
}

impl<'a, 'm> Walk<'a, 'm> {
    fn new(memory: &'m GuestMemory, ring: &'a SplitRing, head: u16) -> Self {
        Walk {
            lookup: Lookup { memory, last: None },
            ring,
            indirect: None,
            size: ring.size(),
            next: Some(head),
            left: ring.size(),
            total: 0,
        }
    }

    /// The next descriptor of a buffer; `None` after the last one.
    fn next(&mut self) -> Result<Option<Descriptor>, &'static str> {
        let Some(mut index) = self.next else {
            return Ok(None);
        };
        loop {
            if index >= self.size || self.left == 0 {
                return Err("it has a loop, or an index beyond its table");
            }
            let descriptor = match self.indirect {
                None => self.ring.descriptor(index),
                Some(table) => self.fetch_indirect(table, index),
            };
            let descriptor = descriptor.ok_or("a descriptor is not in guest memory")?;
            if descriptor.is_indirect() {
                self.enter_indirect_table(&descriptor)?;
                index = 0;
                continue;
            }
            self.left -= 1;
            self.next = descriptor.next();
            // The limit of virtio 1.2 section 2.7.5.2.
            self.total = (self.total.checked_add(descriptor.len))
                .ok_or("its buffers are longer than 4 GiB together")?;
            return Ok(Some(descriptor));
        }
    }

    fn fetch_indirect(&mut self, table: GuestAddress, index: u16) -> Option<Descriptor> {
        let offset = u64::from(index) * u64::from(DESCRIPTOR);
        let address = table.checked_add(offset)?;
        let words = match self.lookup.slice(address, DESCRIPTOR as usize) {
            Some(slice) => slice.read_obj(0).ok(),
            None => self.lookup.memory.read_obj(address).ok(),
        };
        words.map(Descriptor::from_words)
    }

    fn enter_indirect_table(&mut self, descriptor: &Descriptor) -> Result<(), &'static str> {
        if self.indirect.is_some() {
            return Err("an indirect table is nested");
        }
        let len = descriptor.len;
        if !len.is_multiple_of(DESCRIPTOR) {
            return Err("the length of an indirect table is not a multiple of 16");
        }
        self.size = u16::try_from(len / DESCRIPTOR)
            .map_err(|_| "an indirect table has more than 65535 entries")?;
        self.indirect = Some(descriptor.address);
        self.left = self.size;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use virtio_queue::desc::split::Descriptor as OracleDescriptor;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};

    use super::*;
    use crate::split_ring::RingLayout;
    use crate::testing::Random;

    /// In tables of random descriptors, crate virtio-queue finds the same chains, with the
    /// same end.
    #[test]
    fn chains_are_the_same_as_those_of_crate_virtio_queue() {
        const SIZE: u16 = 8;
        const AVAILABLE: u64 = 0x1000;
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x3000)]).unwrap());
        let layout = RingLayout {
            descriptors: GuestAddress(0),
            available: GuestAddress(AVAILABLE),
            used: GuestAddress(0x2000),
        };
        let ring = SplitRing::new(&memory, layout, SIZE, false).unwrap();
        let mut random = Random::new(1);
        let (mut whole, mut broken) = (0, 0);
        for _ in 0..20_000 {
            // Two tables. Indirect descriptors mostly point to the second one.
            for index in 0..u64::from(2 * SIZE) {
                let address = random.pick(&[0x80, 0x80, 0x88, 0x2ff8, 0x4000]);
                let len = random.pick(&[16, 48, 64, 128, 0, 24, u32::MAX]);
                let flags = random.pick(&[0, 1, 1, 1, 2, 3, 4, 5]);
                let next = random.below(u64::from(SIZE) + 1) as u16;
                let descriptor = OracleDescriptor::new(address, len, flags, next);
                memory
                    .write_obj(descriptor, GuestAddress(16 * index))
                    .unwrap();
            }
            let head = random.below(u64::from(SIZE) + 1) as u16;
            memory.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
            memory.write_obj(head, GuestAddress(AVAILABLE + 4)).unwrap();

            let mut queue = Queue::new(SIZE).unwrap();
            queue
                .try_set_avail_ring_address(GuestAddress(AVAILABLE))
                .unwrap();
            queue
                .try_set_used_ring_address(GuestAddress(0x2000))
                .unwrap();
            queue.set_ready(true);
            let theirs: Vec<OracleDescriptor> =
                queue.iter(&*memory).unwrap().next().unwrap().collect();
            let ends = theirs.last().is_some_and(|last| !last.has_next());

            let mut walk = Walk::new(&memory, &ring, head);
            let mut ours = Vec::new();
            let end = loop {
                match walk.next() {
                    Ok(Some(descriptor)) => ours.push(descriptor),
                    Ok(None) => break true,
                    Err(_) => break false,
                }
            };
            assert_eq!(end, ends, "{ours:?} {theirs:?}");
            let theirs = theirs.iter().map(|it| {
                let next = it.has_next().then(|| it.next());
                (it.addr(), it.len(), it.is_write_only(), next)
            });
            let ours = ours.iter();
            let ours = ours.map(|it| (it.address, it.len, it.is_writable(), it.next()));
            assert!(ours.eq(theirs));
            *if end { &mut whole } else { &mut broken } += 1;
        }
        assert!(whole > 1000 && broken > 1000, "{whole} {broken}");
    }
}

//! One descriptor chain, copied and checked once, as slices of guest memory.

use virtio_bindings::virtio_ring::VRING_DESC_ALIGN_SIZE;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::{Error, GuestMemory};

/// The most descriptors of one chain that a device looks at. The virtio limit
/// is the ring's size; indirect tables may claim up to 65,535 entries, which
/// would let one request hold a worker for long.
pub const MAX_DESCRIPTORS: usize = 1024;

/// A request: what the device may read, then what it may write.
pub struct Chain<'m> {
    /// Index of the head descriptor, which names the chain in the used ring.
    pub head: u16,
    /// Where it was found.
    pub(crate) origin: Origin,
    /// Device-readable buffers in order.
    pub readable: Buffers<'m>,
    /// Device-writable buffers in order.
    pub writable: Buffers<'m>,
}

/// Where a ring found a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// At this index of the available ring.
    Available(u16),
    /// In the inflight table: a process before this one had taken it.
    Inflight,
}

impl<'m> Chain<'m> {
    /// Walks the chain that begins at `head` of the descriptor table `table`, which has
    /// `size` entries, to its end. Each descriptor is fetched once, so what is checked
    /// here is what gets used, whatever the guest changes meanwhile.
    pub(crate) fn parse(
        queue: usize,
        origin: Origin,
        head: u16,
        table: GuestAddress,
        size: u16,
        memory: &'m GuestMemory,
    ) -> Result<Self, Error> {
        let bad = |why: &str| Error::Chain {
            queue,
            head,
            why: why.into(),
        };
        let mut readable = Buffers::default();
        let mut writable = Buffers::default();
        let mut count = 0;
        let mut walk = Walk::new(memory, table, size, head);
        while let Some(descriptor) = walk.next().map_err(bad)? {
            count += 1;
            if count > MAX_DESCRIPTORS {
                return Err(bad("too many descriptors"));
            }
            let target = if descriptor.is_write_only() {
                &mut writable
            } else if !writable.0.is_empty() {
                return Err(bad("a readable descriptor follows a writable one"));
            } else {
                &mut readable
            };
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let slice = slice
                    .map_err(|_| Error::buffer(queue, head, descriptor.addr(), descriptor.len()))?;
                target.push(slice);
            }
        }
        Ok(Chain {
            head,
            origin,
            readable,
            writable,
        })
    }
}

/// The descriptors of a chain (virtio 1.2 section 2.7.5). Crate virtio-queue walks only
/// what it has found in the available ring itself.
struct Walk<'m> {
    memory: &'m GuestMemory,
    table: GuestAddress,
    size: u16,
    /// Index of the next descriptor, unless this was the last.
    next: Option<u16>,
    /// As many more may come from this table.
    left: u16,
    indirect: bool,
    /// Length of all buffers so far, in bytes.
    total: u32,
}

impl<'m> Walk<'m> {
    fn new(memory: &'m GuestMemory, table: GuestAddress, size: u16, head: u16) -> Self {
        Walk {
            memory,
            table,
            size,
            next: Some(head),
            left: size,
            indirect: false,
            total: 0,
        }
    }

    /// The next descriptor of a buffer; `None` behind the last.
    fn next(&mut self) -> Result<Option<Descriptor>, &'static str> {
        let Some(mut index) = self.next else {
            return Ok(None);
        };
        let mut descriptor = self.fetch(index)?;
        if descriptor.refers_to_indirect_table() {
            self.enter(&descriptor)?;
            index = 0;
            descriptor = self.fetch(index)?;
            if descriptor.refers_to_indirect_table() {
                return Err("an indirect table within another");
            }
        }
        self.left -= 1; // `fetch` has seen that there is one
        self.next = descriptor.has_next().then(|| descriptor.next());
        // Drivers must not make longer ones (virtio 1.2 section 2.7.5.2).
        self.total = (self.total.checked_add(descriptor.len()))
            .ok_or("its buffers have more than 4 GiB together")?;
        Ok(Some(descriptor))
    }

    fn fetch(&self, index: u16) -> Result<Descriptor, &'static str> {
        if index >= self.size || self.left == 0 {
            return Err("it does not end properly");
        }
        let offset = u64::from(index) * u64::from(VRING_DESC_ALIGN_SIZE);
        self.table
            .checked_add(offset)
            .and_then(|address| self.memory.read_obj(address).ok())
            .ok_or("a descriptor is not in guest memory")
    }

    fn enter(&mut self, descriptor: &Descriptor) -> Result<(), &'static str> {
        if self.indirect {
            return Err("an indirect table within another");
        }
        let len = descriptor.len();
        if !len.is_multiple_of(VRING_DESC_ALIGN_SIZE) {
            return Err("an indirect table with a part of a descriptor");
        }
        self.size = u16::try_from(len / VRING_DESC_ALIGN_SIZE)
            .map_err(|_| "an indirect table of more than 65535 entries")?;
        self.table = descriptor.addr();
        self.left = self.size;
        self.indirect = true;
        Ok(())
    }
}

/// Consecutive pieces of guest memory; never empty pieces.
#[derive(Clone, Default)]
pub struct Buffers<'m>(Vec<VolatileSlice<'m>>);

impl<'m> FromIterator<VolatileSlice<'m>> for Buffers<'m> {
    fn from_iter<I: IntoIterator<Item = VolatileSlice<'m>>>(slices: I) -> Self {
        let mut all = Buffers::default();
        slices.into_iter().for_each(|slice| all.push(slice));
        all
    }
}

impl<'m> Buffers<'m> {
    fn push(&mut self, slice: VolatileSlice<'m>) {
        if !slice.is_empty() {
            self.0.push(slice);
        }
    }

    /// Length of all pieces together, in bytes.
    pub fn len(&self) -> usize {
        self.0.iter().map(VolatileSlice::len).sum()
    }

    /// Whether there is not a single byte.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The pieces.
    pub fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.0
    }

    /// Takes the first `count` bytes off the front; `None` (and no change) when
    /// there are fewer.
    pub fn take(&mut self, count: usize) -> Option<Buffers<'m>> {
        if count > self.len() {
            return None;
        }
        let mut taken = Buffers::default();
        let mut rest = Buffers::default();
        let mut left = count;
        for slice in self.0.drain(..) {
            let here = left.min(slice.len());
            // `here` is at most the slice's length, so neither can fail.
            if let (Ok(front), Ok(back)) = (slice.subslice(0, here), slice.offset(here)) {
                taken.push(front);
                rest.push(back);
            }
            left -= here;
        }
        *self = rest;
        Some(taken)
    }

    /// Splits off the last `count` bytes; `None` (and no change) when there are
    /// fewer.
    pub fn take_back(&mut self, count: usize) -> Option<Buffers<'m>> {
        let front = self.len().checked_sub(count)?;
        let front = self.take(front)?;
        Some(std::mem::replace(self, front))
    }

    /// Copies guest memory into `buf`; returns how many bytes there were.
    pub fn copy_to(&self, buf: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            done += slice.copy_to(&mut buf[done..]);
        }
        done
    }

    /// Copies `buf` into guest memory; returns how many bytes had room.
    pub fn copy_from(&self, buf: &[u8]) -> usize {
        self.copy_from_at(0, buf)
    }

    /// As [`Buffers::copy_from`], behind the first `skip` bytes.
    pub fn copy_from_at(&self, mut skip: usize, buf: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            // Fails where the slice is skipped as a whole.
            if let Ok(rest) = slice.offset(skip.min(slice.len())) {
                let count = rest.len().min(buf.len() - done);
                rest.copy_from(&buf[done..done + count]);
                done += count;
            }
            skip = skip.saturating_sub(slice.len());
        }
        done
    }

    /// The pieces for readv(2) and writev(2). They are valid as long as the
    /// guest memory that this borrows from.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        self.0
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::{Queue, QueueOwnedT, QueueT};

    use super::*;
    use crate::testing::Random;

    /// Crate virtio-queue, which others have looked at as well, finds the same
    /// descriptors in tables full of anything, and sees the same end.
    #[test]
    fn chains_are_what_another_implementation_takes_them_for() {
        const SIZE: u16 = 8;
        const AVAILABLE: u64 = 0x1000;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x3000)]).unwrap();
        let mut random = Random::new(1);
        let (mut whole, mut broken) = (0, 0);
        for _ in 0..20_000 {
            // Two tables, of which one is where indirect descriptors mostly point to.
            for index in 0..u64::from(2 * SIZE) {
                let address = random.pick(&[0x80, 0x80, 0x88, 0x2ff8, 0x4000]);
                let len = random.pick(&[16, 48, 64, 128, 0, 24, u32::MAX]);
                let flags = random.pick(&[0, 1, 1, 1, 2, 3, 4, 5]);
                let next = random.below(u64::from(SIZE) + 1) as u16;
                let descriptor = Descriptor::new(address, len, flags, next);
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
            let theirs: Vec<Descriptor> = queue.iter(&memory).unwrap().next().unwrap().collect();
            let ends = theirs.last().is_some_and(|last| !last.has_next());

            let mut walk = Walk::new(&memory, GuestAddress(0), SIZE, head);
            let mut ours = Vec::new();
            let end = loop {
                match walk.next() {
                    Ok(Some(descriptor)) => ours.push(descriptor),
                    Ok(None) => break true,
                    Err(_) => break false,
                }
            };
            assert_eq!(end, ends, "{ours:?} {theirs:?}");
            let seen = |it: &Descriptor| (it.addr(), it.len(), it.flags(), it.next());
            assert!(ours.iter().map(seen).eq(theirs.iter().map(seen)));
            *if end { &mut whole } else { &mut broken } += 1;
        }
        assert!(whole > 1000 && broken > 1000, "{whole} {broken}");
    }

    fn slices<'m>(memory: &'m GuestMemory, pieces: &[(u64, usize)]) -> Buffers<'m> {
        let slice = |&(at, len)| memory.get_slice(GuestAddress(at), len).unwrap();
        pieces.iter().map(slice).collect()
    }

    #[test]
    fn bytes_are_taken_across_pieces() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        memory.write_slice(b"abcdefgh", GuestAddress(0x10)).unwrap();
        let mut all = slices(&memory, &[(0x10, 3), (0x13, 0), (0x13, 5)]);
        assert_eq!((all.len(), all.slices().len()), (8, 2));
        let front = all.take(4).unwrap();
        let mut text = [0; 8];
        assert_eq!(front.copy_to(&mut text), 4);
        assert_eq!(&text[..4], b"abcd");
        assert!(all.take(5).is_none());
        let back = all.take_back(1).unwrap();
        assert_eq!(back.copy_from(b"Z!"), 1);
        assert_eq!(all.len(), 3);
        let mut after = [0; 8];
        memory.read_slice(&mut after, GuestAddress(0x10)).unwrap();
        assert_eq!(&after, b"abcdefgZ");
    }

    #[test]
    fn bytes_are_put_behind_others() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let all = slices(&memory, &[(0, 3), (3, 2), (5, 3)]);
        assert_eq!(all.copy_from_at(2, b"abcd"), 4);
        assert_eq!(all.copy_from_at(7, b"yz"), 1);
        assert_eq!(all.copy_from_at(8, b"yz"), 0);
        assert_eq!(all.copy_from_at(100, b"yz"), 0);
        let mut after = [0; 8];
        memory.read_slice(&mut after, GuestAddress(0)).unwrap();
        assert_eq!(&after, b"\0\0abcd\0y");
    }
}

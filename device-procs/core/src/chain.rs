//! One descriptor chain, copied and checked once, as slices of guest memory.

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use crate::{Error, GuestMemory};

/// The most descriptors of one chain that a device looks at. The virtio limit
/// is the ring's size; indirect tables may claim up to 65,535 entries, which
/// would let one request hold a worker for long.
pub const MAX_DESCRIPTORS: usize = 1024;

/// A request: what the device may read, then what it may write.
pub struct Chain<'m> {
    /// Index of the head descriptor, which names the chain in the used ring.
    pub head: u16,
    /// Where it was in the available ring.
    pub(crate) position: u16,
    /// Device-readable buffers in order.
    pub readable: Buffers<'m>,
    /// Device-writable buffers in order.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Walks `chain` to its end. Each descriptor is fetched once, so what is
    /// checked here is what gets used, whatever the guest changes meanwhile.
    pub(crate) fn parse(
        queue: usize,
        position: u16,
        mut chain: DescriptorChain<&'m GuestMemory>,
        memory: &'m GuestMemory,
    ) -> Result<Self, Error> {
        let head = chain.head_index();
        let bad = |why: &str| Error::Chain {
            queue,
            head,
            why: why.into(),
        };
        let mut readable = Buffers::default();
        let mut writable = Buffers::default();
        let mut count = 0;
        let mut more = true;
        for descriptor in &mut chain {
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
            more = descriptor.has_next();
        }
        // The iterator also stops at a loop, at an index out of range and at a
        // nested indirect table; then the last descriptor promised another.
        if more {
            return Err(bad("it does not end properly"));
        }
        Ok(Chain {
            head,
            position,
            readable,
            writable,
        })
    }
}

/// Consecutive pieces of guest memory; never empty pieces.
#[derive(Clone, Default)]
pub struct Buffers<'m>(Vec<VolatileSlice<'m>>);

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
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn slices<'m>(memory: &'m GuestMemory, pieces: &[(u64, usize)]) -> Buffers<'m> {
        let mut all = Buffers::default();
        for &(at, len) in pieces {
            all.push(memory.get_slice(GuestAddress(at), len).unwrap());
        }
        all
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

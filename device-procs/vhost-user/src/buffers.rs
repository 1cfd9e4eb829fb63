//! The buffers of a request: consecutive slices of guest memory.

use vm_memory::VolatileSlice;

/// Number of slices that need no allocation. Most disk requests have no more of them, and
/// a larger array would slow down each request, for it is moved around.
const INLINE_SLICES: usize = 2;

/// Consecutive slices of guest memory, none of them empty.
#[derive(Clone)]
pub struct Buffers<'m> {
    inline: [VolatileSlice<'m>; INLINE_SLICES],
    /// All slices, once they are too many for `inline`.
    heap: Vec<VolatileSlice<'m>>,
    /// Index of the first slice; those in front of it are taken.
    start: usize,
    /// Index after the last slice.
    end: usize,
    /// Length of all slices together, in bytes.
    len: usize,
}

impl Default for Buffers<'_> {
    fn default() -> Self {
        Buffers {
            inline: [VolatileSlice::from(&mut [][..]); INLINE_SLICES],
            heap: Vec::new(),
            start: 0,
            end: 0,
            len: 0,
        }
    }
}

impl<'m> FromIterator<VolatileSlice<'m>> for Buffers<'m> {
    fn from_iter<I: IntoIterator<Item = VolatileSlice<'m>>>(slices: I) -> Self {
        let mut all = Buffers::default();
        slices.into_iter().for_each(|slice| all.push(slice));
        all
    }
}

impl<'m> Buffers<'m> {
    pub(crate) fn push(&mut self, slice: VolatileSlice<'m>) {
        if slice.is_empty() {
            return;
        }
        // Cannot overflow: a chain has less than 4 GiB.
        self.len += slice.len();
        if self.heap.is_empty() {
            if let Some(free) = self.inline.get_mut(self.end) {
                *free = slice;
                self.end += 1;
                return;
            }
            self.heap.reserve(8 * INLINE_SLICES);
            self.heap.extend_from_slice(&self.inline);
        }
        self.heap.truncate(self.end);
        self.heap.push(slice);
        self.end += 1;
    }

    /// Length of all slices together, in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The slices.
    pub fn slices(&self) -> &[VolatileSlice<'m>] {
        let all = match self.heap.is_empty() {
            true => &self.inline[..],
            false => &self.heap[..],
        };
        &all[self.start..self.end]
    }

    fn slices_mut(&mut self) -> &mut [VolatileSlice<'m>] {
        let all = match self.heap.is_empty() {
            true => &mut self.inline[..],
            false => &mut self.heap[..],
        };
        &mut all[self.start..self.end]
    }

    /// Removes the first `count` bytes and returns them; `None`, and no change, when there
    /// are fewer.
    pub fn take(&mut self, count: usize) -> Option<Buffers<'m>> {
        let rest = self.len.checked_sub(count)?;
        if rest == 0 {
            return Some(std::mem::take(self));
        }
        let mut taken = Buffers::default();
        while let Some(first) = self.slices_mut().first_mut()
            && taken.len < count
        {
            let here = first.len().min(count - taken.len);
            taken.push(split(first, here).0);
            *first = split(first, here).1;
            if first.is_empty() {
                self.start += 1;
            }
        }
        self.len = rest;
        Some(taken)
    }

    /// Removes the last `count` bytes and returns them; `None`, and no change, when there
    /// are fewer.
    pub fn take_back(&mut self, count: usize) -> Option<Buffers<'m>> {
        let front = self.len.checked_sub(count)?;
        if let Some(last) = self.slices_mut().last_mut()
            && last.len() >= count
        {
            // The common case: the bytes are in the last slice.
            let (kept, back) = split(last, last.len() - count);
            *last = kept;
            if kept.is_empty() {
                self.end -= 1;
            }
            self.len = front;
            let mut taken = Buffers::default();
            taken.push(back);
            return Some(taken);
        }
        let front = self.take(front)?;
        Some(std::mem::replace(self, front))
    }

    /// Copies guest memory into `buf`, as much as fits; returns the number of bytes.
    pub fn copy_to(&self, buf: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            done += slice.copy_to(&mut buf[done..]);
        }
        done
    }

    /// Copies `buf` into guest memory, as much as fits; returns the number of bytes.
    pub fn copy_from(&self, buf: &[u8]) -> usize {
        self.copy_from_at(0, buf)
    }

    /// As [`Buffers::copy_from`], after the first `skip` bytes.
    pub fn copy_from_at(&self, mut skip: usize, buf: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            // Fails for a slice that is skipped as a whole.
            if let Ok(rest) = slice.offset(skip.min(slice.len())) {
                let count = rest.len().min(buf.len() - done);
                rest.copy_from(&buf[done..done + count]);
                done += count;
            }
            skip = skip.saturating_sub(slice.len());
        }
        done
    }

    /// The slices as iovecs for readv(2) and writev(2). They are valid as long as the guest
    /// memory that this borrows from is mapped.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        self.slices()
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect()
    }
}

/// Splits `slice` after `at` bytes, or at its end if it has fewer.
fn split<'m>(slice: &VolatileSlice<'m>, at: usize) -> (VolatileSlice<'m>, VolatileSlice<'m>) {
    let none = VolatileSlice::from(&mut [][..]);
    match (slice.subslice(0, at), slice.offset(at)) {
        (Ok(front), Ok(back)) => (front, back),
        _ => (*slice, none),
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::GuestMemory;
    use crate::testing::Random;

    fn buffers<'m>(memory: &'m GuestMemory, slices: &[(u64, usize)]) -> Buffers<'m> {
        let mut all = Buffers::default();
        for &(at, len) in slices {
            all.push(memory.get_slice(GuestAddress(at), len).unwrap());
        }
        all
    }

    #[test]
    fn bytes_are_taken_across_slices() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        memory.write_slice(b"abcdefgh", GuestAddress(0x10)).unwrap();
        let mut all = buffers(&memory, &[(0x10, 3), (0x13, 0), (0x13, 5)]);
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
    fn bytes_are_copied_to_an_offset() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let all = buffers(&memory, &[(0, 3), (3, 2), (5, 3)]);
        assert_eq!(all.copy_from_at(2, b"abcd"), 4);
        assert_eq!(all.copy_from_at(7, b"yz"), 1);
        assert_eq!(all.copy_from_at(8, b"yz"), 0);
        assert_eq!(all.copy_from_at(100, b"yz"), 0);
        let mut after = [0; 8];
        memory.read_slice(&mut after, GuestAddress(0)).unwrap();
        assert_eq!(&after, b"\0\0abcd\0y");
    }

    /// However buffers are split and taken apart, the bytes are the same as in one slice.
    #[test]
    fn any_number_of_slices_gives_the_same_bytes_as_one() {
        const LEN: usize = 64;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let bytes: Vec<u8> = (0..LEN as u8).collect();
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        for seed in 0..2000 {
            let mut random = Random::new(seed);
            let mut all = Buffers::default();
            while all.len() < LEN {
                let len = random.below(max_slice_len(seed)) as usize;
                let len = len.min(LEN - all.len());
                let slice = memory.get_slice(GuestAddress(all.len() as u64), len);
                all.push(slice.unwrap());
            }
            let mut expected = &bytes[..];
            while !expected.is_empty() {
                let count = random.below(LEN as u64) as usize;
                let back = random.below(2) == 0;
                let taken = if back {
                    all.take_back(count)
                } else {
                    all.take(count)
                };
                assert_eq!(taken.is_some(), count <= expected.len(), "seed {seed}");
                let Some(taken) = taken else { continue };
                let here;
                (here, expected) = if back {
                    let (front, here) = expected.split_at(expected.len() - count);
                    (here, front)
                } else {
                    expected.split_at(count)
                };
                for (buffers, expected) in [(&taken, here), (&all, expected)] {
                    let mut found = [0; LEN];
                    assert_eq!(buffers.copy_to(&mut found), expected.len(), "seed {seed}");
                    assert_eq!(&found[..expected.len()], expected, "seed {seed}");
                    assert_eq!(buffers.len(), expected.len());
                    assert!(buffers.slices().iter().all(|slice| !slice.is_empty()));
                }
            }
            assert!(all.is_empty() && all.slices().is_empty());
        }
    }

    /// Long slices in some runs, many short ones in others.
    fn max_slice_len(seed: u64) -> u64 {
        [3, 8, 40][seed as usize % 3]
    }
}

//! Bounce buffers: memory with the alignment that direct I/O needs (open(2), O_DIRECT), in
//! place of guest memory that has another.

use std::io;

use crate::guest_iovec::GuestIovec;

/// An aligned buffer, and how far a transfer has come in it.
pub struct BounceBuffer {
    /// Keeps `whole` allocated. Aligned by hand, with some bytes to spare: memory that the C
    /// library aligns it may not use again.
    _memory: Vec<u8>,
    whole: GuestIovec,
    /// What is not transferred yet.
    remaining: [GuestIovec; 1],
    /// Number of guest iovecs that are filled completely.
    filled: usize,
}

impl BounceBuffer {
    /// A buffer of `len` bytes at a multiple of `align`.
    ///
    /// # Errors
    /// No memory is left, `len` is 0, or `align` is not a power of two.
    pub fn new(len: usize, align: usize) -> io::Result<Self> {
        let size = len
            .checked_add(align)
            .filter(|_| len > 0 && align.is_power_of_two())
            .ok_or(io::ErrorKind::InvalidInput)?;
        let mut memory = Vec::new();
        memory
            .try_reserve_exact(size)
            .map_err(|_| io::ErrorKind::OutOfMemory)?;
        memory.resize(size, 0);
        let base = memory.as_mut_ptr();
        let whole = GuestIovec::new(base.wrapping_add(base.align_offset(align)), len);
        Ok(BounceBuffer {
            _memory: memory,
            whole,
            remaining: [whole],
            filled: 0,
        })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.whole.len()
    }

    /// Copies guest memory into the buffer.
    ///
    /// # Safety
    /// The memory of `guest` is mapped.
    pub unsafe fn copy_from_guest(&mut self, guest: &[GuestIovec]) {
        let mut done = 0;
        for iovec in guest {
            let len = iovec.len().min(self.len() - done);
            // SAFETY: the guest memory is mapped, as the caller promises, and `done + len` is
            // at most the buffer's length.
            unsafe { self.whole.base().add(done).copy_from(iovec.base(), len) };
            done += len;
        }
    }

    /// What is still to be transferred, for a system call.
    pub fn remaining(&self) -> &[GuestIovec] {
        &self.remaining
    }

    /// Copies the next `count` bytes, which were just transferred, to guest memory, and
    /// removes the filled part from `guest`.
    ///
    /// # Safety
    /// The memory of `guest` is mapped.
    pub unsafe fn copy_to_guest(&mut self, count: usize, guest: &mut [GuestIovec]) {
        let mut from = self.remaining[0].base();
        let mut left = count.min(self.remaining[0].len());
        let mut guest = &mut guest[self.filled..];
        let total = guest.len();
        while let Some(&iovec) = guest.first() {
            let len = iovec.len().min(left);
            // SAFETY: the guest memory is mapped, as the caller promises, and the buffer has
            // `left` bytes from `from` on.
            unsafe {
                iovec.base().copy_from(from, len);
                from = from.add(len);
            }
            left -= len;
            guest = GuestIovec::advance(guest, len);
            if left == 0 {
                break;
            }
        }
        self.filled += total - guest.len();
    }

    /// `count` bytes are transferred; returns whether these were the last ones.
    pub fn advance(&mut self, count: usize) -> bool {
        GuestIovec::advance(&mut self.remaining, count).is_empty()
    }
}

//! A buffer with the alignment that a medium wants of those who go past the page cache
//! (open(2), O_DIRECT), for guest memory that has another.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::io;
use std::ptr::NonNull;

use crate::transfer::skip;

/// An aligned buffer, and how far a transfer has come in it.
pub struct Bounce {
    /// What it lies in. Aligned by hand: what the C library aligns it may not use again.
    whole: NonNull<u8>,
    layout: Layout,
    start: *mut u8,
    len: usize,
    /// What is not transferred yet.
    rest: [libc::iovec; 1],
    /// Pieces of guest memory that are done with.
    filled: usize,
}

// SAFETY: it owns what its pointers are to.
unsafe impl Send for Bounce {}

impl Bounce {
    /// A buffer of `len` bytes, which are zeros.
    ///
    /// # Errors
    /// When there is no memory, or no such alignment.
    pub fn new(len: usize, align: usize) -> io::Result<Self> {
        let layout = len
            .checked_add(align)
            .and_then(|size| Layout::from_size_align(size, 1).ok())
            .filter(|_| len > 0 && align.is_power_of_two())
            .ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the layout's size is not zero.
        let whole = NonNull::new(unsafe { alloc_zeroed(layout) });
        let whole = whole.ok_or(io::ErrorKind::OutOfMemory)?;
        let skipped = whole.as_ptr().align_offset(align);
        // SAFETY: less than `align`, so there are `len` bytes behind it.
        let start = unsafe { whole.as_ptr().add(skipped) };
        let rest = libc::iovec {
            iov_base: start.cast(),
            iov_len: len,
        };
        Ok(Bounce {
            whole,
            layout,
            start,
            len,
            rest: [rest],
            filled: 0,
        })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Copies `memory` into it.
    ///
    /// # Safety
    /// The pieces are memory that can be read, as much together as the buffer is long.
    pub unsafe fn take(&mut self, memory: &[libc::iovec]) {
        let mut at = 0;
        for piece in memory {
            let len = piece.iov_len.min(self.len - at);
            // SAFETY: the caller's; and `at + len` is at most the buffer's length.
            unsafe {
                self.start.add(at).copy_from(piece.iov_base.cast(), len);
            }
            at += len;
        }
    }

    /// What is still to be transferred.
    pub fn pieces(&self) -> &[libc::iovec] {
        &self.rest
    }

    /// Copies the next `count` bytes out to `memory`, from whose front they go away.
    ///
    /// # Safety
    /// The pieces are memory that can be written.
    pub unsafe fn deliver(&mut self, count: usize, memory: &mut [libc::iovec]) {
        let mut from: *const u8 = self.rest[0].iov_base.cast();
        let mut left = count.min(self.rest[0].iov_len);
        let mut pieces = &mut memory[self.filled..];
        let total = pieces.len();
        while let Some(&piece) = pieces.first() {
            let len = piece.iov_len.min(left);
            // SAFETY: the caller's; and `left` bytes of the buffer are there.
            unsafe {
                piece.iov_base.cast::<u8>().copy_from(from, len);
                from = from.add(len);
            }
            left -= len;
            pieces = skip(pieces, len);
            if left == 0 {
                break;
            }
        }
        self.filled += total - pieces.len();
    }

    /// `count` bytes are transferred; returns whether that is all.
    pub fn advance(&mut self, count: usize) -> bool {
        skip(&mut self.rest, count).is_empty()
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.whole.as_ptr(), self.layout) };
    }
}

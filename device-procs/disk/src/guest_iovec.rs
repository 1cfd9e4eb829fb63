//! iovecs that point to guest memory and may be passed to another thread or the kernel.

use device_vhost_user::Buffers;

/// An iovec (readv(2)). Guest memory stays mapped until all requests of the worker's queues
/// are completed, so an iovec of a request in flight is valid.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct GuestIovec(libc::iovec);

// SAFETY: all threads share guest memory. Every access through the pointer is unsafe code
// that says why the memory is still mapped.
unsafe impl Send for GuestIovec {}

impl GuestIovec {
    /// The `len` bytes at `base`.
    pub fn new(base: *mut u8, len: usize) -> Self {
        GuestIovec(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        })
    }

    /// The first byte.
    pub fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Appends the slices of `buffers` to `iovecs`.
    pub fn append(iovecs: &mut Vec<GuestIovec>, buffers: &Buffers<'_>) {
        let slices = buffers.slices().iter();
        iovecs.extend(slices.map(|it| GuestIovec::new(it.ptr_guard_mut().as_ptr(), it.len())));
    }

    /// The length of all `iovecs` in bytes.
    pub fn total_len(iovecs: &[GuestIovec]) -> usize {
        iovecs.iter().map(GuestIovec::len).sum()
    }

    /// The array for system calls.
    pub fn as_ptr(iovecs: &[GuestIovec]) -> *const libc::iovec {
        // The representation is transparent.
        iovecs.as_ptr().cast()
    }

    /// What is left of `iovecs` after the first `count` bytes. Does not begin with an empty
    /// iovec.
    pub fn advance(mut iovecs: &mut [GuestIovec], mut count: usize) -> &mut [GuestIovec] {
        while let Some(GuestIovec(first)) = iovecs.first_mut() {
            let here = count.min(first.iov_len);
            // SAFETY: `here` is at most the length of this iovec.
            first.iov_base = unsafe { first.iov_base.cast::<u8>().add(here) }.cast();
            first.iov_len -= here;
            count -= here;
            if first.iov_len > 0 {
                break;
            }
            iovecs = &mut iovecs[1..];
        }
        iovecs
    }
}

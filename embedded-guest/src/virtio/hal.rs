//! Memory access for virtio-drivers: addresses are physical addresses.

use alloc::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use core::ptr::NonNull;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// Identity-mapped memory that devices access without translation.
pub struct Identity;

fn layout(pages: usize) -> Layout {
    Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE)
        .unwrap_or(Layout::new::<[u8; PAGE_SIZE]>())
}

// SAFETY: pages come zeroed and aligned from the heap, each allocation apart.
unsafe impl Hal for Identity {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: queues have at least one page.
        let start = unsafe { alloc_zeroed(layout(pages)) };
        match NonNull::new(start) {
            Some(pointer) => (start as PhysAddr, pointer),
            None => handle_alloc_error(layout(pages)),
        }
    }

    // SAFETY: the caller got it from `dma_alloc` with the same number of pages.
    unsafe fn dma_dealloc(_: PhysAddr, start: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: as above.
        unsafe { dealloc(start.as_ptr(), layout(pages)) };
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).unwrap_or(NonNull::dangling())
    }

    // SAFETY: addresses are physical ones here, so the buffer is where it was.
    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>() as PhysAddr
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

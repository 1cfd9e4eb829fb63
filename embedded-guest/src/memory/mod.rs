//! Memory: what the machine has, page tables, the heap.

pub mod heap;
pub mod pages;
pub mod raw;
pub mod start_info;

/// The range of addresses that the image, its stacks and its heap take up.
pub fn image() -> core::ops::Range<u64> {
    // SAFETY: linker.ld defines them; only their addresses are used.
    unsafe extern "C" {
        static image_start: u8;
        static image_end: u8;
    }
    (&raw const image_start) as u64..(&raw const image_end) as u64
}

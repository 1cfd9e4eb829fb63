//! The heap: blocks of a power of two bytes, cut from one range of the image and kept in a
//! list for each size when freed. A block is aligned to its size, so pages for
//! virtqueues come from here too.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::null_mut;

const SMALLEST: usize = 16;
const SIZES: usize = 18;

// SAFETY: linker.ld defines them; only their addresses are used.
unsafe extern "C" {
    static mut heap_start: u8;
    static mut heap_end: u8;
}

#[global_allocator]
static HEAP: Heap = Heap(UnsafeCell::new(State {
    next: 0,
    free: [null_mut(); SIZES],
}));

struct Heap(UnsafeCell<State>);

struct State {
    /// The first byte never handed out; 0: nothing was yet.
    next: usize,
    /// Freed blocks by size, each holding the address of the next.
    free: [*mut Free; SIZES],
}

struct Free {
    next: *mut Free,
}

// SAFETY: one thread, see `single.rs`.
unsafe impl Sync for Heap {}

/// Which list a block for `layout` is in, and its size in bytes.
fn class(layout: Layout) -> (usize, usize) {
    let size = layout
        .size()
        .max(layout.align())
        .max(SMALLEST)
        .next_power_of_two();
    ((size / SMALLEST).trailing_zeros() as usize, size)
}

// SAFETY: blocks are disjoint: each is cut once, and is in a list or handed out.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let (class, size) = class(layout);
        // SAFETY: one thread, and no other reference to the state is live here.
        let state = unsafe { &mut *self.0.get() };
        let Some(list) = state.free.get_mut(class) else {
            return null_mut();
        };
        if !list.is_null() {
            let block = *list;
            // SAFETY: what is in a list was written by `dealloc`.
            *list = unsafe { (*block).next };
            return block.cast();
        }
        let start = state
            .next
            .max(&raw const heap_start as usize)
            .next_multiple_of(size);
        if start + size > &raw const heap_end as usize {
            return null_mut();
        }
        state.next = start + size;
        start as *mut u8
    }

    // SAFETY: the caller got the block from `alloc` with this layout.
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let (class, _) = class(layout);
        // SAFETY: as in `alloc`; the block is at least 16 bytes and no longer used.
        unsafe {
            let state = &mut *self.0.get();
            let block: *mut Free = block.cast();
            (*block).next = state.free[class];
            state.free[class] = block;
        }
    }
}

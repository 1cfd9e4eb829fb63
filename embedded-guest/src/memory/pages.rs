//! Page tables for memory above 4 GiB; boot/tables.s maps the rest.

use alloc::boxed::Box;
use core::ops::Range;

const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
/// Present, writable, open to user code, accessed.
const TABLE: u64 = 0x27;
const PRESENT: u64 = 1;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Most memory that four levels of tables identity-map here.
const LIMIT: u64 = 1 << 47;

/// Cache mode of a mapping.
#[derive(Clone, Copy)]
pub enum Kind {
    /// Through the caches.
    Ram,
    /// Past them.
    Device,
}

impl Kind {
    /// Bits of a 2 MiB page: present, writable, open to user code, accessed, dirty,
    /// and no caching for a device.
    fn page(self) -> u64 {
        match self {
            Self::Ram => 0xe7,
            Self::Device => 0xff,
        }
    }
}

#[repr(C, align(4096))]
struct Table([u64; 512]);

// SAFETY: boot/tables.s defines it, a page that is aligned.
unsafe extern "C" {
    static mut pml4: Table;
}

/// Maps `range` to itself, in whole GiB; what is mapped already stays as it is.
/// Returns the end of what it could map: 128 TiB at most.
pub fn map(range: Range<u64>, kind: Kind) -> u64 {
    let end = range.end.min(LIMIT);
    let mut start = range.start & !(GIB - 1);
    while start < end {
        // SAFETY: the tables form a tree that starts at pml4, are mapped to
        // themselves, and are changed only here; an entry that was not present is
        // not cached by the processor.
        unsafe {
            let pointers = entry(&raw mut pml4, start >> 39);
            if *pointers & PRESENT == 0 {
                pointers.write_volatile(Box::into_raw(Box::new(Table([0; 512]))) as u64 | TABLE);
            }
            let directory = entry((*pointers & ADDRESS) as *mut Table, start >> 30);
            if *directory & PRESENT == 0 {
                let pages = (start..).step_by(LARGE_PAGE as usize);
                let mut table = Box::new(Table([0; 512]));
                for (page, address) in table.0.iter_mut().zip(pages) {
                    *page = address | kind.page();
                }
                directory.write_volatile(Box::into_raw(table) as u64 | TABLE);
            }
        }
        start += GIB;
    }
    end
}

/// The entry for the low nine bits of `index`.
// SAFETY: the caller passes a table.
unsafe fn entry(table: *mut Table, index: u64) -> *mut u64 {
    // SAFETY: the caller passes a table, and nine bits stay within it.
    unsafe {
        (&raw mut (*table).0)
            .cast::<u64>()
            .add(index as usize & 511)
    }
}

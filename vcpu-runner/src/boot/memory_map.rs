//! What boot protocols pass to a kernel about memory.

use crate::layout;
use crate::vm::memory::GuestRam;

/// Where the initrd is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Initrd {
    pub address: u64,
    pub size: u64,
}

/// The memory map: start, size, and whether it is RAM.
pub(super) fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, bool)> {
    let mut map = vec![
        (0, layout::LOW_MEMORY_END, true),
        (layout::ACPI, layout::ACPI_SIZE, false),
        (layout::ECAM, layout::ECAM_SIZE, false),
    ];
    for (start, size) in ram.ranges() {
        let from = start.max(layout::HIGH_MEMORY);
        map.push((from, start + size - from, true));
    }
    map.sort_unstable();
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_is_sorted_and_has_all_ram() {
        let ram = GuestRam::new("6G".parse().unwrap()).unwrap();
        let map = memory_map(&ram);
        assert!(map.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        let total: u64 = map.iter().filter(|m| m.2).map(|m| m.1).sum();
        let hidden = layout::HIGH_MEMORY - layout::LOW_MEMORY_END;
        assert_eq!(total, (6 << 30) - hidden);
    }
}

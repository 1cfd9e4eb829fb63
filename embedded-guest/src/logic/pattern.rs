//! A test pattern: every 8-byte word depends on its offset and on a seed, so data at the wrong
//! offset, or of another run, is noticed.

/// The word at byte offset `place`.
pub fn word(seed: u64, place: u64) -> u64 {
    // splitmix64's finaliser (Steele, Lea, Flood 2014) over both.
    let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (place >> 3);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Fills `data`, which belongs at byte offset `place`; both multiples of 8.
pub fn fill(seed: u64, place: u64, data: &mut [u8]) {
    for (index, chunk) in data.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&word(seed, place + 8 * index as u64).to_le_bytes());
    }
}

/// The first byte offset in `data` where it is not what [`fill`] wrote, if any.
pub fn first_difference(seed: u64, place: u64, data: &[u8]) -> Option<usize> {
    data.chunks_exact(8)
        .enumerate()
        .find(|(index, chunk)| **chunk != word(seed, place + 8 * *index as u64).to_le_bytes())
        .map(|(index, _)| 8 * index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_misplacement_shows() {
        let mut data = [0; 512];
        fill(7, 4096, &mut data);
        assert_eq!(first_difference(7, 4096, &data), None);
        assert_eq!(first_difference(8, 4096, &data), Some(0));
        assert_eq!(first_difference(7, 4608, &data), Some(0));
        data[300] ^= 1;
        assert_eq!(first_difference(7, 4096, &data), Some(296));
    }
}

//! Output that nobody was there to read.

use std::collections::VecDeque;

/// Bytes that are kept.
const SIZE: usize = 64 * 1024;

/// The last [`SIZE`] bytes. What is older is discarded and counted.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: VecDeque<u8>,
    lost: u64,
}

impl Backlog {
    /// Keeps `bytes`, which come after all that is here.
    pub fn keep(&mut self, bytes: &[u8]) {
        let excess = (self.bytes.len() + bytes.len()).saturating_sub(SIZE);
        self.lost += excess as u64;
        self.bytes.drain(..excess.min(self.bytes.len()));
        let skip = bytes.len().saturating_sub(SIZE);
        self.bytes.extend(&bytes[skip..]);
    }

    /// The oldest bytes, as many as lie together; none when all is taken.
    pub fn oldest(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    /// The first `count` bytes have been read.
    pub fn take(&mut self, count: usize) {
        self.bytes.drain(..count.min(self.bytes.len()));
    }

    /// How many bytes were discarded since the last time that this was asked.
    pub fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(backlog: &mut Backlog) -> Vec<u8> {
        let mut all = Vec::new();
        while !backlog.oldest().is_empty() {
            let piece = backlog.oldest().to_vec();
            backlog.take(piece.len());
            all.extend(piece);
        }
        all
    }

    #[test]
    fn the_last_bytes_are_kept_in_order() {
        let mut backlog = Backlog::default();
        let stream: Vec<u8> = (0..3 * SIZE).map(|at| (at % 251) as u8).collect();
        for piece in stream.chunks(1000) {
            backlog.keep(piece);
        }
        assert_eq!(backlog.take_lost(), 2 * SIZE as u64);
        assert!(all(&mut backlog) == stream[2 * SIZE..]);
        assert_eq!(backlog.take_lost(), 0);
    }

    #[test]
    fn one_piece_may_be_more_than_there_is_room_for() {
        let mut backlog = Backlog::default();
        backlog.keep(b"old");
        let stream: Vec<u8> = (0..SIZE + 10).map(|at| (at % 251) as u8).collect();
        backlog.keep(&stream);
        assert_eq!(backlog.take_lost(), 13);
        assert!(all(&mut backlog) == stream[10..]);
    }
}

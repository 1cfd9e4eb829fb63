//! A used ring, checked entry by entry: each chain is returned once, with the right length
//! (virtio 1.3, 2.7.8). The host compiles this file, too.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

/// A fault of the device in the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The index moved by more than what is lent.
    Jump {
        /// From there.
        from: u16,
        /// To there.
        to: u16,
        /// Chains lent at that time.
        lent: u16,
    },
    /// A chain came back that never was one.
    Unknown(u32),
    /// A chain came back that had come back already.
    Twice(u32),
    /// Another length than it must be.
    Length {
        /// The chain.
        head: u32,
        /// What the device says that it wrote.
        got: u32,
        /// What it had to write.
        wanted: u32,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Jump { from, to, lent } => write!(
                formatter,
                "the used index jumps from {from} to {to} with {lent} chains lent"
            ),
            Self::Unknown(head) => write!(formatter, "chain {head} was returned and never lent"),
            Self::Twice(head) => write!(formatter, "chain {head} was returned twice"),
            Self::Length { head, got, wanted } => write!(
                formatter,
                "chain {head} was returned with {got} bytes written, not {wanted}"
            ),
        }
    }
}

/// What is known of a head.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Head {
    Never,
    /// With the number of bytes that the device will write; `None`: any.
    Lent(Option<u32>),
    Returned,
}

/// The chains that the device has, and how far its used ring was read.
pub struct Lent {
    heads: Vec<Head>,
    count: u16,
    next: u16,
}

impl Lent {
    /// For a ring of `size` entries, at its start.
    pub fn new(size: u16) -> Self {
        Self {
            heads: vec![Head::Never; usize::from(size)],
            count: 0,
            next: 0,
        }
    }

    /// How many are lent.
    pub fn count(&self) -> u16 {
        self.count
    }

    /// The used index up to which the ring was read.
    pub fn next(&self) -> u16 {
        self.next
    }

    /// Lends the chain that begins at `head`, into which `written` bytes have to be
    /// written.
    pub fn lend(&mut self, head: u16, written: Option<u32>) {
        if let Some(entry) = self.heads.get_mut(usize::from(head)) {
            *entry = Head::Lent(written);
            self.count += 1;
        }
    }

    /// How many entries are new, the used index being `index`.
    ///
    /// # Errors
    /// So many can't be.
    pub fn new_entries(&self, index: u16) -> Result<u16, Fault> {
        let new = index.wrapping_sub(self.next);
        if new > self.count {
            return Err(Fault::Jump {
                from: self.next,
                to: index,
                lent: self.count,
            });
        }
        Ok(new)
    }

    /// Takes the next entry, which says `head` and `written`; returns the head.
    ///
    /// # Errors
    /// It is not one that can be.
    pub fn take(&mut self, head: u32, written: u32) -> Result<u16, Fault> {
        let Some(entry) = self.heads.get_mut(head as usize) else {
            return Err(Fault::Unknown(head));
        };
        match *entry {
            Head::Never => return Err(Fault::Unknown(head)),
            Head::Returned => return Err(Fault::Twice(head)),
            Head::Lent(Some(wanted)) if wanted != written => {
                return Err(Fault::Length {
                    head,
                    got: written,
                    wanted,
                });
            }
            Head::Lent(_) => {}
        }
        *entry = Head::Returned;
        self.count -= 1;
        self.next = self.next.wrapping_add(1);
        Ok(head as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chain_comes_back_once() {
        let mut lent = Lent::new(8);
        for round in 0..70_000u32 {
            let head = (round % 8) as u16;
            lent.lend(head, Some(1));
            assert_eq!(lent.new_entries(round as u16), Ok(0));
            assert_eq!(lent.new_entries((round + 1) as u16), Ok(1));
            assert_eq!(lent.take(u32::from(head), 1), Ok(head));
            assert_eq!(lent.count(), 0);
        }
    }

    #[test]
    fn a_chain_that_comes_back_twice_is_noticed() {
        let mut lent = Lent::new(8);
        lent.lend(2, None);
        lent.lend(3, None);
        assert_eq!(lent.take(2, 1), Ok(2));
        assert_eq!(lent.take(2, 1), Err(Fault::Twice(2)));
        // With nothing lent, even one more entry is one too many.
        assert_eq!(lent.take(3, 1), Ok(3));
        let jump = Fault::Jump {
            from: 2,
            to: 3,
            lent: 0,
        };
        assert_eq!(lent.new_entries(3), Err(jump));
    }

    #[test]
    fn chains_that_never_were_and_jumps_are_noticed() {
        let mut lent = Lent::new(8);
        lent.lend(0, Some(513));
        assert_eq!(lent.take(5, 1), Err(Fault::Unknown(5)));
        assert_eq!(lent.take(8, 1), Err(Fault::Unknown(8)));
        assert_eq!(lent.take(u32::MAX, 1), Err(Fault::Unknown(u32::MAX)));
        assert!(lent.new_entries(2).is_err());
        assert!(lent.new_entries(u16::MAX).is_err(), "it goes backwards");
    }

    #[test]
    fn a_wrong_length_is_noticed() {
        let mut lent = Lent::new(8);
        lent.lend(1, Some(4097));
        let fault = Fault::Length {
            head: 1,
            got: 1,
            wanted: 4097,
        };
        assert_eq!(lent.take(1, 1), Err(fault));
    }
}

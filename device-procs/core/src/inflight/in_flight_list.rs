//! Requests in the order in which they were taken: a list through an array with a place
//! for each head, so that any of them is found and taken out at once.

use crate::chain::ChainOrigin;

/// A request that is taken and not completed.
#[derive(Clone, Copy)]
struct Link {
    origin: ChainOrigin,
    before: Option<u16>,
    after: Option<u16>,
}

/// The list.
#[derive(Default)]
pub(super) struct InFlightList {
    links: Vec<Option<Link>>,
    first: Option<u16>,
    last: Option<u16>,
    count: usize,
}

impl InFlightList {
    /// An empty list of requests of a ring with `size` entries.
    pub fn new(size: u16) -> Self {
        InFlightList {
            links: vec![None; size.into()],
            ..InFlightList::default()
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    fn link(&mut self, head: u16) -> Option<&mut Link> {
        self.links.get_mut(usize::from(head))?.as_mut()
    }

    /// Adds a request as the last.
    ///
    /// # Errors
    /// When there can be none of this number, or it is there already.
    pub fn push(&mut self, head: u16, origin: ChainOrigin) -> Result<(), String> {
        let before = self.last;
        match self.links.get_mut(usize::from(head)) {
            Some(free @ None) => {
                *free = Some(Link {
                    origin,
                    before,
                    after: None,
                });
            }
            Some(Some(_)) => return Err(format!("request {head} is made again while in flight")),
            None => return Err(super::outside()),
        }
        match before.and_then(|before| self.link(before)) {
            Some(link) => link.after = Some(head),
            None => self.first = Some(head),
        }
        self.last = Some(head);
        self.count += 1;
        Ok(())
    }

    /// Takes a request out; returns where it was found, if it is there.
    pub fn remove(&mut self, head: u16) -> Option<ChainOrigin> {
        let link = self.links.get_mut(usize::from(head))?.take()?;
        match link.before.and_then(|before| self.link(before)) {
            Some(before) => before.after = link.after,
            None => self.first = link.after,
        }
        match link.after.and_then(|after| self.link(after)) {
            Some(after) => after.before = link.before,
            None => self.last = link.before,
        }
        self.count -= 1;
        Some(link.origin)
    }

    /// Takes the last request out.
    pub fn pop(&mut self) -> Option<(u16, ChainOrigin)> {
        let head = self.last?;
        Some((head, self.remove(head)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn requests_stay_in_their_order_whichever_is_taken_out() {
        const SIZE: u16 = 8;
        for seed in 0..500 {
            println!("seed {seed}");
            let mut random = Random::new(seed);
            let (mut list, mut expected) = (InFlightList::new(SIZE), Vec::new());
            for position in 0..100 {
                let head = random.below(u64::from(SIZE) + 1) as u16;
                let known = expected.iter().position(|&(other, _)| other == head);
                match random.below(4) {
                    0 | 1 => {
                        let origin = ChainOrigin::Available(position);
                        let added = list.push(head, origin).is_ok();
                        assert_eq!(added, known.is_none() && head < SIZE);
                        if added {
                            expected.push((head, origin));
                        }
                    }
                    2 => {
                        let removed = known.map(|at| expected.remove(at).1);
                        assert_eq!(list.remove(head), removed);
                    }
                    _ => assert_eq!(list.pop(), expected.pop()),
                }
                assert_eq!(list.len(), expected.len());
            }
            while let Some(last) = expected.pop() {
                assert_eq!(list.pop(), Some(last));
            }
            assert_eq!((list.len(), list.first, list.pop()), (0, None, None));
        }
    }
}

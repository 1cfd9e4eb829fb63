//! The requests in flight, in the order in which they were submitted: a doubly linked list
//! through an array that is indexed by head, so that any request is removed at once.

use crate::chain::ChainOrigin;

/// A request in flight.
#[derive(Clone, Copy)]
struct ListEntry {
    origin: ChainOrigin,
    previous: Option<u16>,
    next: Option<u16>,
}

/// The list.
#[derive(Default)]
pub(super) struct InFlightList {
    entries: Vec<Option<ListEntry>>,
    first: Option<u16>,
    last: Option<u16>,
    count: u16,
}

impl InFlightList {
    /// An empty list of requests of a ring with `size` entries.
    pub fn new(size: u16) -> Self {
        InFlightList {
            entries: vec![None; size.into()],
            ..InFlightList::default()
        }
    }

    /// Number of requests.
    pub fn len(&self) -> u16 {
        self.count
    }

    fn entry(&mut self, head: u16) -> Option<&mut ListEntry> {
        self.entries.get_mut(usize::from(head))?.as_mut()
    }

    /// Adds a request at the end.
    ///
    /// # Errors
    /// The ring has no such head, or the request is already in flight.
    pub fn push(&mut self, head: u16, origin: ChainOrigin) -> Result<(), String> {
        let previous = self.last;
        match self.entries.get_mut(usize::from(head)) {
            Some(free @ None) => {
                *free = Some(ListEntry {
                    origin,
                    previous,
                    next: None,
                });
            }
            Some(Some(_)) => return Err(format!("request {head} is already in flight")),
            None => return Err(super::no_such_request()),
        }
        match previous.and_then(|previous| self.entry(previous)) {
            Some(entry) => entry.next = Some(head),
            None => self.first = Some(head),
        }
        self.last = Some(head);
        self.count += 1;
        Ok(())
    }

    /// Removes a request; returns its origin, or `None` if it is not in flight.
    pub fn remove(&mut self, head: u16) -> Option<ChainOrigin> {
        let entry = self.entries.get_mut(usize::from(head))?.take()?;
        match entry.previous.and_then(|previous| self.entry(previous)) {
            Some(previous) => previous.next = entry.next,
            None => self.first = entry.next,
        }
        match entry.next.and_then(|next| self.entry(next)) {
            Some(next) => next.previous = entry.previous,
            None => self.last = entry.previous,
        }
        self.count -= 1;
        Some(entry.origin)
    }

    /// Removes the last request.
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
    fn requests_stay_in_order_whichever_is_removed() {
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
                assert_eq!(usize::from(list.len()), expected.len());
            }
            while let Some(last) = expected.pop() {
                assert_eq!(list.pop(), Some(last));
            }
            assert_eq!((list.len(), list.first, list.pop()), (0, None, None));
        }
    }
}

//! Global state of a program with one thread.

use core::cell::RefCell;
use core::ops::Deref;

/// A `RefCell` that may be a static.
pub struct Single<T>(RefCell<T>);

// SAFETY: there is no second thread: one processor runs, and interrupt entries access only
// the interrupt counters.
unsafe impl<T> Sync for Single<T> {}

impl<T> Single<T> {
    /// Wraps `value`.
    pub const fn new(value: T) -> Self {
        Self(RefCell::new(value))
    }
}

impl<T> Deref for Single<T> {
    type Target = RefCell<T>;

    fn deref(&self) -> &RefCell<T> {
        &self.0
    }
}

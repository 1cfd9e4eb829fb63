//! Global state of a program with one thread.

use core::cell::RefCell;
use core::ops::Deref;

/// A `RefCell` that may be a static.
pub struct Single<T>(RefCell<T>);

// SAFETY: one processor runs, and interrupt entries touch nothing of Rust's but the
// interrupt counters: there is no second thread.
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

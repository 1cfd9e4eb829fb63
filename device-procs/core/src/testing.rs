//! What several rooms' tests use.

/// Numbers that look random and are the same each time (xorshift64*).
pub struct Random(u64);

impl Random {
    /// A sequence of its own for each `seed`.
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }

    /// One of `all`.
    pub fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// What a step unwinds with that was to be the last.
pub struct Death;

thread_local! {
    static STEPS: std::cell::Cell<Option<u64>> = const { std::cell::Cell::new(None) };
}

/// Called at each step of what changes a ring.
pub fn stepped() {
    let left = STEPS.get();
    STEPS.set(left.map(|left| left.saturating_sub(1)));
    if left == Some(0) {
        STEPS.set(None);
        // Without a word on stderr, other than a panic.
        std::panic::resume_unwind(Box::new(Death));
    }
}

/// Runs `f`, which dies when it has taken `steps` steps; `None` if it died.
pub fn mortal<R>(steps: u64, f: impl FnOnce() -> R) -> Option<R> {
    STEPS.set(Some(steps));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
    STEPS.set(None);
    result
        .map_err(|cause| {
            if !cause.is::<Death>() {
                std::panic::resume_unwind(cause);
            }
        })
        .ok()
}

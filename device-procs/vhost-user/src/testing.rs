//! Helpers of the unit tests of several modules.

/// Pseudo-random numbers, the same in every run (xorshift64*).
pub struct Random(u64);

impl Random {
    /// Each `seed` gives another sequence.
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

/// The panic payload of [`step`].
struct SimulatedDeath;

thread_local! {
    /// How many more steps the simulated process takes.
    static STEPS: std::cell::Cell<Option<u64>> = const { std::cell::Cell::new(None) };
}

/// A step of the simulated process, which dies here if it was the last one.
pub fn step() {
    let left = STEPS.get();
    STEPS.set(left.map(|left| left.saturating_sub(1)));
    if left == Some(0) {
        STEPS.set(None);
        // Unlike panic!, this prints nothing.
        std::panic::resume_unwind(Box::new(SimulatedDeath));
    }
}

/// Runs `f` as a simulated process that dies after `steps` steps; `None` if it died.
pub fn run_until_death<R>(steps: u64, f: impl FnOnce() -> R) -> Option<R> {
    STEPS.set(Some(steps));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
    STEPS.set(None);
    result
        .map_err(|cause| {
            if !cause.is::<SimulatedDeath>() {
                std::panic::resume_unwind(cause);
            }
        })
        .ok()
}

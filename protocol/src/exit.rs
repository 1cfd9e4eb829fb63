//! Exit codes of `vcpu-runner`, which `outrigger` passes on.

/// The guest powered itself off (or wrote 0 to the exit port).
pub const POWERED_OFF: u8 = 0;
/// Anything that has no code of its own.
pub const FAILURE: u8 = 1;
/// The command line makes no sense.
pub const USAGE: u8 = 2;
/// The guest asked for a reset and `--on-reset exit` was given.
pub const GUEST_RESET: u8 = 3;
/// The guest panicked, said that it failed, or died by a triple fault.
pub const GUEST_FAILED: u8 = 4;
/// A device process was lost for good.
pub const DEVICE_LOST: u8 = 5;

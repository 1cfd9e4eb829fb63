//! Exit codes of `vcpu-runner`. `outrigger` exits with the code of its runner.

/// The guest powered the machine off, or wrote 0 to the exit port.
pub const POWERED_OFF: u8 = 0;
/// Any failure without a code of its own.
pub const FAILURE: u8 = 1;
/// The command line is not valid.
pub const USAGE: u8 = 2;
/// The guest reset the machine, and `--on-reset exit` was given.
pub const GUEST_RESET: u8 = 3;
/// The guest panicked, reported a failure, or triple-faulted.
pub const GUEST_FAILED: u8 = 4;
/// A device process was lost, and the policy given with `--on-loss` ended the machine.
pub const DEVICE_LOST: u8 = 5;

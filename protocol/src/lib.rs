//! Everything that crosses a process boundary in outrigger: the layout of shared memory,
//! the trap channel, control commands and events, and how file descriptors are passed. The
//! crate has no KVM code, no threads and no policy.

pub mod channel;
pub mod control;
pub mod device;
pub mod error_code;
pub mod exit;
pub mod memory;
pub mod trap;

pub use error_code::ErrorCode;

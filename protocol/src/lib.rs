//! What crosses a process boundary in outrigger, and nothing else: the layout
//! of shared memory, the trap channel, control messages and how file
//! descriptors travel. No KVM, no threads, no policy.

pub mod channel;
pub mod control;
pub mod device;
pub mod error_code;
pub mod exit;
pub mod memory;
pub mod trap;

pub use error_code::ErrorCode;

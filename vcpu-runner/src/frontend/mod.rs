//! The front-end half of vhost-user: one slot, and one thread, a device. vCPU
//! threads leave requests in the slot's mailbox and go on; the slot's thread
//! talks to the device's process, and every message has a deadline.

mod config_space;
pub mod session;
pub mod slot;
pub mod spec;
pub mod watchdog;

pub use slot::{Notice, Slot};
pub use spec::DeviceSpec;
pub use watchdog::Watchdog;

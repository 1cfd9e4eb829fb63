//! The front-end half of vhost-user: one slot, and one thread, a device. vCPU
//! threads leave requests in the slot's mailbox and go on; the slot's thread
//! talks to the device's process, and every message has a deadline.

//!
//! [`session`] is one connection, [`slot`] what others hold of a device and `thread`
//! what works for it; [`state`] says where it stands. `rings` is what the driver has
//! set up, which outlives every process: when one is lost (`loss`), `knock` waits for
//! another, `suit` says whether that will do, and `inflight` is what it has to do
//! again; `swap` changes one for another under the running guest.

mod config_space;
mod inflight;
mod knock;
mod loss;
pub mod on_loss;
mod rings;
pub mod session;
pub mod slot;
pub mod spec;
pub mod state;
mod suit;
mod swap;
mod thread;
pub mod watchdog;

pub use on_loss::OnLoss;
pub use slot::{Notice, Slot};
pub use spec::DeviceSpec;
pub use watchdog::Watchdog;

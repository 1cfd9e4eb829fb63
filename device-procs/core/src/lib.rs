//! What every vhost-user device process of outrigger shares: the protocol, the
//! rings, the serve loop and the command line. A device brings a [`Device`] per
//! worker thread and a [`DeviceProperties`]; everything else is here.
//!
//! Who owns what: the control thread ([`serve`]) talks to the front end and owns
//! nothing that moves data. Each worker thread owns its rings and its [`Device`]
//! under one lock, taken once per batch; taking that lock is how the control
//! thread makes a stop a barrier.

pub mod adaptive_polling;
mod buffers;
pub mod chain;
pub mod cli;
pub mod config;
pub mod control;
pub mod device;
pub mod enable;
pub mod error;
pub mod fault;
pub mod inflight;
pub mod listen;
pub mod memory;
pub mod poller;
pub mod ring;
pub mod serve;
pub mod session;
pub mod signals;
mod split;
#[cfg(test)]
mod testing;
pub mod worker;

pub use chain::DescriptorChain;
pub use config::ConfigSpace;
pub use control::Control;
pub use device::{Device, DeviceContext, DeviceProperties, QUEUE_SIZE};
pub use error::Error;
pub use memory::GuestMemory;
pub use outrigger_cli::fd;
pub use poller::Poller;
pub use ring::Ring;
pub use serve::{DeviceProgram, run, run_with};

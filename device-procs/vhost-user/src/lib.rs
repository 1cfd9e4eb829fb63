//! The vhost-user side of a device process: the protocol, guest memory, the rings, the
//! in-flight table and the worker threads. A device brings one [`Device`] per worker
//! thread and its [`DeviceProperties`]; this crate does the rest, on top of `device-core`.
//!
//! The main thread ([`program`], [`connection`], [`session`]) handles the messages of one
//! front end at a time and moves no data. Each [`worker`] thread owns its rings and its
//! [`Device`] under one lock, which it takes once per batch. The main thread takes the same
//! lock to change a ring, so a stop (GET_VRING_BASE) is a barrier: when it is answered, the
//! device touches neither the ring nor its buffers.
//!
//! The core is our own, on the request handler of crate `vhost`, because crate
//! `vhost-user-backend` 0.24 does not have what outrigger promises: it refuses
//! INFLIGHT_SHMFD, answers GET_VRING_BASE while requests are still in flight, and cannot
//! serve a second front end on the same socket.

mod buffers;
pub mod chain;
pub mod config_space;
mod connection;
pub mod device;
pub mod error;
pub mod fault;
pub mod inflight;
pub mod memory;
pub mod program;
pub mod ring;
pub mod session;
mod split_ring;
#[cfg(test)]
mod testing;
mod vhost_workarounds;
pub mod worker;
pub mod worker_clocks;

pub use buffers::Buffers;
pub use chain::DescriptorChain;
pub use config_space::ConfigSpace;
pub use device::{Device, DeviceContext, DeviceProperties, QUEUE_SIZE};
pub use error::Error;
pub use memory::GuestMemory;
pub use program::{DeviceProgram, run};
pub use ring::Ring;
pub use worker_clocks::WorkerClocks;

//! JSON lines over a unix socket: how `vcpu-runner`, `outrigger` and the device programs
//! serve their control sockets, and how their clients talk to them.
//!
//! A client sends a command, one JSON object a line, and gets one reply a command, in
//! order. A client that sends `watch` also gets events, a line each, between the replies.
//! What the objects mean is in `outrigger_protocol`.
//!
//! * [`server`] is one thread that never waits for a client: it serves the listening
//!   socket and all clients with poll(2). A command that takes time is answered later,
//!   from any thread, through its [`Responder`].
//! * [`client`] is a blocking connection with deadlines.

pub mod client;
mod connection;
pub mod server;

pub use client::ControlClient;
pub use server::{ControlServer, Responder, start};

use std::time::Duration;

/// Clients that are served at a time. One more replaces the client that has been idle
/// longest; if every client waits for a reply or watches events, it is turned away.
pub const MAX_CLIENTS: usize = 12;

/// The longest line in bytes, including its newline.
pub const MAX_LINE: usize = 64 * 1024;

/// How long a client may leave replies or events unread before it is disconnected.
pub const STALL_LIMIT: Duration = Duration::from_secs(5);

//! The vhost-user front end. Each device has a [`VhostUserDevice`], which the rest of
//! the runner holds, and a thread that runs its `device_task`. vCPU threads leave
//! requests in the device's mailbox and return at once; only the device task talks to
//! the back end, and every message has a deadline.
//!
//! | module | responsibility |
//! |---|---|
//! | [`spec`], [`on_loss`] | the options `--device` and `--on-loss` |
//! | [`device`] | the handle to a device: mailbox, published status, cancel handles |
//! | [`connected_device`] | the first connection, before the device task starts |
//! | `device_task` | connected or reconnecting, paused or not; carries out requests |
//! | `reconnect` | waits for a back end after a loss |
//! | `compat` | decides whether a back end may replace another one |
//! | `connection` | one vhost-user connection: handshake, messages, deadlines |
//! | `vrings`, `inflight` | what the driver set up; it outlives every back end |
//! | `state` | the state that `status` shows, derived from the above |
//! | [`vhost_workarounds`] | everything that crate vhost cannot do |

mod compat;
pub mod connected_device;
mod connection;
pub mod device;
mod device_task;
mod inflight;
pub mod on_loss;
mod reconnect;
pub mod spec;
mod state;
pub mod vhost_workarounds;
mod vrings;

pub use connected_device::ConnectedDevice;
pub use connection::MESSAGE_DEADLINE;
pub use device::{DeviceEvent, SwapFailure, VhostUserDevice};
pub use on_loss::OnLoss;
pub use spec::DeviceSpec;
pub use vhost_workarounds::watchdog::Watchdog;

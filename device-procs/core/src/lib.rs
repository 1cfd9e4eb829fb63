//! What every device process of outrigger does, whatever protocol it speaks: command-line
//! options, the listening socket, readiness, confinement, signals, and polling.
//!
//! `device-vhost-user` builds the vhost-user devices on this; `device-platform`, which
//! speaks the trap channel, uses it directly. A device process goes through these steps:
//!
//! 1. [`process::run`] parses the log options and prints the capabilities, or starts the log;
//! 2. [`Listener::new`] and [`ReadyNotifier::new`] open the sockets of the options, and the
//!    device opens its own files;
//! 3. [`process::confine`] isolates the process, while it has one thread;
//! 4. the threads start (with [`process::spawn_thread`]), with the signals of
//!    [`signals::block`] blocked;
//! 5. `outrigger_sandbox::seal` limits the system calls;
//! 6. [`ReadyNotifier::notify`] tells the launcher that the process serves.

pub mod adaptive_polling;
pub mod listener;
pub mod options;
pub mod poller;
pub mod process;
pub mod readiness;
pub mod signals;

pub use listener::Listener;
pub use options::CommonOptions;
pub use outrigger_cli::fd;
pub use poller::Poller;
pub use readiness::ReadyNotifier;

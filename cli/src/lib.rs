//! What all programs of outrigger have in common: how they parse their command line, log,
//! report errors, handle termination signals, create sockets, and take over file descriptors
//! that another process opened.

pub mod choices;
pub mod fd;
pub mod logging;
pub mod options;
pub mod report_error;
pub mod signals;
pub mod size;
pub mod socket;

pub use choices::{BackingPolicy, CacheMode, ImageFormat, OnReset};
pub use logging::LogFormat;
pub use options::{Usage, parse};
pub use report_error::report_error;

/// Exit code of `device-console` when the user quits the console (Ctrl-A x). The launcher
/// then ends the machine.
pub const CONSOLE_QUIT: u8 = 10;

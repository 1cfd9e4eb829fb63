//! What all programs of outrigger share at their edges: how they read their command
//! line, log, listen and end, and how they take over descriptors that somebody else opened.

pub mod fd;
pub mod logging;
pub mod options;
pub mod report_error;
pub mod signals;
pub mod size;
pub mod socket;

pub use logging::LogFormat;
pub use options::{Usage, parse};
pub use report_error::report_error;

/// Exit code of a console whose user left by its way out (Ctrl-A x), for a
/// launcher that ends the machine then.
pub const CONSOLE_QUIT: u8 = 10;

//! What all programs of outrigger share at their edges: how they log, and how
//! they take over descriptors that somebody else opened.

pub mod fd;
pub mod logging;
pub mod signals;

pub use logging::LogFormat;

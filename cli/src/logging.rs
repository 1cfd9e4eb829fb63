//! The log of a program: one line on stderr for each event.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// Format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line of text for each event
    Text,
    /// One JSON object for each event
    Json,
}

/// Starts logging. `filter` has the syntax of [`EnvFilter`].
///
/// Text is level, spans with their fields, message, and the event's fields as `name=value`.
/// JSON has the event's fields in `fields`, the innermost span in `span` and all spans in
/// `spans`, and also time and target.
///
/// # Errors
/// `filter` is not valid.
pub fn init(format: LogFormat, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|e| format!("--log-level {filter}: {e}"))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_target(false).without_time().init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

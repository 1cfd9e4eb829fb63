//! The start of a device process: capabilities, log, exit code, confinement, threads.

use std::process::ExitCode;

use anyhow::Context as _;
use outrigger_cli::logging::DEVICE_SPAN;
use outrigger_cli::options::{USAGE, Usage};
use outrigger_sandbox::{Policy, SandboxMode};

use crate::CommonOptions;

/// Runs a device program: prints `capabilities` (`--print-capabilities`), or starts the
/// log and calls `serve`. `program` is the program's name.
///
/// Returns 0 when `serve` returns, 2 when it fails with a [`Usage`] error, and 1 for any
/// other error. The error is printed as one line. The log lines of `serve`, and of threads
/// that it starts with [`spawn_thread`], carry the device's name (`--id`).
pub fn run(
    program: &'static str,
    common: &CommonOptions,
    capabilities: &serde_json::Value,
    serve: impl FnOnce() -> anyhow::Result<()>,
) -> ExitCode {
    if common.print_capabilities {
        println!("{capabilities}");
        return ExitCode::SUCCESS;
    }
    let result = outrigger_cli::logging::init(common.log_format, &common.log_level)
        .map_err(|error| Usage(error).into())
        .and_then(|()| {
            let device = common.id.as_deref().unwrap_or(program);
            tracing::error_span!(target: DEVICE_SPAN, "device", device).in_scope(serve)
        });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            outrigger_cli::report_error(program, &error);
            ExitCode::from(if error.is::<Usage>() { USAGE } else { 1 })
        }
    }
}

/// Does the part of the sandbox that must come before the first thread: user, namespaces,
/// root directory, capabilities, Landlock.
///
/// # Errors
/// The process is not isolated as well as this host allows.
pub fn confine(policy: &Policy, mode: SandboxMode) -> anyhow::Result<()> {
    let isolation = outrigger_sandbox::isolate(policy, mode)?;
    if mode == SandboxMode::Off || isolation.refused.is_some() {
        tracing::warn!("{isolation}");
    } else {
        tracing::debug!("{isolation}");
    }
    Ok(())
}

/// Starts a thread whose log lines carry the fields of the current span.
///
/// # Errors
/// No thread can be started (pthread_create(3)).
pub fn spawn_thread(name: &str, run: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let span = tracing::Span::current();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || span.in_scope(run))
        .with_context(|| format!("starting the thread {name}"))?;
    Ok(())
}

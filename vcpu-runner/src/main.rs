//! `vcpu-runner`: options, set-up, sandbox, run, exit code.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use outrigger_cli::report_error;
use outrigger_protocol::exit;
use outrigger_sandbox::SandboxMode;
use vcpu_runner::Error;
use vcpu_runner::machine::{End, Machine};
use vcpu_runner::options::Options;
use vcpu_runner::{policy, probe, signals, vcpu};

const NAME: &str = "vcpu-runner";

fn main() -> ExitCode {
    let options: Options = outrigger_cli::parse();
    if let Err(error) = options.check() {
        report_error(NAME, error);
        return ExitCode::from(exit::USAGE);
    }
    if let Err(error) = outrigger_cli::logging::init(options.log_format, &options.log_level) {
        report_error(NAME, error);
        return ExitCode::from(exit::USAGE);
    }
    if options.probe {
        return ExitCode::from(probe::run(options.format.unwrap_or_default()));
    }
    match run(&options) {
        Ok(End { code, reason }) => {
            if code == exit::POWERED_OFF {
                tracing::info!("{reason}");
            } else {
                report_error(NAME, reason);
            }
            ExitCode::from(code)
        }
        Err(error) => {
            report_error(NAME, error);
            ExitCode::from(exit::FAILURE)
        }
    }
}

fn run(options: &Options) -> anyhow::Result<End> {
    signals::block();
    signals::raise_file_limit();
    vcpu::state::install_kick_handler();
    let control = options.control.as_deref();
    let removes = may_remove(control, options.sandbox)?;
    let watch = signals::Watch::start().context("signals")?;
    let mut machine = Machine::new(options)?;
    watch.hand_over(machine.stopper());
    if let Some(path) = control {
        machine.serve_control(path, removes)?;
    }
    if options.sandbox == SandboxMode::Off {
        tracing::warn!("sandbox off: whoever breaks into this process has all its rights");
    }
    outrigger_sandbox::seal(&policy::policy(removes), options.sandbox)?;
    Ok(machine.run()?)
}

/// Sees to it that the control socket is the only file, or at least the only kind
/// of place, that this process can remove, before there are threads. False: it can
/// remove none once it is sealed, and the socket stays behind.
fn may_remove(control: Option<&Path>, sandbox: SandboxMode) -> anyhow::Result<bool> {
    match (control, sandbox) {
        (None, _) => Ok(false),
        (Some(_), SandboxMode::Off) => Ok(true),
        (Some(path), _) => {
            let (directory, _) = outrigger_cli::socket::directory(path)
                .map_err(Error::io(format!("--control {}", path.display())))?;
            Ok(outrigger_sandbox::remove_files_only_in(directory.as_fd())?)
        }
    }
}

//! `vcpu-runner`: options, set-up, sandbox, run, exit code.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use outrigger_cli::report_error;
use outrigger_protocol::exit;
use outrigger_sandbox::SandboxMode;
use vcpu_runner::Error;
use vcpu_runner::machine::{Machine, MachineExit};
use vcpu_runner::options::RunnerOptions;
use vcpu_runner::{policy, probe, signals, vcpu};

const NAME: &str = "vcpu-runner";

fn main() -> ExitCode {
    let options: RunnerOptions = outrigger_cli::parse();
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
        Ok(MachineExit { code, reason }) => {
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

fn run(options: &RunnerOptions) -> anyhow::Result<MachineExit> {
    signals::block();
    signals::raise_file_limit();
    vcpu::handle::install_kick_handler();
    let control = options.control.as_deref();
    let may_remove_socket = restrict_removal(control, options.sandbox)?;
    let signal_thread = signals::SignalThread::start().context("signals")?;
    let mut machine = Machine::new(options)?;
    signal_thread.set_stop(machine.stopper());
    if let Some(path) = control {
        machine.serve_control(path, may_remove_socket)?;
    }
    if options.sandbox == SandboxMode::Off {
        tracing::warn!("sandbox off: code that takes over this process has all its rights");
    }
    outrigger_sandbox::seal(&policy::policy(may_remove_socket), options.sandbox)?;
    Ok(machine.run()?)
}

/// Restricts the files that this process can remove to the directory of the control socket.
/// This must happen before there are threads. False: the sandbox will forbid removing any
/// file, and the socket stays when the machine ends.
fn restrict_removal(control: Option<&Path>, sandbox: SandboxMode) -> anyhow::Result<bool> {
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

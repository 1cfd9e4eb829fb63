//! `vcpu-runner`: options, set-up, sandbox, run, exit code.

use std::process::ExitCode;

use anyhow::Context;
use outrigger_protocol::exit;
use outrigger_sandbox::Mode;
use vcpu_runner::machine::{End, Machine};
use vcpu_runner::options::Options;
use vcpu_runner::{policy, signals, vcpu};

fn main() -> ExitCode {
    let options: Options = outrigger_cli::parse();
    if let Err(error) = options.check() {
        eprintln!("vcpu-runner: {error}");
        return ExitCode::from(exit::USAGE);
    }
    if let Err(error) = outrigger_cli::logging::start(options.log_format, &options.log_level) {
        eprintln!("vcpu-runner: {error}");
        return ExitCode::from(exit::USAGE);
    }
    match run(&options) {
        Ok(End { code, reason }) => {
            if code == exit::POWERED_OFF {
                tracing::info!("{reason}");
            } else {
                eprintln!("vcpu-runner: {reason}");
            }
            ExitCode::from(code)
        }
        Err(error) => {
            eprintln!("vcpu-runner: {error:#}");
            ExitCode::from(exit::FAILURE)
        }
    }
}

fn run(options: &Options) -> anyhow::Result<End> {
    signals::block();
    signals::raise_file_limit();
    vcpu::state::install_kick_handler();
    let machine = Machine::new(options)?;
    signals::start(machine.stopper()).context("signals")?;
    if options.sandbox == Mode::Off {
        tracing::warn!("sandbox off: whoever breaks into this process has all its rights");
    }
    outrigger_sandbox::seal(&policy::policy(), options.sandbox)?;
    Ok(machine.run()?)
}

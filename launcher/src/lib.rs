//! `outrigger`: runs a virtual machine as a set of processes. It starts the device processes
//! and the runner, supervises them, and ends them together.
//!
//! A shell script can do all of that, too (`examples/launch.sh`). Data flows in one direction:
//!
//! 1. The command line ([`keyval`]) or a VM file ([`vmfile`]) becomes a
//!    [`config::MachineConfig`], which [`mod@check`] checks.
//! 2. [`plan`] derives the programs and the host [`resource`]s of each.
//! 3. [`mod@run`] runs the plan: [`supervise`] starts and restarts the processes, [`control`]
//!    serves the control socket, and [`messages`] are what the two exchange. Or
//!    [`mod@script`] prints the plan as a shell script.
//!
//! [`ctl`] is the client of the control socket, [`demo`] runs a built-in machine.

mod check;
mod config;
mod control;
mod ctl;
mod demo;
mod keyval;
mod messages;
mod nearest;
mod plan;
mod resource;
mod run;
mod runtime;
mod script;
mod supervise;
mod vmfile;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use outrigger_protocol::exit;

use crate::config::MachineConfig;
use crate::plan::MachinePlan;

/// Runs virtual machines as sets of processes.
#[derive(Parser)]
#[command(name = "outrigger", version)]
pub struct LauncherOptions {
    #[command(subcommand)]
    command: LauncherCommand,
}

#[derive(Subcommand)]
enum LauncherCommand {
    /// Run the machine that the options describe
    Run {
        #[command(flatten)]
        machine: Box<MachineConfig>,
        #[command(flatten)]
        output: OutputOptions,
    },
    /// Run the machine that a VM file describes
    Up {
        /// VM file (TOML)
        file: PathBuf,
        #[command(flatten)]
        output: OutputOptions,
    },
    /// Send a command to a running machine
    Ctl(ctl::CtlOptions),
    /// Run the embedded guest, which uses a disk, a network and a console
    Demo {
        /// Do not list the processes
        #[arg(long)]
        quiet: bool,
    },
}

#[derive(Args, Clone, Copy)]
struct OutputOptions {
    /// Do not run the machine: print a shell script that does
    #[arg(long, conflicts_with = "quiet")]
    print_script: bool,
    /// Do not list the processes
    #[arg(long)]
    quiet: bool,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let options: LauncherOptions = outrigger_cli::parse();
    let result = match options.command {
        LauncherCommand::Run { machine, output } => run_or_print(*machine, output),
        LauncherCommand::Up { file, output } => {
            vmfile::load(&file).and_then(|machine| run_or_print(machine, output))
        }
        LauncherCommand::Ctl(options) => options.run(),
        LauncherCommand::Demo { quiet } => demo::run(quiet),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            outrigger_cli::report_error("outrigger", &error);
            ExitCode::from(if error.is::<outrigger_cli::Usage>() {
                exit::USAGE
            } else {
                exit::FAILURE
            })
        }
    }
}

fn run_or_print(config: MachineConfig, output: OutputOptions) -> anyhow::Result<u8> {
    config.check()?;
    let plan = MachinePlan::new(&config);
    if output.print_script {
        script::print(&config, &plan).context("standard output")?;
        return Ok(exit::POWERED_OFF);
    }
    run::run(config, plan, output.quiet)
}

//! `device-platform`: the devices of a PC that are not on PCI, in a process of its own.
//!
//! The runner forwards port and memory accesses that no PCI device claims over the trap
//! channel (`outrigger_protocol::trap`). [`isa_bus`] maps ports to [`devices`]. [`session`]
//! serves a runner; [`device_core::adaptive_polling`] tells it when to sleep. [`output`] and
//! [`input`] are the host side of the serial line. The process can be killed at any moment
//! without loss, because its [`state`] lies in the runner's [`region`].

mod devices;
mod error;
mod input;
mod isa_bus;
mod output;
mod region;
mod session;
mod state;
mod wait;

use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use device_core::process::{self, confine};
use device_core::{CommonOptions, Listener, ReadyNotifier};
use outrigger_sandbox::{BASE, LISTENER, Policy, Rule, SOCKET};

use crate::input::Input;
use crate::output::{Output, OutputTarget};
use crate::session::{SerialConsole, SessionEnd, TrapSession};
use crate::wait::WaitResult;

const NAME: &str = "device-platform";
/// Open files: standard streams, outputs, and a few for each session.
const MAX_FILES: u64 = 64;

/// Serves a virtual machine's serial port, clock, keyboard controller, power
/// registers, and debug and exit ports.
#[derive(Parser)]
#[command(name = NAME, version)]
pub struct PlatformOptions {
    #[command(flatten)]
    common: CommonOptions,

    /// Where the serial port is connected to: stdio, file=PATH (appended to), fd=N (an
    /// inherited file, open for writing), or null
    ///
    /// A terminal keeps its mode: input arrives line by line, and Ctrl-C ends this program.
    #[arg(long, value_name = "stdio|file=PATH|fd=N|null", default_value = "stdio",
          value_parser = OutputTarget::serial)]
    serial: OutputTarget,

    /// Where bytes written to ports 0xe9, 0x402 and 0xf1 go: stderr, file=PATH
    /// (appended to), fd=N (an inherited file), or null [default: where the serial
    /// port's go]
    #[arg(long, value_name = "stderr|file=PATH|fd=N|null", value_parser = OutputTarget::debug)]
    debug_console: Option<OutputTarget>,
}

/// System calls beyond the shared tables.
const SYSCALLS: &[Rule] = &[
    // For the size of the runner's region and of an output file.
    Rule::any(libc::SYS_fstat),
    Rule::any(libc::SYS_pwrite64),
];

/// Runs the program.
pub fn main() -> ExitCode {
    let options: PlatformOptions = outrigger_cli::parse();
    let capabilities = serde_json::json!({ "type": "platform" });
    process::run(NAME, &options.common, &capabilities, || serve(&options))
}

fn serve(options: &PlatformOptions) -> anyhow::Result<()> {
    let common = &options.common;
    let mut listener = Listener::new(common)?;
    let ready = ReadyNotifier::new(common)?;
    let mut console = open_console(options)?;
    let signals = wait::termination_signals().context("signalfd")?;

    let mut layers = vec![BASE, SOCKET, SYSCALLS];
    if listener.is_listening() {
        layers.push(LISTENER);
    }
    let policy = Policy {
        process: NAME,
        syscalls: layers.leak(), // lives as long as the process
        keep_network: false,
        max_files: MAX_FILES,
    };
    confine(&policy, common.sandbox)?;
    outrigger_sandbox::seal(&policy, common.sandbox)?;
    listener.keep();
    ready.notify();

    loop {
        if let Listener::Listening { socket, .. } = &listener
            && wait::for_input(socket, &signals, None)? == WaitResult::Signal
        {
            return Ok(());
        }
        let Some(stream) = listener.accept().context("accepting a runner")? else {
            return Ok(());
        };
        let end = match TrapSession::connect(stream, signals.as_fd(), &mut console) {
            Ok(mut session) => {
                let end = session.serve();
                session.finish();
                end
            }
            Err(end) => end,
        };
        match end {
            SessionEnd::Signal => return Ok(()),
            SessionEnd::Disconnected => tracing::debug!("the runner disconnected"),
            SessionEnd::Failed(error) if listener.is_listening() => {
                tracing::warn!(%error, "connection to a runner closed");
            }
            SessionEnd::Failed(error) => return Err(error.into()),
        }
    }
}

fn open_console(options: &PlatformOptions) -> anyhow::Result<SerialConsole> {
    let mut outputs = vec![Output::open("serial", &options.serial)?];
    if let Some(target) = &options.debug_console {
        let debug = Output::open("debug-console", target)?;
        if debug.is_same_file(&outputs[0]) {
            anyhow::bail!("--debug-console names the file of --serial: leave it out to share");
        }
        outputs.push(debug);
    }
    let input = match options.serial {
        // A closed standard input is no error: there is just nothing to read.
        OutputTarget::Stdio => Input::stdin().unwrap_or_else(|_| Input::none()),
        _ => Input::none(),
    };
    Ok(SerialConsole { outputs, input })
}

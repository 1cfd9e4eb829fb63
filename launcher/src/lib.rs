//! `outrigger`: starts the device processes of a virtual machine and then its
//! runner, and sees to it that all of them end together.
//!
//! Everything it does can be done by a shell script (`examples/launch.sh`); data
//! flows one way: options become a [`config::Machine`], that becomes a
//! [`plan::Plan`] of programs and sockets, and [`supervise`] runs it.

mod config;
mod demo;
mod keyval;
mod plan;
mod process;
mod supervise;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use outrigger_protocol::exit;

use crate::config::{Console, Disk, Machine, Net, Serial};
use crate::plan::Plan;

/// Runs virtual machines as sets of processes.
#[derive(Parser)]
#[command(name = "outrigger", version)]
pub struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the machine that the options describe
    Run(Box<Run>),
    /// Run the machine that a file describes
    Up {
        /// VM file (TOML)
        file: PathBuf,
        #[command(flatten)]
        view: View,
    },
    /// Run the embedded guest: it uses a disk, a network and a console
    Demo {
        #[command(flatten)]
        view: View,
    },
}

/// What to show.
#[derive(Args, Clone, Copy)]
struct View {
    /// Do not show the processes
    #[arg(long)]
    quiet: bool,
}

#[derive(Args)]
struct Run {
    /// Kernel to boot: ELF or bzImage
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,

    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// Kernel command line
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,

    /// Guest RAM
    #[arg(long, value_name = "SIZE[,hugepages=2M|1G|thp]")]
    memory: Option<String>,

    /// Number of vCPUs
    #[arg(long, value_name = "N")]
    cpus: Option<u8>,

    /// A disk; may be given several times
    #[arg(long = "disk", value_name = "path=FILE[,readonly=on][,queues=N][,serial=TEXT]",
          value_parser = keyval::parse::<Disk>)]
    disks: Vec<Disk>,

    /// A network; may be given several times
    #[arg(long = "net", value_name = "isolated[,address=A/N]|tap,name=T[,mac=M][,mtu=N]",
          value_parser = keyval::parse::<Net>)]
    nets: Vec<Net>,

    /// A virtio console; may be given several times
    #[arg(long = "console", value_name = "stdio|pty[,path=LINK]|unix,path=P|file,path=P",
          value_parser = keyval::parse::<Console>)]
    consoles: Vec<Console>,

    /// Where the serial port goes
    #[arg(long, value_name = "stdio|null|file,path=P", value_parser = keyval::parse::<Serial>)]
    serial: Option<Serial>,

    /// Unix socket for control commands
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// What a guest's reset does
    #[arg(long, value_name = "reset|exit")]
    on_reset: Option<String>,

    /// Confine the processes
    #[arg(long, value_name = "on|log|off")]
    sandbox: Option<String>,

    #[command(flatten)]
    view: View,
}

impl Run {
    fn into_machine(self) -> (Machine, View) {
        let machine = Machine {
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            memory: self.memory,
            cpus: self.cpus,
            disk: self.disks,
            net: self.nets,
            console: self.consoles,
            serial: self.serial,
            control: self.control,
            on_reset: self.on_reset,
            sandbox: self.sandbox,
        };
        (machine, self.view)
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let options: Options = outrigger_cli::parse();
    let result = match options.command {
        Command::Run(run) => {
            let (machine, view) = run.into_machine();
            run_machine(&machine, view)
        }
        Command::Up { file, view } => {
            config::load(&file).and_then(|machine| run_machine(&machine, view))
        }
        Command::Demo { view } => demo::run(view.quiet),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("outrigger: {error:#}");
            ExitCode::from(if error.is::<config::Invalid>() {
                exit::USAGE
            } else {
                exit::FAILURE
            })
        }
    }
}

fn run_machine(machine: &Machine, view: View) -> anyhow::Result<u8> {
    machine.check()?;
    let plan = Plan::new(machine).context("planning the processes")?;
    supervise::run(plan, view.quiet)
}

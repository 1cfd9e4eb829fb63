//! `outrigger`: starts the device processes of a virtual machine and then its
//! runner, and sees to it that all of them end together.
//!
//! Everything it does can be done by a shell script (`examples/launch.sh`); data
//! flows one way: options ([`keyval`]) or a file ([`vmfile`]) become a
//! [`config::Machine`], that is checked ([`mod@check`]) and becomes a [`plan::Plan`]
//! of programs and the [`resource`]s that they use, and [`supervise`] runs it, or
//! [`mod@script`] writes it down. [`control`] serves those who want something of a
//! machine that runs, and [`ctl`] is the one who asks.

mod check;
mod config;
mod control;
mod ctl;
mod demo;
mod keyval;
mod nearest;
mod plan;
mod resource;
mod runtime;
mod script;
mod supervise;
mod vmfile;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use outrigger_protocol::exit;

use crate::config::{Console, DebugConsole, Disk, Machine, Net, OnReset, Restart, Sandbox, Serial};
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
        deed: Deed,
    },
    /// Ask something of a machine that runs
    Ctl(ctl::Ctl),
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

/// What to do with a machine.
#[derive(Args, Clone, Copy)]
struct Deed {
    /// Do not run it: print a shell script that does
    #[arg(long, conflicts_with = "quiet")]
    print_script: bool,
    #[command(flatten)]
    view: View,
}

#[derive(Args)]
struct Run {
    /// Kernel to boot: ELF or bzImage
    #[arg(long, value_name = "FILE", required_unless_present = "loads")]
    kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// Kernel command line
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,

    /// In place of a kernel: a file to copy to an address of guest memory as it
    /// is; may be given several times
    #[arg(long = "load", value_name = "FILE@ADDR", conflicts_with = "kernel")]
    loads: Vec<String>,

    /// How to start what was loaded
    #[arg(long, value_name = "real|protected|long[=ADDR]", requires = "loads")]
    entry: Option<String>,

    /// Print each vCPU's registers before the run
    #[arg(long)]
    show_regs: bool,

    /// Guest RAM
    #[arg(long, value_name = "SIZE[,hugepages=2M|1G|thp]")]
    memory: Option<String>,

    /// Number of vCPUs
    #[arg(long, value_name = "N")]
    cpus: Option<u8>,

    /// A disk; may be given several times
    ///
    /// Keys besides path: readonly=on, lock=off, format=raw|qcow2|qcow,
    /// backing=allow|deny, cache=writeback|none|unsafe, queues=N, poll-us=N,
    /// block-size=512|4096, serial=TEXT, as the options of device-disk
    #[arg(long = "disk", value_name = "path=FILE[,format=F][,KEY=VALUE...]",
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

    /// Where bytes written to the debug ports go [default: where the serial port's go]
    #[arg(long, value_name = "stderr|null|file,path=P",
          value_parser = keyval::parse::<DebugConsole>)]
    debug_console: Option<DebugConsole>,

    /// Unix socket for control commands, which `outrigger ctl` sends
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// What a guest's reset does
    #[arg(long, value_enum, value_name = "reset|exit")]
    on_reset: Option<OnReset>,

    /// When a device process that has ended is started again [default: on-failure]
    #[arg(long, value_enum, value_name = "always|on-failure|never")]
    restart: Option<Restart>,

    /// What happens when a device is lost: its successor is waited for, or, after
    /// so many seconds, the guest's driver is told or the machine ends with code 5
    /// [default: wait]
    #[arg(long, value_name = "wait|error[:SECONDS]|stop[:SECONDS]")]
    on_loss: Option<String>,

    /// Confine the processes
    #[arg(long, value_enum, value_name = "on|log|off")]
    sandbox: Option<Sandbox>,

    #[command(flatten)]
    deed: Deed,
}

impl Run {
    fn into_machine(self) -> (Machine, Deed) {
        let machine = Machine {
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            load: self.loads,
            entry: self.entry,
            show_regs: self.show_regs,
            memory: self.memory,
            cpus: self.cpus,
            disk: self.disks,
            net: self.nets,
            console: self.consoles,
            serial: self.serial,
            debug_console: self.debug_console,
            control: self.control,
            on_reset: self.on_reset,
            restart: self.restart,
            on_loss: self.on_loss,
            sandbox: self.sandbox,
        };
        (machine, self.deed)
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let options: Options = outrigger_cli::parse();
    let result = match options.command {
        Command::Run(run) => {
            let (machine, deed) = run.into_machine();
            run_machine(machine, deed)
        }
        Command::Up { file, deed } => {
            vmfile::load(&file).and_then(|machine| run_machine(machine, deed))
        }
        Command::Ctl(ctl) => ctl.run(),
        Command::Demo { view } => demo::run(view.quiet),
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

fn run_machine(machine: Machine, deed: Deed) -> anyhow::Result<u8> {
    machine.check()?;
    let plan = Plan::new(&machine);
    if deed.print_script {
        script::print(&machine, &plan).context("standard output")?;
        return Ok(exit::POWERED_OFF);
    }
    supervise::run(machine, plan, deed.view.quiet)
}

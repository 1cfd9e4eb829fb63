//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use outrigger_cli::choices::OnReset;
use outrigger_cli::{LogFormat, socket};
use outrigger_sandbox::SandboxMode;

use crate::Error;
use crate::boot::BootSource;
use crate::boot::flat::{EntrySpec, FlatImages, LoadSpec};
use crate::boot::kernel::KernelBoot;
use crate::endpoint::{self, Endpoint};
use crate::frontend::{DeviceSpec, OnLoss};
use crate::pci::bus::MAX_DEVICES;
use crate::vm::memory::MemorySpec;

/// Runs the vCPUs of a virtual machine whose devices are other processes.
#[derive(Parser, Clone, Debug)]
#[command(name = "vcpu-runner", version)]
pub struct RunnerOptions {
    /// Kernel to boot: ELF (PVH or 64-bit entry) or bzImage
    #[arg(long, value_name = "FILE", required_unless_present_any = ["loads", "probe"])]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(long, value_name = "FILE", conflicts_with = "loads")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        conflicts_with = "loads"
    )]
    pub cmdline: String,

    /// File to copy to an address of guest memory, instead of a kernel; may be given
    /// several times
    #[arg(long = "load", value_name = "FILE@ADDR", conflicts_with = "kernel")]
    pub loads: Vec<LoadSpec>,

    /// Mode to start in and address of the first instruction: real mode at 0xffff0, 32-bit
    /// protected mode or 64-bit long mode at 0x100000, or at ADDR [default: real]
    #[arg(
        long,
        value_name = "real|protected|long[=ADDR]",
        requires = "loads",
        conflicts_with = "kernel"
    )]
    pub entry: Option<EntrySpec>,

    /// Print the registers of each vCPU before it runs, as for a vCPU that cannot go on
    #[arg(long)]
    pub show_regs: bool,

    /// Report what this host offers; exit code 1 if guests cannot run here
    #[arg(long, conflicts_with_all = [
        "kernel", "initrd", "cmdline", "loads", "entry", "show_regs", "memory", "cpus",
        "devices", "platform", "control", "events", "on_reset", "sandbox",
    ])]
    pub probe: bool,

    /// Format of the report of --probe [default: text]
    #[arg(long, value_enum)]
    pub format: Option<ProbeFormat>,

    /// Guest RAM
    #[arg(
        long,
        value_name = "SIZE[,hugepages=2M|1G|thp]",
        default_value = "512M"
    )]
    pub memory: MemorySpec,

    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(1..=64))]
    pub cpus: u8,

    /// A vhost-user device; may be given up to 32 times
    #[arg(
        long = "device",
        value_name = "ID,type=T,socket=PATH|fd=N[,queues=N][,queue-size=N]"
    )]
    pub devices: Vec<DeviceSpec>,

    /// Process that emulates the port and memory accesses that no PCI device handles
    #[arg(long, value_name = "socket=PATH|fd=N", value_parser = endpoint::parse)]
    pub platform: Option<Endpoint>,

    /// Unix socket to create for control commands
    #[arg(long, value_name = "PATH", value_parser = socket::path_parser())]
    pub control: Option<PathBuf>,

    /// Where to write events: an inherited descriptor or a file
    #[arg(long, value_name = "FD|PATH")]
    pub events: Option<String>,

    /// What happens when the process of a device is lost: wait for another one without a
    /// limit; or, if none has come in time, tell the guest that the device needs a reset
    /// (error), or end the machine with code 5 (stop) [default: wait; stop for a device
    /// given by fd=]
    #[arg(long, value_name = "wait|error[:SECONDS]|stop[:SECONDS]")]
    pub on_loss: Option<OnLoss>,

    /// What happens when the guest resets the machine
    #[arg(long, value_enum, default_value_t = OnReset::Reset)]
    pub on_reset: OnReset,

    /// Confine the process once it is set up
    #[arg(long, value_name = "on|log|off", default_value_t = SandboxMode::Enforce)]
    pub sandbox: SandboxMode,

    /// Format of the log on stderr
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What to log: a level, or a filter such as `vcpu_runner=debug`
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log_level: String,
}

/// Format of the report of `--probe`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ProbeFormat {
    /// Lines of text
    #[default]
    Text,
    /// One JSON object
    Json,
}

impl RunnerOptions {
    /// Checks for options that contradict each other, which the parser does not.
    ///
    /// # Errors
    /// One line that names them.
    pub fn check(&self) -> Result<(), String> {
        if self.format.is_some() && !self.probe {
            return Err("--format needs --probe".into());
        }
        if self.devices.len() > MAX_DEVICES {
            return Err(format!(
                "{} --device options: the PCI bus has room for {MAX_DEVICES}",
                self.devices.len()
            ));
        }
        for (index, device) in self.devices.iter().enumerate() {
            if self.devices[..index].iter().any(|d| d.id == device.id) {
                return Err(format!("two devices are named {}", device.id));
            }
            let endpoint = &device.endpoint;
            if self.devices[..index]
                .iter()
                .any(|d| d.endpoint == *endpoint)
                || self.platform.as_ref() == Some(endpoint)
            {
                return Err(format!(
                    "device {}: another option uses the same socket",
                    device.id
                ));
            }
        }
        Ok(())
    }

    /// Opens the files that the guest boots from.
    ///
    /// # Errors
    /// Names the file that is missing, empty or not a regular file; or says that the command
    /// line is too long.
    pub fn boot_source(&self) -> Result<BootSource, Error> {
        Ok(match &self.kernel {
            Some(kernel) => {
                let initrd = self.initrd.as_deref();
                BootSource::Kernel(KernelBoot::open(kernel, initrd, &self.cmdline)?)
            }
            None => {
                let entry = self.entry.unwrap_or_default();
                BootSource::Flat(FlatImages::open(&self.loads, entry)?)
            }
        })
    }
}

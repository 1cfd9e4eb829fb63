//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use outrigger_cli::LogFormat;
use outrigger_sandbox::Mode;

use crate::frontend::DeviceSpec;
use crate::frontend::spec::Endpoint;
use crate::pci::bus::MAX_DEVICES;
use crate::trap::parse_endpoint;
use crate::vm::memory::MemorySpec;

/// Runs the vCPUs of a virtual machine whose devices are other processes.
#[derive(Parser, Clone, Debug)]
#[command(name = "vcpu-runner", version)]
pub struct Options {
    /// Kernel to boot: ELF (PVH or 64-bit entry) or bzImage
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,

    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub cmdline: String,

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

    /// Process that answers port and memory accesses which nobody claims
    #[arg(long, value_name = "socket=PATH|fd=N", value_parser = parse_endpoint)]
    pub platform: Option<Endpoint>,

    /// Unix socket to create for control commands
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Where to report events: an inherited descriptor or a file
    #[arg(long, value_name = "FD|PATH")]
    pub events: Option<String>,

    /// What a guest's reset does
    #[arg(long, value_enum, default_value_t = OnReset::Reset)]
    pub on_reset: OnReset,

    /// Confine the process once it is set up
    #[arg(long, value_name = "on|log|off", default_value_t = Mode::Enforce)]
    pub sandbox: Mode,

    /// Form of the log on stderr
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What to log: a level, or a filter such as `vcpu_runner=debug`
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log_level: String,
}

/// What a guest's reset does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnReset {
    /// The machine starts again
    Reset,
    /// The runner exits with code 3
    Exit,
}

impl Options {
    /// What the parser cannot see: options that contradict each other.
    ///
    /// # Errors
    /// One line that names them.
    pub fn check(&self) -> Result<(), String> {
        if self.devices.len() > MAX_DEVICES {
            return Err(format!(
                "{} devices, but there is room for {MAX_DEVICES}",
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
                return Err(format!("device {}: its socket is used twice", device.id));
            }
        }
        Ok(())
    }
}

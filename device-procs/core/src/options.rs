//! The options that all device programs share: QEMU's "backend program conventions"
//! (vhost-user specification), and what a launcher needs.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::Args;
use outrigger_cli::{LogFormat, socket};
use outrigger_sandbox::SandboxMode;

/// Options of every device program.
#[derive(Args, Clone, Debug)]
pub struct CommonOptions {
    /// Unix socket to create and listen on
    #[arg(long, value_name = "PATH", conflicts_with = "fd",
          value_parser = socket::path_parser())]
    pub socket_path: Option<PathBuf>,

    /// Inherited socket: a listening one, or one that is already connected
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    pub fd: Option<RawFd>,

    /// Print what this program can do as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,

    /// Name of the device in log lines [default: the program's name]
    #[arg(long, value_name = "NAME")]
    pub id: Option<String>,

    /// Confine the process once it holds its files
    #[arg(long, value_name = "on|log|off", default_value_t = SandboxMode::Enforce)]
    pub sandbox: SandboxMode,

    /// Write a line to this inherited descriptor when ready to serve
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    pub ready_fd: Option<RawFd>,

    /// Form of the log on stderr
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What to log: a level, or a filter such as `info,device_core=debug`
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log_level: String,
}

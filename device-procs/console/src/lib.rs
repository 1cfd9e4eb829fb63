//! `device-console`: a virtio-console device process.
//!
//! [`console`] is the device with its two queues. It is connected to a [`backend`]: the
//! process's own [`stdio`], a [`pty`], a [`unix`] socket or a [`mod@file`], which all use a
//! non-blocking [`stream`]. [`backlog`] keeps output while there is no reader, and
//! [`escape`] finds Ctrl-A x in what the user types.

mod backend;
mod backlog;
mod console;
mod escape;
mod file;
mod pty;
mod stdio;
mod stream;
mod unix;

use std::fmt::Display;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgGroup, Parser};
use device_core::CommonOptions;
use device_core::signals::{self, Restore};
use device_vhost_user::{ConfigSpace, DeviceProgram, DeviceProperties, QUEUE_SIZE};
use outrigger_cli::socket::{self, BoundSocket};
use outrigger_sandbox::{Check, Rule};

use crate::backend::ConsoleBackend;
use crate::backlog::Backlog;
use crate::console::VirtioConsole;

/// VIRTIO_CONSOLE_F_SIZE (virtio 1.2 section 5.3.3).
const F_SIZE: u64 = 1 << 0;

/// Serves a console to a virtual machine over vhost-user.
#[derive(Parser)]
#[command(name = "device-console", version,
          group(ArgGroup::new("connection")
              .args(["stdio", "pty", "pty_fd", "unix", "unix_fd", "file", "file_fd"])))]
pub struct ConsoleOptions {
    #[command(flatten)]
    common: CommonOptions,

    /// Connect it to standard input and output. A terminal is in raw mode while a driver
    /// uses the console; Ctrl-A x ends this program
    #[arg(long, required_unless_present_any = ["connection", "print_capabilities"])]
    stdio: bool,

    /// Connect it to a new pseudo-terminal, whose path is logged
    #[arg(long)]
    pty: bool,

    /// Inherited master of an unlocked pseudo-terminal
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    pty_fd: Option<RawFd>,

    /// Symbolic link to make to the pseudo-terminal; an existing link is replaced
    #[arg(long, value_name = "PATH", conflicts_with_all = ["stdio", "unix", "unix_fd", "file", "file_fd"])]
    pty_link: Option<PathBuf>,

    /// Unix socket to listen on for one client at a time
    #[arg(long, value_name = "PATH", value_parser = socket::path_parser())]
    unix: Option<PathBuf>,

    /// Inherited listening unix socket
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    unix_fd: Option<RawFd>,

    /// File to append output to; there is no input
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,

    /// Inherited file, open for writing
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    file_fd: Option<RawFd>,

    /// Inherited file, empty or from a previous process, that keeps output while there is
    /// no reader; without it that output is lost with the process
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    backlog_fd: Option<RawFd>,
}

/// System calls of a terminal: reading its size, and setting its mode.
const TERMINAL: &[Rule] = &[Rule::when(
    libc::SYS_ioctl,
    &[Check::OneOf(
        1,
        &[
            libc::TIOCGWINSZ as u32,
            libc::TCSETS as u32,
            libc::TCSETS2 as u32,
        ],
    )],
)];

/// Runs the program.
pub fn main() -> ExitCode {
    let options: ConsoleOptions = outrigger_cli::parse();
    let capabilities = serde_json::json!({ "type": "console", "features": [] });
    device_vhost_user::run("device-console", &options.common, &capabilities, || {
        build(&options)
    })
}

/// The host side of a console, and what the program needs for it.
struct OpenBackend {
    backend: Box<dyn ConsoleBackend>,
    syscalls: &'static [Rule],
    restore: Option<Restore>,
    bound: Option<BoundSocket>,
}

impl OpenBackend {
    fn new(backend: impl ConsoleBackend + 'static, syscalls: &'static [Rule]) -> Self {
        OpenBackend {
            backend: Box::new(backend),
            syscalls,
            restore: None,
            bound: None,
        }
    }
}

/// Prefixes an error with the option that caused it.
fn of(option: impl Display) -> impl FnOnce(std::io::Error) -> anyhow::Error {
    move |error| anyhow::anyhow!("{option}: {error}")
}

fn open_backend(options: &ConsoleOptions) -> anyhow::Result<OpenBackend> {
    let named = |option: &str, path: &Path| of(format!("{option} {}", path.display()));
    if let Some(path) = &options.unix {
        let (unix, bound) = unix::Unix::bind(path).map_err(named("--unix", path))?;
        return Ok(OpenBackend {
            bound: Some(bound),
            ..OpenBackend::new(unix, outrigger_sandbox::LISTENER)
        });
    }
    if let Some(fd) = options.unix_fd {
        let unix = unix::Unix::adopt(fd).map_err(of(format!("--unix-fd {fd}")))?;
        return Ok(OpenBackend::new(unix, outrigger_sandbox::LISTENER));
    }
    if let Some(path) = &options.file {
        let file = file::File::open(path).map_err(named("--file", path))?;
        return Ok(OpenBackend::new(file, &[]));
    }
    if let Some(fd) = options.file_fd {
        let file = file::File::adopt(fd).map_err(of(format!("--file-fd {fd}")))?;
        return Ok(OpenBackend::new(file, &[]));
    }
    let pty = match options.pty_fd {
        Some(fd) => Some(pty::Pty::adopt(fd).map_err(of(format!("--pty-fd {fd}")))?),
        None if options.pty => Some(pty::Pty::open().map_err(of("--pty"))?),
        None => None,
    };
    if let Some(pty) = pty {
        if let Some(link) = &options.pty_link {
            pty.link(link).map_err(named("--pty-link", link))?;
        }
        tracing::info!("pseudo-terminal {}", pty.path().display());
        return Ok(OpenBackend::new(pty, TERMINAL));
    }
    let stdio = stdio::Stdio::open()?;
    let restore = stdio.mode().map(|mode| {
        restore_on_panic();
        Box::new(move || mode.restore()) as Restore
    });
    Ok(OpenBackend {
        restore,
        ..OpenBackend::new(stdio, TERMINAL)
    })
}

/// Restores the terminal before a panic prints its message and ends the process.
fn restore_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        signals::restore();
        print(panic);
    }));
}

fn build(options: &ConsoleOptions) -> anyhow::Result<DeviceProgram> {
    let backlog = match options.backlog_fd {
        Some(fd) => Backlog::adopt(fd).map_err(of(format!("--backlog-fd {fd}")))?,
        None => Backlog::new().map_err(of("memory for the output backlog"))?,
    };
    let OpenBackend {
        backend,
        syscalls,
        restore,
        bound,
    } = open_backend(options)?;
    let size = backend.size();
    let config = ConfigSpace::new(console::config_space(size.unwrap_or_default()));
    let properties = DeviceProperties {
        name: "device-console",
        features: if size.is_some() { F_SIZE } else { 0 },
        queues: vec![0, 0],
        queue_size: QUEUE_SIZE,
        config: config.clone(),
        inflight: false,
        poll_time: std::time::Duration::ZERO,
    };
    let device = VirtioConsole::new(backend, config, backlog);
    Ok(DeviceProgram {
        syscalls: vec![syscalls],
        restore,
        bound: bound.into_iter().collect(),
        ..DeviceProgram::new(properties, vec![Box::new(device)])
    })
}

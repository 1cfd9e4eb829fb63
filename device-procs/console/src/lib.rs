//! `device-console`: a virtio-console device process.
//!
//! [`console`] is the device and its two queues. What it is connected to is a
//! [`backend`]: the process's own [`stdio`], a [`pty`], a [`unix`] socket or a
//! [`mod@file`]; all of them work on a [`stream`] that never waits. [`backlog`] keeps
//! output for a reader to come, [`escape`] finds the way out in what is typed.

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
use device_core::signals::{self, Restore};
use device_core::{ConfigSpace, DeviceProgram, DeviceProperties, QUEUE_SIZE, cli::CommonOptions};
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

    /// Connect it to standard input and output; a terminal is the guest's while its
    /// driver is there, and Ctrl-A x ends this program
    #[arg(long, required_unless_present_any = ["connection", "print_capabilities"])]
    stdio: bool,

    /// Connect it to a new pseudo-terminal, whose path is logged
    #[arg(long)]
    pty: bool,

    /// Inherited master of a pseudo-terminal, unlocked
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    pty_fd: Option<RawFd>,

    /// Symbolic link to the pseudo-terminal; replaced if it is there
    #[arg(long, value_name = "PATH", conflicts_with_all = ["stdio", "unix", "unix_fd", "file", "file_fd"])]
    pty_link: Option<PathBuf>,

    /// Unix socket to listen on for one client at a time
    #[arg(long, value_name = "PATH", value_parser = socket::path_parser())]
    unix: Option<PathBuf>,

    /// Inherited unix socket that listens
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    unix_fd: Option<RawFd>,

    /// File to append output to; there is no input
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,

    /// Inherited file, open for writing
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    file_fd: Option<RawFd>,

    /// Inherited file, empty or left by a process before, in which output that nobody
    /// reads is kept; without, it goes with the process
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    backlog_fd: Option<RawFd>,
}

/// The size of a terminal, and its mode.
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
    device_core::run("device-console", &options.common, &capabilities, || {
        build(&options)
    })
}

/// What a console is connected to, and what goes with it.
struct OpenBackend {
    backend: Box<dyn ConsoleBackend>,
    syscalls: &'static [Rule],
    restore: Option<Restore>,
    unserved: Option<BoundSocket>,
}

impl OpenBackend {
    fn new(backend: impl ConsoleBackend + 'static, syscalls: &'static [Rule]) -> Self {
        OpenBackend {
            backend: Box::new(backend),
            syscalls,
            restore: None,
            unserved: None,
        }
    }
}

/// Puts the option that it is about before an error.
fn of(option: impl Display) -> impl FnOnce(std::io::Error) -> anyhow::Error {
    move |error| anyhow::anyhow!("{option}: {error}")
}

fn connect(options: &ConsoleOptions) -> anyhow::Result<OpenBackend> {
    let named = |option: &str, path: &Path| of(format!("{option} {}", path.display()));
    if let Some(path) = &options.unix {
        let (unix, unserved) = unix::Unix::bind(path).map_err(named("--unix", path))?;
        return Ok(OpenBackend {
            unserved: Some(unserved),
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

/// A panic ends the process without further ado; its message should find the
/// terminal as it was.
fn restore_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        signals::finish();
        print(panic);
    }));
}

fn build(options: &ConsoleOptions) -> anyhow::Result<DeviceProgram> {
    let backlog = match options.backlog_fd {
        Some(fd) => Backlog::adopt(fd).map_err(of(format!("--backlog-fd {fd}")))?,
        None => Backlog::new().map_err(of("memory for output that nobody reads"))?,
    };
    let OpenBackend {
        backend,
        syscalls,
        restore,
        unserved,
    } = connect(options)?;
    let size = backend.size();
    let config = ConfigSpace::new(console::config_space(size.unwrap_or_default()));
    Ok(DeviceProgram {
        properties: DeviceProperties {
            name: "device-console",
            features: if size.is_some() { F_SIZE } else { 0 },
            queues: vec![0, 0],
            queue_size: QUEUE_SIZE,
            config: config.clone(),
            inflight: false,
            poll: std::time::Duration::ZERO,
        },
        workers: vec![Box::new(VirtioConsole::new(backend, config, backlog))],
        syscalls,
        keep_network: false,
        restore,
        unserved,
        control: None,
    })
}

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

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgGroup, Parser};
use device_core::signals::{self, Restore};
use device_core::{ConfigSpace, Description, Program, QUEUE_SIZE, cli::Common};
use outrigger_cli::socket::{self, Bound};
use outrigger_sandbox::{Check, Rule};

use crate::backend::Backend;
use crate::console::Console;

/// VIRTIO_CONSOLE_F_SIZE (virtio 1.2 section 5.3.3).
const F_SIZE: u64 = 1 << 0;

/// Serves a console to a virtual machine over vhost-user.
#[derive(Parser)]
#[command(name = "device-console", version,
          group(ArgGroup::new("connection").args(["stdio", "pty", "unix", "file"])))]
pub struct Options {
    #[command(flatten)]
    common: Common,

    /// Connect it to standard input and output; a terminal is the guest's while its
    /// driver is there, and Ctrl-A x ends this program
    #[arg(long, required_unless_present_any = ["pty", "unix", "file", "print_capabilities"])]
    stdio: bool,

    /// Connect it to a new pseudo-terminal, whose path is logged
    #[arg(long)]
    pty: bool,

    /// Symbolic link to the pseudo-terminal; replaced if it is there
    #[arg(long, value_name = "PATH", conflicts_with_all = ["stdio", "unix", "file"])]
    pty_link: Option<PathBuf>,

    /// Unix socket to listen on for one client at a time
    #[arg(long, value_name = "PATH", value_parser = socket::path_parser())]
    unix: Option<PathBuf>,

    /// File to append output to; there is no input
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
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
    let options: Options = outrigger_cli::parse();
    let capabilities = serde_json::json!({ "type": "console", "features": [] });
    device_core::run("device-console", &options.common, &capabilities, || {
        build(&options)
    })
}

/// What a console is connected to, and what goes with it.
struct Connection {
    backend: Box<dyn Backend>,
    syscalls: &'static [Rule],
    restore: Option<Restore>,
    unserved: Option<Bound>,
}

fn connect(options: &Options) -> anyhow::Result<Connection> {
    let named = |option: &'static str, path: &PathBuf| {
        let path = path.display().to_string();
        move |error: std::io::Error| anyhow::anyhow!("{option} {path}: {error}")
    };
    if let Some(path) = &options.unix {
        let (unix, unserved) = unix::Unix::bind(path).map_err(named("--unix", path))?;
        return Ok(Connection {
            backend: Box::new(unix),
            syscalls: outrigger_sandbox::LISTENER,
            restore: None,
            unserved: Some(unserved),
        });
    }
    if let Some(path) = &options.file {
        return Ok(Connection {
            backend: Box::new(file::File::open(path).map_err(named("--file", path))?),
            syscalls: &[],
            restore: None,
            unserved: None,
        });
    }
    if options.pty {
        let pty = pty::Pty::open().map_err(|e| anyhow::anyhow!("--pty: {e}"))?;
        if let Some(link) = &options.pty_link {
            pty.link(link).map_err(named("--pty-link", link))?;
        }
        tracing::info!("pseudo-terminal {}", pty.path().display());
        return Ok(Connection {
            backend: Box::new(pty),
            syscalls: TERMINAL,
            restore: None,
            unserved: None,
        });
    }
    let stdio = stdio::Stdio::open()?;
    let restore = stdio.mode().map(|mode| {
        restore_on_panic();
        Box::new(move || mode.restore()) as Restore
    });
    Ok(Connection {
        backend: Box::new(stdio),
        syscalls: TERMINAL,
        restore,
        unserved: None,
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

fn build(options: &Options) -> anyhow::Result<Program> {
    let Connection {
        backend,
        syscalls,
        restore,
        unserved,
    } = connect(options)?;
    let size = backend.size();
    let config = ConfigSpace::new(console::config_space(size.unwrap_or_default()));
    Ok(Program {
        description: Description {
            name: "device-console",
            features: if size.is_some() { F_SIZE } else { 0 },
            queues: vec![0, 0],
            queue_size: QUEUE_SIZE,
            config: config.clone(),
            inflight: false,
        },
        workers: vec![Box::new(Console::new(backend, config))],
        syscalls,
        keep_network: false,
        restore,
        unserved,
    })
}

//! `device-disk`: a vhost-user-blk device process.
//!
//! A request goes through three rooms: [`request`] understands and checks what
//! the guest asks, [`image`] says where in the file that lies, [`transfer`] moves
//! the bytes between the file and guest memory. [`config`] is what the driver
//! reads about the disk, [`disk`] ties it to a queue, [`lock`] keeps other programs
//! from the image.

mod config;
mod disk;
mod image;
mod lock;
mod request;
mod transfer;

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand, ValueEnum};
use device_core::{ConfigSpace, Description, Device, Program, QUEUE_SIZE, cli::Common};
use outrigger_sandbox::{Check, Rule};

use crate::disk::{Disk, Drive};
use crate::image::{Backing, Format, Origin};

/// Serves a disk image or block device to a virtual machine over vhost-user.
#[derive(Parser)]
#[command(
    name = "device-disk",
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true
)]
pub struct Options {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    common: Common,

    /// Image file or block device
    #[arg(
        long,
        value_name = "PATH",
        conflicts_with = "blk_fd",
        required_unless_present_any = ["blk_fd", "print_capabilities"]
    )]
    blk_file: Option<PathBuf>,

    /// Inherited image or block device, open for what is to be done with it; processes
    /// that inherit the same one do not lock each other out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    blk_fd: Option<RawFd>,

    /// Format of the image. A file that begins like a qcow or qcow2 image must be given
    /// one; any other is raw
    #[arg(long, value_enum, value_name = "raw|qcow2|qcow")]
    format: Option<Format>,

    /// Whether an image may lie on other files, which it names: they are read
    #[arg(long, value_enum, value_name = "deny|allow", default_value_t = Backing::Deny)]
    backing: Backing,

    /// Refuse all writes
    #[arg(long)]
    read_only: bool,

    /// Lock the image as QEMU does, so that no two programs write to it at a time
    #[arg(long, value_enum, value_name = "on|off", default_value_t = Lock::On)]
    lock: Lock,

    /// Number of queues, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,

    /// Serial number that the guest sees, up to 20 bytes
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = serial)]
    serial: String,
}

/// What else the program does.
#[derive(Subcommand)]
enum Command {
    /// Makes an image
    Create(image::create::Options),
}

/// Whether the image is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Lock {
    /// As QEMU does
    On,
    /// Whoever gives it sees to it that nobody else writes
    Off,
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() > request::ID_SIZE {
        return Err(format!("longer than {} bytes", request::ID_SIZE));
    }
    Ok(text.to_owned())
}

/// What moving data takes beyond the serve loop. Files grow by ftruncate, too, and fstat
/// tells how long they are; those are in [`outrigger_sandbox::VHOST_USER`], and no call
/// may have two rules.
const SYSCALLS: &[Rule] = &[
    Rule::any(libc::SYS_preadv),
    Rule::any(libc::SYS_pwritev),
    // Zeroes, where the file system cannot make them itself.
    Rule::any(libc::SYS_pwrite64),
    Rule::any(libc::SYS_fdatasync),
    Rule::any(libc::SYS_fallocate),
    // Whether a block device has grown.
    Rule::when(
        libc::SYS_ioctl,
        &[Check::OneOf(1, &[image::BLKGETSIZE64 as u32])],
    ),
];

/// Runs the program.
pub fn main() -> ExitCode {
    let options: Options = outrigger_cli::parse();
    if let Some(Command::Create(options)) = &options.command {
        let made = options.make();
        return made.map_or_else(
            |error| {
                outrigger_cli::complain("device-disk", error);
                ExitCode::FAILURE
            },
            |()| ExitCode::SUCCESS,
        );
    }
    let capabilities = serde_json::json!({
        "type": "block",
        "features": ["read-only", "blk-file"],
    });
    device_core::run("device-disk", &options.common, &capabilities, || {
        build(&options)
    })
}

/// What an inherited file was opened as, as far as the kernel knows (proc_pid_fd(5)): a
/// number says nothing to those who gave a path to somebody else.
fn named(fd: RawFd) -> String {
    let path = std::fs::read_link(format!("/proc/self/fd/{fd}"));
    path.map_or_else(|_| String::new(), |path| format!(" ({})", path.display()))
}

fn build(options: &Options) -> anyhow::Result<Program> {
    let path = options.blk_file.clone().unwrap_or_default();
    let name = match options.blk_fd {
        Some(fd) => format!("--blk-fd {fd}{}", named(fd)),
        None => format!("--blk-file {}", path.display()),
    };
    let open = || {
        let file = match options.blk_fd {
            Some(fd) => image::adopt(fd, options.read_only)?,
            None => image::open_file(&path, options.read_only)?,
        };
        if options.lock == Lock::On {
            let to = match options.format {
                _ if options.read_only => lock::Use::Read,
                None | Some(Format::Raw) => lock::Use::Write,
                Some(_) => lock::Use::Grow,
            };
            lock::take(&file, to)?;
        }
        let place = match options.blk_fd {
            Some(fd) => std::fs::read_link(format!("/proc/self/fd/{fd}")).ok(),
            None => Some(path.clone()),
        };
        let origin = Origin {
            name: &name,
            directory: place.as_deref().and_then(Path::parent),
            backing: options.backing,
            lock: options.lock == Lock::On,
            depth: 0,
        };
        image::open(file, options.format, options.read_only, &origin)
    };
    let image = open().map_err(|e| anyhow::anyhow!("{name}: {e}"))?;
    let geometry = image.geometry();
    tracing::info!(
        "{name}: {} sectors{}",
        geometry.sectors(),
        if geometry.read_only {
            ", read-only"
        } else {
            ""
        }
    );
    let drive = Arc::new(Drive {
        image,
        serial: options.serial.clone(),
    });
    let queues = usize::from(options.queues);
    Ok(Program {
        description: Description {
            name: "device-disk",
            features: config::features(&geometry, options.queues),
            queues: (0..queues).collect(),
            queue_size: QUEUE_SIZE,
            config: ConfigSpace::new(config::space(&geometry, options.queues)),
            inflight: true,
            poll: std::time::Duration::ZERO,
        },
        workers: (0..queues)
            .map(|_| Box::new(Disk::new(Arc::clone(&drive))) as Box<dyn Device>)
            .collect(),
        syscalls: SYSCALLS,
        keep_network: false,
        restore: None,
        unserved: None,
    })
}

//! `device-disk`: a vhost-user-blk device process.
//!
//! [`virtio_blk`] is the device of one queue. A request is decoded and checked by [`request`]
//! and kept in [`in_flight`] until it is completed. [`image`] says where in the file its data
//! are, and [`transfer`] or [`io_engine`] moves them between the file and guest memory.
//! [`block_backend`] is what all queues share, [`config`] what the driver reads about the
//! disk, [`stats`] what the queues have done. [`block_control`] serves the control socket,
//! [`lock`] keeps other programs from the image.

mod block_backend;
mod block_control;
mod bounce_buffer;
mod config;
mod guest_iovec;
mod image;
mod in_flight;
mod io_engine;
mod lock;
mod request;
#[cfg(test)]
mod sealed;
mod stats;
mod transfer;
mod virtio_blk;

use std::os::fd::{AsFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use device_core::CommonOptions;
use device_vhost_user::{Device, DeviceProgram, DeviceProperties, QUEUE_SIZE, WorkerClocks};
use outrigger_sandbox::{Check, LISTENER, Rule};

use crate::block_backend::{BlockBackend, CacheMode};
use crate::block_control::ControlOptions;
use crate::image::{BackingPolicy, ImageFormat, ImageOrigin};
use crate::io_engine::IoEngine;
use crate::virtio_blk::VirtioBlk;

/// Serves a disk image or block device to a virtual machine over vhost-user.
#[derive(Parser)]
#[command(
    name = "device-disk",
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true
)]
pub struct DiskOptions {
    #[command(subcommand)]
    command: Option<DiskCommand>,

    #[command(flatten)]
    common: CommonOptions,

    #[command(flatten)]
    control: ControlOptions,

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
    format: Option<ImageFormat>,

    /// Whether an image may have a backing file, which is read
    #[arg(long, value_enum, value_name = "deny|allow", default_value_t = BackingPolicy::Deny)]
    backing: BackingPolicy,

    /// Refuse all writes
    #[arg(long)]
    read_only: bool,

    /// Lock the image as QEMU does, so that no two programs write to it at a time
    #[arg(long, value_enum, value_name = "on|off", default_value_t = LockMode::On)]
    lock: LockMode,

    /// How writes get to the medium
    #[arg(long, value_enum, value_name = "HOW", default_value_t)]
    cache: CacheMode,

    /// After a request, poll for more for up to N microseconds before sleeping, if polling
    /// pays: lower latency, at the cost of CPU time
    #[arg(long, value_name = "N", default_value_t = 0,
          value_parser = clap::value_parser!(u64).range(..=10_000))]
    poll_us: u64,

    /// Block size that the guest sees, in bytes [default: the medium's]
    #[arg(long, value_name = "512|4096", value_parser = block_size)]
    block_size: Option<u32>,

    /// Number of queues, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,

    /// Serial number that the guest sees, up to 20 bytes
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = serial)]
    serial: String,
}

/// What the program does instead of serving a disk.
#[derive(Subcommand)]
enum DiskCommand {
    /// Makes an image
    Create(image::create::CreateOptions),
}

/// Whether the image is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LockMode {
    /// As QEMU does
    On,
    /// Another program keeps others from writing
    Off,
}

fn block_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("neither 512 nor 4096".to_owned()),
    }
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() > request::ID_SIZE {
        return Err(format!("longer than {} bytes", request::ID_SIZE));
    }
    Ok(text.to_owned())
}

/// The device's own system calls. ftruncate, by which files grow, and fstat are in
/// [`outrigger_sandbox::VHOST_USER`] already, and no system call may have two rules.
const SYSCALLS: &[Rule] = &[
    Rule::any(libc::SYS_preadv2),
    Rule::any(libc::SYS_pwritev2),
    // Writes zeros where the file system does not support fallocate.
    Rule::any(libc::SYS_pwrite64),
    Rule::any(libc::SYS_fdatasync),
    Rule::any(libc::SYS_fallocate),
    // `io_engine` restricts what its io_uring may do. No other one can be made.
    Rule::any(libc::SYS_io_uring_enter),
    Rule::when(
        libc::SYS_io_uring_register,
        &[Check::OneOf(1, &[io_engine::REGISTER_FILES_UPDATE as u32])],
    ),
    // Finds out whether a block device has grown.
    Rule::when(
        libc::SYS_ioctl,
        &[Check::OneOf(1, &[image::BLKGETSIZE64 as u32])],
    ),
];

/// Runs the program.
pub fn main() -> ExitCode {
    let options: DiskOptions = outrigger_cli::parse();
    if let Some(DiskCommand::Create(options)) = &options.command {
        let made = options.make();
        return made.map_or_else(
            |error| {
                outrigger_cli::report_error("device-disk", error);
                ExitCode::FAILURE
            },
            |()| ExitCode::SUCCESS,
        );
    }
    let capabilities = serde_json::json!({
        "type": "block",
        "features": ["read-only", "blk-file"],
    });
    device_vhost_user::run("device-disk", &options.common, &capabilities, || {
        build(&options)
    })
}

/// The path of an inherited file in parentheses, if the kernel knows it (proc_pid_fd(5)). It
/// tells a user of the launcher more than the number of a descriptor.
fn path_of(fd: RawFd) -> String {
    let path = std::fs::read_link(format!("/proc/self/fd/{fd}"));
    path.map_or_else(|_| String::new(), |path| format!(" ({})", path.display()))
}

fn build(options: &DiskOptions) -> anyhow::Result<DeviceProgram> {
    let path = options.blk_file.clone().unwrap_or_default();
    let name = match options.blk_fd {
        Some(fd) => format!("--blk-fd {fd}{}", path_of(fd)),
        None => format!("--blk-file {}", path.display()),
    };
    let open = || {
        let file = match options.blk_fd {
            Some(fd) => image::adopt(fd, options.read_only)?,
            None => image::open_file(&path, options.read_only)?,
        };
        if options.lock == LockMode::On {
            let access = match options.format {
                _ if options.read_only => lock::ImageAccess::Read,
                None | Some(ImageFormat::Raw) => lock::ImageAccess::Write,
                Some(_) => lock::ImageAccess::Grow,
            };
            lock::take(&file, access)?;
        }
        let image_path = match options.blk_fd {
            Some(fd) => std::fs::read_link(format!("/proc/self/fd/{fd}")).ok(),
            None => Some(path.clone()),
        };
        let origin = ImageOrigin {
            name: &name,
            directory: image_path.as_deref().and_then(Path::parent),
            backing: options.backing,
            lock: options.lock == LockMode::On,
            depth: 0,
        };
        image::open(file, options.format, options.read_only, &origin)
    };
    let image = open().map_err(|e| anyhow::anyhow!("{name}: {e}"))?;
    let geometry = image.geometry();
    let (sectors, read_only) = (geometry.sectors(), geometry.read_only);
    tracing::info!(sectors, read_only, "{name}");
    let backend = BlockBackend::new(
        image,
        options.cache,
        options.block_size,
        options.serial.clone(),
        options.queues,
    )
    .map_err(|e| anyhow::anyhow!("{name}: {e}"))?;
    let features = config::features(&backend.geometry(), options.queues);
    let backend = Arc::new(backend);
    let queues = usize::from(options.queues);
    let properties = DeviceProperties {
        name: "device-disk",
        features,
        queues: (0..queues).collect(),
        queue_size: QUEUE_SIZE,
        config: backend.config.clone(),
        inflight: true,
        poll_time: Duration::from_micros(options.poll_us),
    };
    let mut program = DeviceProgram {
        syscalls: vec![SYSCALLS],
        clocks: WorkerClocks::new(queues),
        ..DeviceProgram::new(properties, workers(&backend, queues))
    };
    if let Some((listener, bound)) = options.control.open()? {
        let clocks = program.clocks.clone();
        program.syscalls.push(LISTENER);
        program.bound.extend(bound);
        program.start_threads = Some(Box::new(move || {
            block_control::start(listener, backend, clocks)
        }));
    }
    Ok(program)
}

/// Makes a device for each queue, with an I/O engine if the host has io_uring.
fn workers(backend: &Arc<BlockBackend>, queues: usize) -> Vec<Box<dyn Device>> {
    let direct = backend.direct.as_ref();
    let mut workers: Vec<Box<dyn Device>> = Vec::with_capacity(queues);
    for queue in 0..queues {
        let engine = IoEngine::new(backend.image.file(), direct.map(AsFd::as_fd));
        if queue == 0
            && let Err(error) = &engine
        {
            let cache = match direct {
                Some(_) => ", and uses the page cache",
                None => "",
            };
            tracing::warn!("no io_uring ({error}): a queue waits for each of its requests{cache}");
        }
        workers.push(Box::new(VirtioBlk::new(
            Arc::clone(backend),
            queue,
            engine.ok(),
        )));
    }
    workers
}

//! `outrigger demo`: the main job on the embedded guest, without a download,
//! without root and without a file: kernel and disk are memory.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use outrigger_protocol::exit;
use rustix::fs::MemfdFlags;

use crate::config::{Disk, Machine};
use crate::keyval;
use crate::plan::Plan;
use crate::supervise;

/// The guest, built with this program (`build.rs`).
const GUEST: &[u8] = include_bytes!(env!("EMBEDDED_GUEST"));
/// Size of the disk in bytes.
const DISK: u64 = 64 << 20;
/// The guest's job: use one device of each kind and fail without it.
const CMDLINE: &str = "job=main need=block,net,console ip=10.0.2.15 peer=10.0.2.1";

/// Runs the demonstration; returns the exit code.
///
/// # Errors
/// When a process cannot be started or does not get ready.
pub fn run(quiet: bool) -> anyhow::Result<u8> {
    let memory = |name: &str| {
        rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)
            .map(std::fs::File::from)
            .with_context(|| format!("memory for the {name}"))
    };
    let mut kernel = memory("guest")?;
    kernel.write_all(GUEST).context("guest")?;
    let disk = memory("disk")?;
    disk.set_len(DISK).context("disk")?;
    // The kernel stays open under the same number in the runner.
    let path = |file: &std::fs::File| PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));

    let machine = Machine {
        kernel: Some(path(&kernel)),
        initrd: None,
        cmdline: Some(CMDLINE.into()),
        load: Vec::new(),
        entry: None,
        show_regs: false,
        memory: Some("64M".into()),
        cpus: None,
        disk: vec![Disk {
            path: path(&disk),
            readonly: false,
            lock: true,
            format: None,
            backing: None,
            cache: None,
            poll_us: None,
            block_size: None,
            queues: None,
            serial: Some("demo".into()),
        }],
        net: vec![keyval::parse("isolated").map_err(anyhow::Error::msg)?],
        console: vec![keyval::parse("stdio").map_err(anyhow::Error::msg)?],
        serial: Some(keyval::parse("null").map_err(anyhow::Error::msg)?),
        debug_console: None,
        control: None,
        on_reset: None,
        restart: None,
        on_loss: None,
        sandbox: None,
    };
    let mut plan = Plan::new(&machine);
    plan.inherited.push(kernel.into());
    plan.devices[0].program.summary = "64 MiB of memory".into();

    let start = Instant::now();
    let code = supervise::run(machine, plan, quiet)?;
    if !quiet {
        let verdict = if code == exit::POWERED_OFF {
            "passed: the guest used its disk, network and console, each a process of its own"
        } else {
            "FAILED"
        };
        eprintln!("demo {verdict} ({:.1} s)", start.elapsed().as_secs_f64());
    }
    Ok(code)
}

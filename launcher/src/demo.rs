//! `outrigger demo`: runs the embedded guest without a download, without root and without
//! files. The kernel and the disk are in memory (memfd).

use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use outrigger_protocol::exit;
use rustix::fs::MemfdFlags;

use crate::config::MachineConfig;
use crate::keyval;
use crate::plan::MachinePlan;
use crate::run;

/// The guest's kernel, which `build.rs` builds.
const GUEST: &[u8] = include_bytes!(env!("EMBEDDED_GUEST"));
/// Size of the disk in bytes.
const DISK: u64 = 64 << 20;
/// Makes the guest use one device of each kind, and fail if one is missing.
const CMDLINE: &str = "job=main need=block,net,console ip=10.0.2.15 peer=10.0.2.1";

/// Runs the demonstration; returns the exit code.
///
/// # Errors
/// A process cannot be started or does not become ready.
pub fn run(quiet: bool) -> anyhow::Result<u8> {
    let memory = |name: &str| {
        rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)
            .map(std::fs::File::from)
            .with_context(|| format!("cannot create memory for the {name}"))
    };
    let mut kernel = memory("guest")?;
    kernel.write_all(GUEST).context("guest")?;
    let disk = memory("disk")?;
    disk.set_len(DISK).context("disk")?;
    // The runner inherits the kernel, and device-disk the disk, with these numbers.
    let path = |file: &std::fs::File| PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));

    let disk = format!("path={},serial=demo", path(&disk).display());
    let machine = MachineConfig {
        kernel: Some(path(&kernel)),
        cmdline: Some(CMDLINE.into()),
        memory: Some("64M".into()),
        disk: vec![keyval::parse(&disk).map_err(anyhow::Error::msg)?],
        net: vec![keyval::parse("isolated").map_err(anyhow::Error::msg)?],
        console: vec![keyval::parse("stdio").map_err(anyhow::Error::msg)?],
        serial: Some(keyval::parse("null").map_err(anyhow::Error::msg)?),
        ..MachineConfig::default()
    };
    let mut plan = MachinePlan::new(&machine);
    plan.inherited.push(kernel.into());
    plan.devices[0].program.summary = "64 MiB of memory".into();

    let start = Instant::now();
    let code = run::run(machine, plan, quiet)?;
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

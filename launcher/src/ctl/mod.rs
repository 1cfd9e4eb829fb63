//! `outrigger ctl`: asks something of a machine that runs, over the control socket of
//! its launcher or of its runner alone.

mod stats;
mod table;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use outrigger_cli::{Usage, size, socket};
use outrigger_protocol::control::{ControlCommand, ControlReply};
use outrigger_protocol::exit;

use crate::control::lines::Lines;

/// The longest that anything takes: a swap that is tried twice, with a process that takes
/// its time to start.
const ANSWER: Duration = Duration::from_secs(150);

/// Ask something of a machine that runs.
///
/// Exit codes: 0 it is done, 1 it is not (one line says why), 2 the command line makes
/// no sense.
#[derive(Args)]
pub struct Ctl {
    /// Control socket of the machine (`--control` of outrigger or vcpu-runner)
    #[arg(value_name = "VM", value_parser = socket::path_parser())]
    socket: PathBuf,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show the machine and its devices
    Status {
        /// As one JSON object
        #[arg(long)]
        json: bool,
        /// Go on with events as they come
        #[arg(long)]
        watch: bool,
    },
    /// Show events as they come, until the machine ends
    Watch {
        /// As JSON objects, one a line
        #[arg(long)]
        json: bool,
    },
    /// Stop vCPUs and devices
    Pause,
    /// Go on after a pause
    Resume,
    /// Reset the machine, as its reset button would
    Reset,
    /// End the machine
    Stop,
    /// Put another process behind a device, under the running guest
    ///
    /// When the new one does not suit, the old one goes on.
    Swap {
        /// The device
        id: String,
        /// A description as for `run`, or socket=PATH of a process that listens there
        #[arg(value_name = "KEY=VALUE,...|socket=PATH")]
        with: String,
    },
    /// Put a new process of the same kind behind a device: the program on disk now
    Restart {
        /// The device, or `platform`
        id: String,
    },
    /// Make a disk larger under the running guest, which is told
    ///
    /// Without a size: look whether what the disk lies in has grown.
    Resize {
        /// The disk
        id: String,
        /// The new size in bytes, or with K, M, G or T
        #[arg(value_name = "SIZE", value_parser = size::parse)]
        size: Option<u64>,
    },
    /// Put what was written to a disk onto its medium
    Flush {
        /// The disk
        id: String,
    },
    /// Show what disks have done since their processes started
    Stats {
        /// The disk [default: all disks]
        id: Option<String>,
        /// As one JSON object, by disk
        #[arg(long)]
        json: bool,
    },
}

impl Ctl {
    /// Carries it out; returns the exit code.
    ///
    /// # Errors
    /// When nobody listens, or what is asked is refused.
    pub fn run(self) -> anyhow::Result<u8> {
        let what = || self.socket.display().to_string();
        let mut lines = Lines::connect(&self.socket, None).with_context(what)?;
        let mut ask = |command| {
            let reply: ControlReply = lines.ask(&command, ANSWER).with_context(what)?;
            if !reply.ok {
                bail!("{}", reply.error.unwrap_or_else(|| "refused".into()));
            }
            anyhow::Ok(reply)
        };
        match self.command {
            Command::Status { json, watch } => {
                if watch {
                    ask(ControlCommand::Watch {})?;
                }
                let reply = ask(ControlCommand::Status {})?;
                print(&table::status(&reply, json)?)?;
                if watch {
                    events(&mut lines, json).with_context(what)?;
                }
            }
            Command::Watch { json } => {
                ask(ControlCommand::Watch {})?;
                events(&mut lines, json).with_context(what)?;
            }
            Command::Pause => drop(ask(ControlCommand::Pause {})?),
            Command::Resume => drop(ask(ControlCommand::Resume {})?),
            Command::Reset => drop(ask(ControlCommand::Reset {})?),
            Command::Stop => drop(ask(ControlCommand::Stop {})?),
            Command::Swap { id, with } => outage(&ask(swap(id, &with)?)?)?,
            Command::Restart { id } => outage(&ask(ControlCommand::Restart { id })?)?,
            Command::Resize { id, size } => {
                let reply = ask(ControlCommand::Resize { id, size })?;
                let capacity = reply.capacity.context("an answer without a capacity")?;
                print(&format!("the guest sees {capacity} bytes\n"))?;
            }
            Command::Flush { id } => drop(ask(ControlCommand::Flush { id })?),
            Command::Stats { id, json } => {
                let disks = match id {
                    Some(id) => vec![id],
                    None => table::disks(&ask(ControlCommand::Status {})?)?,
                };
                let (mut all, mut failed) = (BTreeMap::new(), Vec::new());
                for id in disks {
                    let reply = ask(ControlCommand::Stats { id: id.clone() });
                    let stats = |it: ControlReply| it.stats.context("an answer without statistics");
                    match reply.and_then(stats) {
                        Ok(stats) => drop(all.insert(id, stats)),
                        Err(error) => failed.push(format!("{error:#}")),
                    }
                }
                if !all.is_empty() {
                    print(&stats::show(&all, json)?)?;
                }
                if !failed.is_empty() {
                    bail!("{}", failed.join("; "));
                }
            }
        }
        Ok(exit::POWERED_OFF)
    }
}

/// What a swap is to be done with. Paths are ours, and the launcher may be elsewhere.
fn swap(id: String, with: &str) -> Result<ControlCommand, Usage> {
    let absolute = |path: &str| {
        let path = std::path::absolute(path);
        path.map_err(|error| Usage(format!("{with}: {error}")))
    };
    let (mut socket, mut device) = (None, None);
    match with.strip_prefix("socket=") {
        Some(path) => {
            let path = socket::socket_path(absolute(path)?);
            socket = Some(path.map_err(|error| Usage(format!("{with}: {error}")))?);
        }
        None => {
            let parts = with
                .split(',')
                .map(|part| match part.strip_prefix("path=") {
                    Some(path) if !path.is_empty() => {
                        Ok(format!("path={}", absolute(path)?.display()))
                    }
                    _ => Ok(part.to_owned()),
                });
            device = Some(parts.collect::<Result<Vec<_>, Usage>>()?.join(","));
        }
    }
    Ok(ControlCommand::Swap { id, socket, device })
}

fn outage(reply: &ControlReply) -> anyhow::Result<()> {
    match reply.outage_us {
        Some(us) => {
            let ms = Duration::from_micros(us).as_secs_f64() * 1e3;
            print(&format!("nobody served it for {ms:.1} ms\n"))
        }
        None => Ok(()),
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut output = io::stdout().lock();
    output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
        .context("standard output")
}

/// Shows events until there are no more.
fn events(lines: &mut Lines, json: bool) -> anyhow::Result<()> {
    while let Some(line) = lines.next(None)? {
        let text = String::from_utf8_lossy(&line).into_owned();
        if json {
            print(&format!("{text}\n"))?;
        } else {
            print(&table::event(&text))?;
        }
    }
    Ok(())
}

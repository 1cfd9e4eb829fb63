//! `outrigger ctl`: sends a command to a running machine, over the control socket of its
//! launcher or of its runner.

mod stats;
mod table;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use outrigger_cli::{Usage, size, socket};
use outrigger_control_socket::ControlClient;
use outrigger_protocol::control::{ControlCommand, ControlReply};
use outrigger_protocol::exit;

use crate::control::REPLY_LIMIT;

/// How long to wait for a reply: a little longer than the launcher itself.
const TIMEOUT: Duration = REPLY_LIMIT.saturating_add(Duration::from_secs(5));

/// Send a command to a running machine.
///
/// Exit codes: 0 the command was carried out, 1 it failed (one line on stderr says why), 2
/// the command line is not valid.
#[derive(Args)]
pub struct CtlOptions {
    /// Control socket of the machine (`--control` of outrigger or vcpu-runner)
    #[arg(value_name = "VM", value_parser = socket::path_parser())]
    socket: PathBuf,

    #[command(subcommand)]
    command: CtlCommand,
}

#[derive(Subcommand)]
enum CtlCommand {
    /// Show the state of the machine and its devices
    Status {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        /// Then show events as they happen
        #[arg(long)]
        watch: bool,
    },
    /// Show events as they happen, until the machine ends
    Watch {
        /// Print each event as a JSON object on a line
        #[arg(long)]
        json: bool,
    },
    /// Pause the vCPUs and the devices
    Pause,
    /// Resume a paused machine
    Resume,
    /// Reset the machine, as a reset button does
    Reset,
    /// End the machine
    Stop,
    /// Swap a device to another process while the guest runs
    ///
    /// If the new process is not compatible or any step fails, the device keeps its process.
    Swap {
        /// The device
        id: String,
        /// A description of the device as for `run`, or socket=PATH of a listening process
        #[arg(value_name = "KEY=VALUE,...|socket=PATH")]
        with: String,
    },
    /// Swap a device to a new process with the same options, to use an updated program
    Restart {
        /// The device, or `platform`
        id: String,
    },
    /// Grow a disk while the guest runs, and tell the guest
    ///
    /// Without a size, the new size is that of the image file or block device.
    Resize {
        /// The disk
        id: String,
        /// The new size in bytes, or with the suffix K, M, G or T
        #[arg(value_name = "SIZE", value_parser = size::parse)]
        size: Option<u64>,
    },
    /// Write everything that a disk holds in caches to its medium
    Flush {
        /// The disk
        id: String,
    },
    /// Show statistics of disks since their processes started
    Stats {
        /// The disk [default: all disks]
        id: Option<String>,
        /// Print one JSON object with the disks as its keys
        #[arg(long)]
        json: bool,
    },
}

impl CtlOptions {
    /// Sends the command and prints the result. Returns the exit code.
    ///
    /// # Errors
    /// The machine cannot be reached, or the command fails.
    pub fn run(self) -> anyhow::Result<u8> {
        let what = || self.socket.display().to_string();
        let mut client = ControlClient::connect(&self.socket, None).with_context(what)?;
        let mut request = |command| {
            let reply: ControlReply = client.request(&command, TIMEOUT).with_context(what)?;
            if !reply.ok {
                bail!(
                    "{}",
                    reply.error.unwrap_or_else(|| "the command failed".into())
                );
            }
            anyhow::Ok(reply)
        };
        match self.command {
            CtlCommand::Status { json, watch } => {
                if watch {
                    request(ControlCommand::Watch {})?;
                }
                let reply = request(ControlCommand::Status {})?;
                print(&table::status(&reply, json)?)?;
                if watch {
                    print_events(&mut client, json).with_context(what)?;
                }
            }
            CtlCommand::Watch { json } => {
                request(ControlCommand::Watch {})?;
                print_events(&mut client, json).with_context(what)?;
            }
            CtlCommand::Pause => drop(request(ControlCommand::Pause {})?),
            CtlCommand::Resume => drop(request(ControlCommand::Resume {})?),
            CtlCommand::Reset => drop(request(ControlCommand::Reset {})?),
            CtlCommand::Stop => drop(request(ControlCommand::Stop {})?),
            CtlCommand::Swap { id, with } => print_outage(&request(swap_command(id, &with)?)?)?,
            CtlCommand::Restart { id } => print_outage(&request(ControlCommand::Restart { id })?)?,
            CtlCommand::Resize { id, size } => {
                let reply = request(ControlCommand::Resize { id, size })?;
                let capacity = reply.capacity.context("the reply has no capacity")?;
                print(&format!("the guest sees {capacity} bytes\n"))?;
            }
            CtlCommand::Flush { id } => drop(request(ControlCommand::Flush { id })?),
            CtlCommand::Stats { id, json } => {
                let disks = match id {
                    Some(id) => vec![id],
                    None => table::disks(&request(ControlCommand::Status {})?)?,
                };
                let (mut all, mut failed) = (BTreeMap::new(), Vec::new());
                for id in disks {
                    let reply = request(ControlCommand::Stats { id: id.clone() });
                    let stats = |it: ControlReply| it.stats.context("the reply has no statistics");
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

/// Returns the command for a swap. Makes paths absolute, because the launcher may have another
/// working directory.
fn swap_command(id: String, with: &str) -> Result<ControlCommand, Usage> {
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

fn print_outage(reply: &ControlReply) -> anyhow::Result<()> {
    match reply.outage_us {
        Some(us) => {
            let ms = Duration::from_micros(us).as_secs_f64() * 1e3;
            print(&format!("I/O was paused for {ms:.1} ms\n"))
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

/// Prints events until the connection ends.
fn print_events(client: &mut ControlClient, json: bool) -> anyhow::Result<()> {
    while let Some(line) = client.next_line(None)? {
        let text = String::from_utf8_lossy(&line).into_owned();
        if json {
            print(&format!("{text}\n"))?;
        } else {
            print(&table::event(&text))?;
        }
    }
    Ok(())
}

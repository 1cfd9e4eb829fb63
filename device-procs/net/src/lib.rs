//! `device-net`: a vhost-user-net device process.
//!
//! [`net`] is the device with its two queues, [`tap`] the tap device behind it,
//! [`isolated`] makes that in a network namespace of its own, [`interface`] is the
//! host side of the tap, and [`config`] what the driver reads.

mod config;
mod interface;
mod isolated;
mod net;
mod tap;

use std::os::fd::RawFd;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use device_core::CommonOptions;
use device_vhost_user::{ConfigSpace, DeviceProgram, DeviceProperties, QUEUE_SIZE};

use crate::config::Mac;
use crate::interface::{Interface, Network};
use crate::net::VirtioNet;
use crate::tap::Tap;

/// Ethernet's MTU (RFC 894) in bytes, used when the interface's MTU is unknown.
const DEFAULT_MTU: u16 = 1500;

/// Serves a network card to a virtual machine over vhost-user.
#[derive(Parser)]
#[command(name = "device-net", version)]
pub struct NetOptions {
    #[command(flatten)]
    common: CommonOptions,

    /// Existing tap device to attach to
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with_all = ["tap_fd", "isolated"],
        required_unless_present_any = ["tap_fd", "isolated", "print_capabilities"]
    )]
    tap: Option<String>,

    /// Inherited tap device, attached with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    #[arg(long, value_name = "N", conflicts_with = "isolated",
          value_parser = clap::value_parser!(RawFd).range(0..))]
    tap_fd: Option<RawFd>,

    /// Network namespace with only the guest and the host's kernel, which has this
    /// address; `nsenter --target PID --net` enters it
    #[arg(long, value_name = "ADDRESS/PREFIX", num_args = 0..=1,
          default_missing_value = "10.0.2.1/24")]
    isolated: Option<Network>,

    /// MAC address of the guest [default: derived from the host and the tap device]
    #[arg(long, value_name = "XX:XX:XX:XX:XX:XX")]
    mac: Option<Mac>,

    /// MTU of both ends in bytes [default: the tap device's]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(68..))]
    mtu: Option<u16>,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let options: NetOptions = outrigger_cli::parse();
    let capabilities = serde_json::json!({ "type": "net", "features": [] });
    device_vhost_user::run("device-net", &options.common, &capabilities, || {
        build(&options)
    })
}

fn build(options: &NetOptions) -> anyhow::Result<DeviceProgram> {
    let (tap, keep_network) = open(options)?;
    let interface = Interface::new(tap.name())?;
    let mtu = negotiate_mtu(&interface, options.mtu)
        .with_context(|| format!("{}: setting the MTU", tap.name()))?;
    bring_up(&interface, tap.name());
    let mac = options.mac.unwrap_or_else(|| {
        let host = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
        Mac::derived(host.trim(), tap.name())
    });
    tracing::info!("{}: guest {mac}, MTU {mtu}", tap.name());
    let properties = DeviceProperties {
        name: "device-net",
        features: config::features(),
        queues: vec![0, 0],
        queue_size: QUEUE_SIZE,
        config: ConfigSpace::new(config::space(mac, mtu)),
        inflight: false,
        poll_time: std::time::Duration::ZERO,
    };
    Ok(DeviceProgram {
        syscalls: vec![tap::SYSCALLS],
        keep_network,
        ..DeviceProgram::new(properties, vec![Box::new(VirtioNet::new(tap, mtu))])
    })
}

/// Opens the tap device; returns it, and whether the process must stay in its current
/// network namespace.
fn open(options: &NetOptions) -> anyhow::Result<(Tap, bool)> {
    if let Some(network) = options.isolated {
        let tap = isolated::tap(network).context("--isolated")?;
        return Ok((tap, true));
    }
    if let Some(fd) = options.tap_fd {
        let tap = device_core::fd::inherit(fd).and_then(Tap::adopt);
        return Ok((tap.with_context(|| format!("--tap-fd {fd}"))?, false));
    }
    let name = options.tap.as_deref().unwrap_or_default();
    let tap = Tap::attach(name).with_context(|| format!("--tap {name}"))?;
    Ok((tap, false))
}

/// Sets the requested MTU, or returns the interface's. An inherited tap device may be in
/// another network namespace, where its MTU cannot be read.
fn negotiate_mtu(interface: &Interface, requested: Option<u16>) -> std::io::Result<u16> {
    if let Some(mtu) = requested {
        interface.set_mtu(mtu)?;
        return Ok(mtu);
    }
    Ok(interface
        .mtu()
        .map_or(DEFAULT_MTU, |mtu| u16::try_from(mtu).unwrap_or(u16::MAX)))
}

/// Brings the tap device up: one that is down drops all frames. Without the right to do
/// so it warns, because the owner of the tap device has to.
fn bring_up(interface: &Interface, name: &str) {
    if interface.is_up().is_ok_and(|up| !up)
        && let Err(error) = interface.bring_up()
    {
        tracing::warn!(
            %error,
            "tap device {name} is down and cannot be brought up: run `ip link set {name} up`"
        );
    }
}

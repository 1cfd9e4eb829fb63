//! `device-net`: a vhost-user-net device process.
//!
//! [`net`] is the device and its two queues; [`tap`] what it is connected to,
//! made in a network of its own by [`isolated`] if asked for; [`interface`] the
//! host's side of it; [`config`] what the driver reads.

mod config;
mod interface;
mod isolated;
mod net;
mod tap;

use std::os::fd::RawFd;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use device_core::{ConfigSpace, DeviceProgram, DeviceProperties, QUEUE_SIZE, cli::CommonOptions};

use crate::config::Mac;
use crate::interface::{Interface, Network};
use crate::net::VirtioNet;
use crate::tap::Tap;

/// What an interface has that was not asked (RFC 894), in bytes.
const USUAL_MTU: u16 = 1500;

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

    /// A network with nobody in it but the guest and the host's kernel, which has
    /// this address; `nsenter --target PID --net` enters it
    #[arg(long, value_name = "ADDRESS/PREFIX", num_args = 0..=1,
          default_missing_value = "10.0.2.1/24")]
    isolated: Option<Network>,

    /// The guest's address [default: one that stays the same for each tap device
    /// of a host]
    #[arg(long, value_name = "XX:XX:XX:XX:XX:XX")]
    mac: Option<Mac>,

    /// Longest packet in bytes, for both ends [default: the tap device's]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(68..))]
    mtu: Option<u16>,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let options: NetOptions = outrigger_cli::parse();
    let capabilities = serde_json::json!({ "type": "net", "features": [] });
    device_core::run("device-net", &options.common, &capabilities, || {
        build(&options)
    })
}

fn build(options: &NetOptions) -> anyhow::Result<DeviceProgram> {
    let (tap, keep_network) = open(options)?;
    let interface = Interface::new(tap.name())?;
    let mtu = agree_on_mtu(&interface, options.mtu)
        .with_context(|| format!("{}: setting the MTU", tap.name()))?;
    bring_up(&interface, tap.name());
    let mac = options.mac.unwrap_or_else(|| {
        let host = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
        Mac::derived(host.trim(), tap.name())
    });
    tracing::info!("{}: guest {mac}, MTU {mtu}", tap.name());
    Ok(DeviceProgram {
        properties: DeviceProperties {
            name: "device-net",
            features: config::features(),
            queues: vec![0, 0],
            queue_size: QUEUE_SIZE,
            config: ConfigSpace::new(config::space(mac, mtu)),
            inflight: false,
            poll: std::time::Duration::ZERO,
        },
        workers: vec![Box::new(VirtioNet::new(tap, mtu))],
        syscalls: tap::SYSCALLS,
        keep_network,
        restore: None,
        unserved: None,
        control: None,
    })
}

/// The tap device, and whether the process must stay in its network namespace.
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

/// Sets the MTU if there is a wish, and asks for it otherwise. An inherited tap
/// device may live in a network namespace where we cannot ask.
fn agree_on_mtu(interface: &Interface, wish: Option<u16>) -> std::io::Result<u16> {
    if let Some(mtu) = wish {
        interface.set_mtu(mtu)?;
        return Ok(mtu);
    }
    Ok(interface
        .mtu()
        .map_or(USUAL_MTU, |mtu| u16::try_from(mtu).unwrap_or(u16::MAX)))
}

/// A tap device that is down drops everything. Its owner may have forgotten to
/// bring it up, or may have left it to us; if we may not, that is for them to know.
fn bring_up(interface: &Interface, name: &str) {
    if interface.is_up().is_ok_and(|up| !up)
        && let Err(error) = interface.bring_up()
    {
        tracing::warn!("{name} is down, and bringing it up failed: {error}");
    }
}

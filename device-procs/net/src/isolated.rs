//! A network of the process's own, with nobody in it but the guest and the
//! host's kernel: its network stack answers at one address, and nothing leads
//! further. Root can enter it (`nsenter --target PID --net`) and serve there.

use std::io;

use anyhow::Context as _;
use rustix::io::Errno;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::interface::{Interface, Network};
use crate::tap::Tap;

/// What the tap device is called in there.
const NAME: &str = "tap0";

/// Moves the process, which must have one thread, into a network namespace of
/// its own and makes a tap device there whose host side has `network`'s address.
///
/// # Errors
/// When the host lets this user have no namespaces, or no tap device.
pub fn tap(network: Network) -> anyhow::Result<Tap> {
    leave().context("making a network namespace")?;
    // For servers in here that talk to themselves.
    Interface::new("lo")?.bring_up().context("lo")?;
    let tap = Tap::create(NAME)?;
    let interface = Interface::new(NAME)?;
    // The same in each process, for a guest remembers whom it has talked to.
    let [a, b, c, d] = network.address.octets();
    interface
        .set_station([0x02, 0, a, b, c, d])
        .with_context(|| format!("setting the station address of {NAME}"))?;
    interface
        .set_network(network)
        .with_context(|| format!("setting the address of {NAME}"))?;
    Ok(tap)
}

fn leave() -> io::Result<()> {
    // SAFETY: the descriptor table stays shared (no CLONE_FILES).
    match unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
        // An ordinary user may do it as the master of a user namespace.
        Err(Errno::PERM) => {}
        result => return Ok(result?),
    }
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    let both = UnshareFlags::NEWUSER | UnshareFlags::NEWNET;
    // SAFETY: as above.
    unsafe { unshare_unsafe(both)? };
    // Whoever has no name in there could not leave it for the next, which the
    // sandbox makes. The rule about setgroups: user_namespaces(7).
    std::fs::write("/proc/self/setgroups", "deny")?;
    let (user, group) = (user.as_raw(), group.as_raw());
    std::fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("{group} {group} 1"))
}

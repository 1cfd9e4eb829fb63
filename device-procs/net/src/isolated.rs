//! A network namespace of the process's own. It contains the guest and the host kernel's
//! network stack, which answers at one address; there is no route to anywhere else. Root
//! can enter it (`nsenter --target PID --net`) and run servers there.

use std::io;

use anyhow::Context as _;
use rustix::io::Errno;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::interface::{Interface, Network};
use crate::tap::Tap;

/// Name of the tap device in that namespace.
const TAP_NAME: &str = "tap0";

/// Moves the process, which must have one thread, into a new network namespace and creates
/// a tap device there. The host side of the tap gets `network`'s address.
///
/// # Errors
/// The host does not allow this user to create namespaces or tap devices.
pub fn tap(network: Network) -> anyhow::Result<Tap> {
    enter_namespace().context("making a network namespace")?;
    // Servers in this namespace may use loopback.
    Interface::new("lo")?.bring_up().context("lo")?;
    let tap = Tap::create(TAP_NAME)?;
    let interface = Interface::new(TAP_NAME)?;
    // A guest caches its neighbours' MAC addresses, so a restarted process uses the same one.
    let [a, b, c, d] = network.address.octets();
    interface
        .set_mac([0x02, 0, a, b, c, d])
        .with_context(|| format!("setting the MAC address of {TAP_NAME}"))?;
    interface
        .set_network(network)
        .with_context(|| format!("setting the address of {TAP_NAME}"))?;
    Ok(tap)
}

fn enter_namespace() -> io::Result<()> {
    // SAFETY: the descriptor table stays shared (no CLONE_FILES).
    match unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
        // A user without CAP_SYS_ADMIN needs a user namespace of its own for it.
        Err(Errno::PERM) => {}
        result => return Ok(result?),
    }
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    let both = UnshareFlags::NEWUSER | UnshareFlags::NEWNET;
    // SAFETY: as above.
    unsafe { unshare_unsafe(both)? };
    // Without an identity mapping the process could not create the next user namespace,
    // which the sandbox does. setgroups must be denied first (user_namespaces(7)).
    std::fs::write("/proc/self/setgroups", "deny")?;
    let (user, group) = (user.as_raw(), group.as_raw());
    std::fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("{group} {group} 1"))
}

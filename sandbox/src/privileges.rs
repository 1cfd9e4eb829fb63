//! User ids, capabilities and resource limits. See credentials(7), capabilities(7), prctl(2)
//! and getrlimit(2).

use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Gid, Resource, Rlimit, Signal, Uid, geteuid, getrlimit, getuid,
    parent_process_death_signal, set_dumpable_behavior, set_parent_process_death_signal, setrlimit,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use crate::{ActionContext, SandboxError};

/// The user and group id that own no files. The kernel shows them for ids that have no
/// mapping (`/proc/sys/kernel/overflowuid`).
const UNPRIVILEGED_ID: u32 = 65534;

pub(crate) fn is_root() -> bool {
    getuid().is_root() || geteuid().is_root()
}

/// Changes from root to an unprivileged user, irrevocably.
///
/// This is only for root: an ordinary user may not change its ids or leave its supplementary
/// groups. These give it no access once it can resolve no paths.
pub(crate) fn become_unprivileged_user() -> Result<(), SandboxError> {
    let (uid, gid) = (
        Uid::from_raw(UNPRIVILEGED_ID),
        Gid::from_raw(UNPRIVILEGED_ID),
    );
    match set_thread_res_gid(gid, gid, gid) {
        // The process is root of a user namespace without a mapping for this id. Outside of
        // that namespace it is an ordinary user, and `give_up` drops its capabilities.
        Err(Errno::INVAL) => return Ok(()),
        done => done.action("leave root's group")?,
    }
    set_thread_groups(&[]).action("leave supplementary groups")?;
    // This needs CAP_SETPCAP, which the change of the user id drops.
    empty_bounding_set()?;
    set_thread_res_uid(uid, uid, uid).action("stop being root")
}

/// Returns the signal that the process gets when its launcher dies. The kernel clears it
/// whenever the process changes its ids or capabilities, so it has to be set again.
pub(crate) fn parent_death_signal() -> Result<Option<Signal>, SandboxError> {
    parent_process_death_signal().action("read the parent death signal")
}

/// Drops all capabilities and the possibility to gain any, forbids debuggers and core dumps,
/// and limits the number of open files to `max_files`.
///
/// Two limits are not set on purpose: RLIMIT_FSIZE, because it would apply to disk images and
/// memfds (SIGXFSZ); and RLIMIT_NPROC, because it counts all processes and threads of the same
/// user. Instead of the latter, [`crate::seal`] forbids clone(2).
pub(crate) fn give_up(max_files: u64, parent_death: Option<Signal>) -> Result<(), SandboxError> {
    // A process in a new user namespace has all capabilities there. An ordinary user outside
    // of one cannot change its bounding set, but no_new_privs below keeps execve(2) from
    // granting any capability.
    let current = capabilities(None).action("read capabilities")?;
    if current.effective.contains(CapabilitySet::SETPCAP) {
        empty_bounding_set()?;
    }
    clear_ambient_capability_set().action("clear ambient capabilities")?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).action("drop capabilities")?;
    set_no_new_privs(true).action("set no_new_privs")?;

    limit(Resource::Core, 0).action("forbid core dumps")?;
    limit(Resource::Nofile, max_files).action("limit open files")?;
    // After the changes above, because each change of credentials resets it.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).action("forbid debuggers")?;
    set_parent_process_death_signal(parent_death).action("keep the parent death signal")
}

fn empty_bounding_set() -> Result<(), SandboxError> {
    for bit in 0..u64::BITS {
        // By number, so that capabilities that are newer than this code are dropped, too.
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match remove_capability_from_bounding_set(capability) {
            Err(Errno::INVAL) => break, // above the kernel's last capability
            done => done.action("empty the bounding set")?,
        }
    }
    Ok(())
}

/// Lowers the soft and hard limit to `most`, unless the hard limit is lower already.
fn limit(resource: Resource, most: u64) -> rustix::io::Result<()> {
    let maximum = getrlimit(resource)
        .maximum
        .map_or(most, |now| now.min(most));
    let limit = Rlimit {
        current: Some(maximum),
        maximum: Some(maximum),
    };
    setrlimit(resource, limit)
}

//! Users, capabilities and limits. See credentials(7), capabilities(7),
//! prctl(2) and getrlimit(2).

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

use crate::{Error, Step};

/// The user and group that own nothing: what the kernel itself shows for ids
/// it cannot name (`/proc/sys/kernel/overflowuid`).
const NOBODY: u32 = 65534;

pub(crate) fn is_root() -> bool {
    getuid().is_root() || geteuid().is_root()
}

/// From root to a user without rights, for good.
///
/// An ordinary user has no right to change ids, or to leave its supplementary
/// groups, and is left as it is; its groups open nothing any more once paths
/// are gone.
pub(crate) fn become_nobody() -> Result<(), Error> {
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    match set_thread_res_gid(gid, gid, gid) {
        // This root rules a user namespace that knows no such id. Outside it is
        // an ordinary user, and loses the namespace's rights with `give_up`.
        Err(Errno::INVAL) => return Ok(()),
        done => done.step("leave root's group")?,
    }
    set_thread_groups(&[]).step("leave supplementary groups")?;
    // Takes CAP_SETPCAP, which goes with the user id.
    empty_bounding_set()?;
    set_thread_res_uid(uid, uid, uid).step("stop being root")
}

/// The signal that the launcher asked to be sent when it dies. The kernel
/// forgets it whenever a process changes its ids or capabilities.
pub(crate) fn parent_death_signal() -> Result<Option<Signal>, Error> {
    parent_process_death_signal().step("read the parent death signal")
}

/// Gives up capabilities, the chance to gain any, debuggers, core dumps, and
/// more than `max_files` open files.
///
/// Two limits are left alone on purpose. FSIZE, because writing to a disk image
/// or growing a memfd counts against it (SIGXFSZ). NPROC, because it
/// counts all processes and threads of the same user, strangers included;
/// [`crate::seal`] forbids clone(2) instead.
pub(crate) fn give_up(max_files: u64, parent_death: Option<Signal>) -> Result<(), Error> {
    // A new user namespace comes with a full set of everything, and an ordinary
    // user without one cannot change its bounding set, nor profit from it:
    // no_new_privs below makes execve(2) grant nothing.
    let current = capabilities(None).step("read capabilities")?;
    if current.effective.contains(CapabilitySet::SETPCAP) {
        empty_bounding_set()?;
    }
    clear_ambient_capability_set().step("clear ambient capabilities")?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).step("drop capabilities")?;
    set_no_new_privs(true).step("set no_new_privs")?;

    limit(Resource::Core, 0).step("forbid core dumps")?;
    limit(Resource::Nofile, max_files).step("limit open files")?;
    // Last, because changing credentials sets it anew.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).step("forbid debuggers")?;
    set_parent_process_death_signal(parent_death).step("keep the parent death signal")
}

fn empty_bounding_set() -> Result<(), Error> {
    for bit in 0..u64::BITS {
        // Asked by number, so that capabilities younger than this code go too.
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match remove_capability_from_bounding_set(capability) {
            Err(Errno::INVAL) => break, // past the kernel's last one
            done => done.step("empty the bounding set")?,
        }
    }
    Ok(())
}

/// Lowers a limit to `most`, for good; one that is lower already stays.
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

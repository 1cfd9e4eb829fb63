//! Namespaces of the process's own and an empty root. See namespaces(7),
//! user_namespaces(7) and pivot_root(2).

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change,
    move_mount, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::{Error, Isolation, Step, privileges};

/// What is left behind, with the names of `/proc/PID/ns`. There is no PID
/// namespace: it would only hold children, and nobody here has any.
const NAMESPACES: [(UnshareFlags, &str); 6] = [
    (UnshareFlags::NEWUSER, "user"),
    (UnshareFlags::NEWNS, "mnt"),
    (UnshareFlags::NEWNET, "net"),
    (UnshareFlags::NEWIPC, "ipc"),
    (UnshareFlags::NEWUTS, "uts"),
    (UnshareFlags::NEWCGROUP, "cgroup"),
];

/// Moves the process into namespaces of its own and, if it is root, makes it an
/// ordinary user on the way; notes in `isolation` what the host granted.
pub(crate) fn leave_host(keep_network: bool, isolation: &mut Isolation) -> Result<(), Error> {
    require_one_thread()?;
    let mut world: UnshareFlags = NAMESPACES.iter().map(|&(flag, _)| flag).collect();
    world.remove(UnshareFlags::NEWUSER);
    if keep_network {
        world.remove(UnshareFlags::NEWNET);
    }
    if privileges::is_root() {
        // Root makes them in its own right, before it stops being root: many a
        // host refuses ordinary users the user namespace it would take later.
        enter(world, isolation)?;
        privileges::become_nobody()?;
    }
    if !isolation.namespaces.is_empty() {
        world = UnshareFlags::empty();
    }
    enter(world | UnshareFlags::NEWUSER, isolation)
}

/// Nothing happens here to a process with one thread, and to another an error:
/// unshare(2) on CLONE_THREAD.
fn require_one_thread() -> Result<(), Error> {
    let thread = UnshareFlags::from_bits_retain(libc::CLONE_THREAD as u32);
    // SAFETY: the descriptor table stays shared (no CLONE_FILES).
    match unsafe { unshare_unsafe(thread) } {
        Err(Errno::INVAL) => Err(Error::Threads),
        done => done.step("see whether there is one thread"),
    }
}

fn enter(flags: UnshareFlags, isolation: &mut Isolation) -> Result<(), Error> {
    // SAFETY: the descriptor table stays shared (no CLONE_FILES).
    match unsafe { unshare_unsafe(flags) } {
        Ok(()) => {
            let entered = NAMESPACES.iter().filter(|(flag, _)| flags.contains(*flag));
            isolation.namespaces.extend(entered.map(|&(_, name)| name));
            if flags.contains(UnshareFlags::NEWNS) {
                isolation.refused = None; // of the first try, if this is the second
                empty_root(isolation)?;
            }
            Ok(())
        }
        // Forbidden; `user.max_*_namespaces` exhausted or 0; a kernel built
        // without one of them.
        Err(errno @ (Errno::PERM | Errno::NOSPC | Errno::USERS | Errno::INVAL)) => {
            isolation.refused = Some(errno.into());
            Ok(())
        }
        Err(errno) => Err(errno).step("make namespaces"),
    }
}

/// Puts an empty read-only file system in the place of the root and lets the
/// host's files go, so that no path leads anywhere.
fn empty_root(isolation: &mut Isolation) -> Result<(), Error> {
    // Without this, root's mounts here would show up on the host as well. Being
    // the first mount call, it is also where we learn that mounting is
    // forbidden to us (AppArmor), or that we live in a chroot, whose root
    // is no mount point. Then Landlock alone closes the file systems.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    match mount_change("/", private) {
        Err(errno @ (Errno::PERM | Errno::ACCESS | Errno::INVAL)) => {
            isolation.refused = Some(errno.into());
            return Ok(());
        }
        done => done.step("keep mounts to itself")?,
    }

    let action = "make an empty root";
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).step(action)?;
    // Room for the root directory and nothing else (0 would mean no limit).
    fsconfig_set_string(&tmpfs, "nr_inodes", "1").step(action)?;
    fsconfig_set_string(&tmpfs, "size", "4k").step(action)?;
    fsconfig_set_string(&tmpfs, "mode", "0555").step(action)?;
    fsconfig_set_flag(&tmpfs, "ro").step(action)?;
    fsconfig_create(&tmpfs).step(action)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).step(action)?;

    // It is mounted over "/" because every host has that directory; pivot_root
    // wants a mount point. With "." for both, the old root lands on top of the
    // new one, from where it is taken off with all that hangs below it.
    let action = "move to the empty root";
    let from_fd = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&root, "", CWD, "/", from_fd).step(action)?;
    fchdir(&root).step(action)?;
    pivot_root(".", ".").step(action)?;
    unmount(".", UnmountFlags::DETACH).step("let go of the host's root")?;
    chdir("/").step(action)?;
    isolation.empty_root = true;
    Ok(())
}

//! New namespaces and an empty root for the process. See namespaces(7), user_namespaces(7)
//! and pivot_root(2).

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change,
    move_mount, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::{ActionContext, Isolation, SandboxError, privileges};

/// The namespaces that the process enters, with their names in `/proc/PID/ns`. There is no
/// PID namespace, because that affects only children, and these processes have none.
const NAMESPACES: [(UnshareFlags, &str); 6] = [
    (UnshareFlags::NEWUSER, "user"),
    (UnshareFlags::NEWNS, "mnt"),
    (UnshareFlags::NEWNET, "net"),
    (UnshareFlags::NEWIPC, "ipc"),
    (UnshareFlags::NEWUTS, "uts"),
    (UnshareFlags::NEWCGROUP, "cgroup"),
];

/// Moves the process into new namespaces and, if it is root, changes it to an unprivileged
/// user. Records in `isolation` what the host allowed.
pub(crate) fn leave_host(
    keep_network: bool,
    isolation: &mut Isolation,
) -> Result<(), SandboxError> {
    require_one_thread()?;
    let mut flags: UnshareFlags = NAMESPACES.iter().map(|&(flag, _)| flag).collect();
    flags.remove(UnshareFlags::NEWUSER);
    if keep_network {
        flags.remove(UnshareFlags::NEWNET);
    }
    if privileges::is_root() {
        // Root needs no user namespace for the others, and many hosts refuse user namespaces
        // to ordinary users. So enter the others before giving up root.
        enter(flags, isolation)?;
        privileges::become_unprivileged_user()?;
    }
    if !isolation.namespaces.is_empty() {
        flags = UnshareFlags::empty();
    }
    enter(flags | UnshareFlags::NEWUSER, isolation)
}

/// Fails in a process with several threads: unshare(2) accepts CLONE_THREAD, and does
/// nothing, only in a process with a single thread.
fn require_one_thread() -> Result<(), SandboxError> {
    let thread = UnshareFlags::from_bits_retain(libc::CLONE_THREAD as u32);
    // SAFETY: the descriptor table stays shared (no CLONE_FILES).
    match unsafe { unshare_unsafe(thread) } {
        Err(Errno::INVAL) => Err(SandboxError::Threads),
        done => done.action("check that the process has one thread"),
    }
}

fn enter(flags: UnshareFlags, isolation: &mut Isolation) -> Result<(), SandboxError> {
    // SAFETY: the descriptor table stays shared (no CLONE_FILES).
    match unsafe { unshare_unsafe(flags) } {
        Ok(()) => {
            let entered = NAMESPACES.iter().filter(|(flag, _)| flags.contains(*flag));
            isolation.namespaces.extend(entered.map(|&(_, name)| name));
            if flags.contains(UnshareFlags::NEWNS) {
                isolation.refused = None; // the first of two attempts may have been refused
                empty_root(isolation)?;
            }
            Ok(())
        }
        // Forbidden; or `user.max_*_namespaces` is exhausted or 0; or the kernel was built
        // without one of the namespaces.
        Err(errno @ (Errno::PERM | Errno::NOSPC | Errno::USERS | Errno::INVAL)) => {
            isolation.refused = Some(errno.into());
            Ok(())
        }
        Err(errno) => Err(errno).action("enter new namespaces"),
    }
}

/// Replaces the root with an empty read-only file system and detaches the host's file
/// systems, so that the process can resolve no path.
fn empty_root(isolation: &mut Isolation) -> Result<(), SandboxError> {
    // Without this, the mounts below would propagate to the host. As the first mount call, it
    // also fails if mounting is forbidden (AppArmor) or if the process is in a chroot, whose
    // root is not a mount point. Then only Landlock keeps the process from the file systems.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    match mount_change("/", private) {
        Err(errno @ (Errno::PERM | Errno::ACCESS | Errno::INVAL)) => {
            isolation.refused = Some(errno.into());
            return Ok(());
        }
        done => done.action("make mounts private")?,
    }

    let action = "create an empty root";
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).action(action)?;
    // One inode is enough for the root directory; 0 would mean no limit.
    fsconfig_set_string(&tmpfs, "nr_inodes", "1").action(action)?;
    fsconfig_set_string(&tmpfs, "size", "4k").action(action)?;
    fsconfig_set_string(&tmpfs, "mode", "0555").action(action)?;
    fsconfig_set_flag(&tmpfs, "ro").action(action)?;
    fsconfig_create(&tmpfs).action(action)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).action(action)?;

    // pivot_root needs a mount point, and every host has the directory "/", so the new root is
    // mounted over it. With "." as both arguments the old root ends up on top of the new one,
    // where the unmount below detaches it with everything mounted under it.
    let action = "move to the empty root";
    let from_fd = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&root, "", CWD, "/", from_fd).action(action)?;
    fchdir(&root).action(action)?;
    pivot_root(".", ".").action(action)?;
    unmount(".", UnmountFlags::DETACH).action("detach the host's root")?;
    chdir("/").action(action)?;
    isolation.empty_root = true;
    Ok(())
}

//! Stage 1 without stage 2: what the process can observe about itself, and what root observes
//! from outside.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::thread;

use outrigger_sandbox::{Policy, SandboxError, SandboxMode, isolate};
use rustix::fs::{Mode as Permissions, OFlags, open, openat};
use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Resource, Signal, dumpable_behavior, getegid, geteuid, getgroups, getrlimit,
    parent_process_death_signal, set_parent_process_death_signal, test_kill_process,
};
use rustix::thread::{capabilities, capability_is_in_ambient_set, no_new_privs};

use crate::{POLICY, ProbeEnd, RunAs, SandboxProbe, sealed_only, start_waiting};

pub const FROM_WITHIN: &str = "isolate: as seen from within";
pub const FROM_OUTSIDE: &str = "isolate: as seen from outside";

const ALL: [&str; 6] = ["cgroup", "ipc", "mnt", "net", "user", "uts"];
const UNPRIVILEGED_ID: u32 = 65534;

const fn works(name: &'static str, run: fn()) -> SandboxProbe {
    SandboxProbe {
        name,
        run,
        end: ProbeEnd::Success,
    }
}

pub const PROBES: &[SandboxProbe] = &[
    works(FROM_WITHIN, check_from_within),
    works(FROM_OUTSIDE, wait_for_end_of_input),
    works("isolate: fails with a second thread", || {
        let (_keep, wait) = std::sync::mpsc::channel::<()>();
        thread::spawn(move || wait.recv());
        assert!(matches!(
            isolate(&POLICY, SandboxMode::Enforce),
            Err(SandboxError::Threads)
        ));
    }),
    works(
        "isolate: Landlock forbids connecting to abstract sockets",
        || {
            static NETWORK: Policy = Policy {
                process: "probe",
                syscalls: &[],
                keep_network: true,
                max_files: 64,
            };
            let name = format!("outrigger-isolation-{}", std::process::id());
            let address = SocketAddr::from_abstract_name(name).unwrap();
            let _listener = UnixListener::bind_addr(&address).unwrap();
            UnixStream::connect_addr(&address).unwrap();
            let isolation = isolate(&NETWORK, SandboxMode::Enforce).unwrap();
            assert!(!isolation.namespaces.contains(&"net"));
            if isolation.landlock_abi >= 6 {
                let error = UnixStream::connect_addr(&address).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
            }
        },
    ),
    works(
        "isolate: Landlock forbids signals to other processes",
        || {
            let other = fork_helper();
            let isolation = isolate(&POLICY, SandboxMode::Enforce).unwrap();
            if isolation.landlock_abi >= 6 {
                assert_eq!(test_kill_process(other), Err(Errno::PERM));
            }
        },
    ),
];

fn check_from_within() {
    let start = std::env::args().nth(3).unwrap();
    let was_root = geteuid().is_root();
    let old_root = open("/", OFlags::PATH | OFlags::DIRECTORY, Permissions::empty()).unwrap();
    set_parent_process_death_signal(Some(Signal::TERM)).unwrap();

    let isolation = isolate(&POLICY, SandboxMode::Enforce).unwrap();
    eprintln!("{isolation}");

    let mut namespaces = isolation.namespaces.clone();
    namespaces.sort_unstable();
    if start == format!("{:?}", RunAs::WithoutUserNamespaces) {
        assert_eq!(
            isolation.refused.unwrap().raw_os_error(),
            Some(libc::ENOSPC)
        );
        assert!(namespaces.is_empty() && !isolation.empty_root);
        assert_eq!(isolation.uid, 1000);
    } else if was_root || isolation.refused.is_none() {
        assert!(isolation.refused.is_none());
        assert_eq!(namespaces, ALL);
        assert!(isolation.empty_root);
        // The root is empty, not only unreadable. With Landlock it cannot be listed.
        if isolation.landlock_abi == 0 {
            assert_eq!(fs::read_dir("/").unwrap().count(), 0);
        }
        // A user namespace without a mapping shows every user as this id.
        assert_eq!(isolation.uid, UNPRIVILEGED_ID);
    }

    assert!(!geteuid().is_root() && !getegid().is_root());
    if was_root {
        assert!(getgroups().unwrap().iter().all(|group| !group.is_root()));
    }
    let sets = capabilities(None).unwrap();
    assert!(sets.effective.is_empty() && sets.permitted.is_empty() && sets.inheritable.is_empty());
    let known = rustix::thread::CapabilitySet::all().iter();
    for capability in known.filter(|one| one.bits().count_ones() == 1) {
        assert_ne!(capability_is_in_ambient_set(capability), Ok(true));
    }
    assert!(no_new_privs().unwrap());
    assert_eq!(dumpable_behavior(), Ok(DumpableBehavior::NotDumpable));
    assert_eq!(getrlimit(Resource::Core).maximum, Some(0));
    assert_eq!(getrlimit(Resource::Nofile).maximum, Some(64));
    assert_eq!(parent_process_death_signal(), Ok(Some(Signal::TERM)));

    // No path leads to a file, and neither does a descriptor of the old root.
    for path in ["/etc/passwd", "/proc/self/status", "/", "."] {
        File::open(path).unwrap_err();
    }
    fs::write("/new", "").unwrap_err();
    if isolation.landlock_abi > 0 {
        let read = openat(
            &old_root,
            "etc/passwd",
            OFlags::RDONLY,
            Permissions::empty(),
        );
        assert_eq!(read.unwrap_err(), Errno::ACCESS);
    }
    // SAFETY: the descriptor table stays shared (no CLONE_FILES).
    let again = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
    assert_eq!(again, Err(Errno::PERM));
    rustix::thread::set_thread_uid(rustix::process::Uid::ROOT).unwrap_err();
}

/// Seals the process with a second thread running, and waits to be inspected from outside.
fn wait_for_end_of_input() {
    isolate(&POLICY, SandboxMode::Enforce).unwrap();
    let (_keep, wait) = std::sync::mpsc::channel::<()>();
    thread::spawn(move || wait.recv());
    sealed_only();
    io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// Inspects a sealed process. This needs root, because no other user may inspect it.
pub fn check_from_outside(start: RunAs) -> Result<(), String> {
    let mut child = start_waiting(FROM_OUTSIDE, start)?;
    let result = check_process(child.id());
    drop(child.stdin.take()); // the end of its input
    let status = child.wait().map_err(|error| error.to_string())?;
    result.map_err(|error| error.to_string())??;
    status.success().then_some(()).ok_or(status.to_string())
}

fn check_process(pid: u32) -> io::Result<Result<(), String>> {
    for name in ALL {
        let namespace = fs::read_link(format!("/proc/{pid}/ns/{name}"))?;
        if namespace == fs::read_link(format!("/proc/self/ns/{name}"))? {
            return Ok(Err(format!("it is in the {name} namespace of the tests")));
        }
    }
    if fs::read_dir(format!("/proc/{pid}/root"))?.next().is_some() {
        return Ok(Err("its root is not empty".into()));
    }
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    if mounts.lines().count() != 1 || !mounts.contains(" / / ro,nosuid,nodev,noexec") {
        return Ok(Err(format!("it has other mounts: {mounts}")));
    }
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let unprivileged =
            format!("{UNPRIVILEGED_ID}\t{UNPRIVILEGED_ID}\t{UNPRIVILEGED_ID}\t{UNPRIVILEGED_ID}");
        for (field, value) in [
            ("Uid", unprivileged.as_str()),
            ("Gid", unprivileged.as_str()),
            ("Groups", ""),
            ("CapInh", "0000000000000000"),
            ("CapPrm", "0000000000000000"),
            ("CapEff", "0000000000000000"),
            ("CapBnd", "0000000000000000"),
            ("CapAmb", "0000000000000000"),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
        ] {
            let is = status
                .lines()
                .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
                .map(str::trim);
            if is != Some(value) {
                return Ok(Err(format!("{field} is {is:?} and not {value:?}")));
            }
        }
    }
    Ok(Ok(()))
}

/// Starts a process of the same user that ends when the caller ends.
fn fork_helper() -> rustix::process::Pid {
    let (mut reader, writer) = io::pipe().unwrap();
    // SAFETY: the caller has one thread, so the child may call any function.
    match unsafe { libc::fork() } {
        0 => {
            drop(writer);
            let _ = reader.read(&mut [0]);
            // SAFETY: ends the helper without running the exit handlers of its parent.
            unsafe { libc::_exit(0) }
        }
        pid => {
            std::mem::forget(writer); // open until the caller ends
            rustix::process::Pid::from_raw(pid).unwrap()
        }
    }
}

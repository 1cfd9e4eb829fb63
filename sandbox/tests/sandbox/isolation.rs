//! Stage 1 without stage 2: what the process sees of itself, and what root
//! sees of it from outside.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::thread;

use outrigger_sandbox::{Error, Mode, Policy, isolate};
use rustix::fs::{Mode as Permissions, OFlags, open, openat};
use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Resource, Signal, dumpable_behavior, getegid, geteuid, getgroups, getrlimit,
    parent_process_death_signal, set_parent_process_death_signal, test_kill_process,
};
use rustix::thread::{capabilities, capability_is_in_ambient_set, no_new_privs};

use crate::{As, End, POLICY, Probe, sealed_only, start_waiting};

pub const FROM_WITHIN: &str = "isolate: as seen from within";
pub const FROM_OUTSIDE: &str = "isolate: as seen from outside";

const ALL: [&str; 6] = ["cgroup", "ipc", "mnt", "net", "user", "uts"];
const NOBODY: u32 = 65534;

const fn works(name: &'static str, run: fn()) -> Probe {
    Probe {
        name,
        run,
        end: End::Well,
    }
}

pub const PROBES: &[Probe] = &[
    works(FROM_WITHIN, look_from_within),
    works(FROM_OUTSIDE, wait_for_end_of_input),
    works("isolate: too late with a second thread", || {
        let (_keep, wait) = std::sync::mpsc::channel::<()>();
        thread::spawn(move || wait.recv());
        assert!(matches!(
            isolate(&POLICY, Mode::Enforce),
            Err(Error::Threads)
        ));
    }),
    works("isolate: Landlock keeps abstract sockets away", || {
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
        let isolation = isolate(&NETWORK, Mode::Enforce).unwrap();
        assert!(!isolation.namespaces.contains(&"net"));
        if isolation.landlock_abi >= 6 {
            let error = UnixStream::connect_addr(&address).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
    }),
    works("isolate: Landlock keeps signals in", || {
        let other = fork_helper();
        let isolation = isolate(&POLICY, Mode::Enforce).unwrap();
        if isolation.landlock_abi >= 6 {
            assert_eq!(test_kill_process(other), Err(Errno::PERM));
        }
    }),
];

fn look_from_within() {
    let start = std::env::args().nth(3).unwrap();
    let was_root = geteuid().is_root();
    let old_root = open("/", OFlags::PATH | OFlags::DIRECTORY, Permissions::empty()).unwrap();
    set_parent_process_death_signal(Some(Signal::TERM)).unwrap();

    let isolation = isolate(&POLICY, Mode::Enforce).unwrap();
    eprintln!("{isolation}");

    let mut namespaces = isolation.namespaces.clone();
    namespaces.sort_unstable();
    if start == format!("{:?}", As::WithoutUserNamespaces) {
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
        // Not just unreadable: nothing is there, nor can be made.
        if isolation.landlock_abi == 0 {
            assert_eq!(fs::read_dir("/").unwrap().count(), 0);
        }
        // What a namespace without a map calls everyone.
        assert_eq!(isolation.uid, NOBODY);
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

    // By path there is nothing, and by an old descriptor no way in.
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
    // SAFETY: no CLONE_FILES.
    let again = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
    assert_eq!(again, Err(Errno::PERM));
    rustix::thread::set_thread_uid(rustix::process::Uid::ROOT).unwrap_err();
}

/// Seals itself with a second thread there, and stays for a look from outside.
fn wait_for_end_of_input() {
    isolate(&POLICY, Mode::Enforce).unwrap();
    let (_keep, wait) = std::sync::mpsc::channel::<()>();
    thread::spawn(move || wait.recv());
    sealed_only();
    io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// Takes root, as such a process belongs to nobody.
pub fn look_from_outside(start: As) -> Result<(), String> {
    let mut child = start_waiting(FROM_OUTSIDE, start)?;
    let seen = look_at(child.id());
    drop(child.stdin.take()); // the end of its input
    let status = child.wait().map_err(|error| error.to_string())?;
    seen.map_err(|error| error.to_string())??;
    status.success().then_some(()).ok_or(status.to_string())
}

fn look_at(pid: u32) -> io::Result<Result<(), String>> {
    for name in ALL {
        let theirs = fs::read_link(format!("/proc/{pid}/ns/{name}"))?;
        if theirs == fs::read_link(format!("/proc/self/ns/{name}"))? {
            return Ok(Err(format!("its {name} namespace is ours")));
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
        let nobody = format!("{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}");
        for (field, value) in [
            ("Uid", nobody.as_str()),
            ("Gid", nobody.as_str()),
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

/// A process of the same user that is gone when the caller is.
fn fork_helper() -> rustix::process::Pid {
    let (mut reader, writer) = io::pipe().unwrap();
    // SAFETY: the caller has one thread.
    match unsafe { libc::fork() } {
        0 => {
            drop(writer);
            let _ = reader.read(&mut [0]);
            // SAFETY: ends the helper, without running what its parent set up.
            unsafe { libc::_exit(0) }
        }
        pid => {
            std::mem::forget(writer); // open until the caller ends
            rustix::process::Pid::from_raw(pid).unwrap()
        }
    }
}

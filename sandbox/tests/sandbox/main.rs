//! Tries what the sandbox forbids, and does what it allows, for real.
//!
//! Each probe is this program started anew with the probe's name, because a
//! process has to be single-threaded to isolate itself and most probes end by a
//! signal. It is started as whoever runs the tests and, if that is root, as
//! nobody as well; `isolate` is also tried on a host without user namespaces.

mod allowed;
mod denied;
mod isolation;

use std::io::{BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, Stdio};
use std::{env, fs, io};

use outrigger_sandbox::{BASE, Check, Mode, Policy, Rule, SOCKET, VHOST_USER, isolate, seal};

/// One thing to try.
struct Probe {
    name: &'static str,
    run: fn(),
    end: End,
}

/// How the process of a probe ends if the sandbox is right.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    /// Exit code 0.
    Well,
    /// By one of these signals, after `sealed`.
    Signal(&'static [i32]),
}

const KILLED: End = End::Signal(&[libc::SIGSYS]);

/// Who starts the probe.
#[derive(Clone, Copy, Debug, PartialEq)]
enum As {
    /// Whoever runs the tests; root is in a supplementary group, to be left.
    Tester,
    Nobody,
    /// Root of a user namespace in which there is no other user.
    OnlyRoot,
    /// An ordinary user on a host that lets no such user make user namespaces.
    WithoutUserNamespaces,
}

impl As {
    /// Whether an ordinary tester may be refused the making of it.
    fn needs_rights(self) -> bool {
        let ordinary = !rustix::process::geteuid().is_root();
        ordinary && matches!(self, Self::OnlyRoot | Self::WithoutUserNamespaces)
    }
}

/// A device process with a disk image and a terminal.
static POLICY: Policy = Policy {
    process: "probe",
    syscalls: &[
        BASE,
        SOCKET,
        VHOST_USER,
        &[
            Rule::any(libc::SYS_pread64),
            Rule::any(libc::SYS_pwrite64),
            Rule::any(libc::SYS_fdatasync),
            Rule::when(
                libc::SYS_ioctl,
                &[Check::OneOf(1, &[libc::FIONREAD as u32])],
            ),
        ],
    ],
    keep_network: false,
    max_files: 64,
};

/// Both stages; the line on stdout tells the tester that what follows is the test.
fn sealed() {
    isolate(&POLICY, Mode::Enforce).unwrap();
    sealed_only();
}

fn sealed_only() {
    seal(&POLICY, Mode::Enforce).unwrap();
    println!("sealed");
}

fn probes() -> impl Iterator<Item = &'static Probe> {
    [denied::PROBES, allowed::PROBES, isolation::PROBES]
        .into_iter()
        .flatten()
}

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    if let [word, name, _start] = &words[..]
        && word == "probe"
    {
        // SAFETY: no handler is set; a probe that hangs ends by SIGALRM.
        unsafe { libc::alarm(30) };
        let probe = probes().find(|probe| probe.name == name).unwrap();
        (probe.run)();
        return ExitCode::SUCCESS;
    }

    // What test runners ask to learn which tests there are: each probe is one.
    if words.iter().any(|word| word == "--list") {
        if !words.iter().any(|word| word == "--ignored") {
            for probe in probes() {
                println!("{}: test", probe.name);
            }
        }
        return ExitCode::SUCCESS;
    }
    let exact = words.iter().any(|word| word == "--exact");
    let root = rustix::process::geteuid().is_root();
    let wanted = |name: &str| {
        let mut filters = words
            .iter()
            .filter(|word| !word.starts_with('-'))
            .peekable();
        filters.peek().is_none()
            || filters.any(|filter| {
                if exact {
                    name == filter
                } else {
                    name.contains(filter.as_str())
                }
            })
    };
    let (mut done, mut failed) = (0, 0);
    for probe in probes().filter(|probe| wanted(probe.name)) {
        let starts: &[As] = match (probe.name, root) {
            (isolation::FROM_WITHIN, true) => &[
                As::Tester,
                As::Nobody,
                As::OnlyRoot,
                As::WithoutUserNamespaces,
            ],
            (isolation::FROM_WITHIN, false) => {
                &[As::Tester, As::OnlyRoot, As::WithoutUserNamespaces]
            }
            (_, true) => &[As::Tester, As::Nobody],
            (_, false) => &[As::Tester],
        };
        for &start in starts {
            let result = match probe.name {
                isolation::FROM_OUTSIDE if root => isolation::look_from_outside(start),
                isolation::FROM_OUTSIDE => continue, // only root may look
                _ => run(probe, start),
            };
            done += 1;
            match result {
                Ok(()) => println!("{} (as {start:?}) ... ok", probe.name),
                Err(why) => {
                    failed += 1;
                    println!("{} (as {start:?}) ... FAILED: {why}", probe.name);
                }
            }
        }
    }
    println!("{} of {done} probes passed", done - failed);
    ExitCode::from(u8::from(failed > 0))
}

fn run(probe: &Probe, start: As) -> Result<(), String> {
    let output = match command(probe.name, start).stdin(Stdio::null()).output() {
        // On a host like the one that is to be imitated.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && start.needs_rights() => {
            println!("{}: not tried as {start:?}: {error}", probe.name);
            return Ok(());
        }
        output => output.map_err(|error| format!("cannot start: {error}"))?,
    };
    let stdout = String::from_utf8_lossy(&output.stdout);
    let good = match probe.end {
        End::Well => output.status.success(),
        End::Signal(signals) => {
            stdout.ends_with("sealed\n")
                && output.status.signal().is_some_and(|s| signals.contains(&s))
        }
    };
    if good {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(format!(
        "{} instead of {:?}\n{stdout}{stderr}",
        output.status, probe.end
    ))
}

/// This program again, whether or not nobody may search the path it lies in.
fn command(probe: &str, start: As) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["probe", probe, &format!("{start:?}")])
        .env_remove("RUST_BACKTRACE");
    match start {
        As::Tester => {
            let join_group = || {
                if rustix::process::geteuid().is_root() {
                    let group = rustix::process::Gid::from_raw(4242);
                    rustix::thread::set_thread_groups(&[group])?;
                }
                Ok(())
            };
            // SAFETY: the tester has one thread, so its child may do anything.
            unsafe { command.pre_exec(join_group) };
        }
        As::Nobody => {
            command.uid(65534).gid(65534);
        }
        As::OnlyRoot => {
            // SAFETY: as above.
            unsafe { command.pre_exec(|| user_namespace(0)) };
        }
        As::WithoutUserNamespaces => {
            let refuse = || {
                user_namespace(1000)?;
                fs::write("/proc/sys/user/max_user_namespaces", "0")
            };
            // SAFETY: as above.
            unsafe { command.pre_exec(refuse) };
        }
    }
    command
}

/// Moves to a user namespace where the caller is `uid` and nobody else exists.
fn user_namespace(uid: u32) -> io::Result<()> {
    let (outer_uid, outer_gid) = (rustix::process::geteuid(), rustix::process::getegid());
    // SAFETY: no CLONE_FILES.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWUSER)? };
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{uid} {outer_uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("{uid} {outer_gid} 1"))
}

/// Starts a probe that says "sealed" and then waits for the end of its stdin.
fn start_waiting(probe: &str, start: As) -> Result<Child, String> {
    let mut child = command(probe, start)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start: {error}"))?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.as_mut() {
        // A probe that never says it is ended by its alarm, and this read with it.
        BufReader::new(stdout)
            .read_line(&mut line)
            .map_err(|error| error.to_string())?;
    }
    if line == "sealed\n" {
        return Ok(child);
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    Err(format!("it never was sealed: {status}"))
}

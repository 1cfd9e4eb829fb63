//! Tries what the sandbox forbids and does what it allows, in real processes.
//!
//! Each probe is a new process of this program, because a process must be single-threaded to
//! isolate itself and because a signal ends most probes. It runs as the user that runs the
//! tests and, if that is root, also as an unprivileged user. `isolate` is also tested on a
//! host that refuses user namespaces.

mod allowed;
mod denied;
mod isolation;

use std::io::{BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, Stdio};
use std::{env, fs, io};

use outrigger_sandbox::{
    BASE, Check, Policy, Rule, SOCKET, SandboxMode, VHOST_USER, isolate, seal,
};

/// One action to try in a sandboxed process.
struct SandboxProbe {
    name: &'static str,
    run: fn(),
    end: ProbeEnd,
}

/// How the process of a probe ends if the sandbox works.
#[derive(Clone, Copy, Debug, PartialEq)]
enum ProbeEnd {
    /// Exit code 0.
    Success,
    /// Killed by one of these signals, after `sealed`.
    Signal(&'static [i32]),
}

const KILLED: ProbeEnd = ProbeEnd::Signal(&[libc::SIGSYS]);

/// The user that a probe runs as.
#[derive(Clone, Copy, Debug, PartialEq)]
enum RunAs {
    /// The user that runs the tests. Root is put into a supplementary group, which it must
    /// leave.
    Tester,
    /// The user and group that own nothing.
    Unprivileged,
    /// Root of a user namespace that maps no other user.
    OnlyRoot,
    /// An ordinary user on a host that refuses user namespaces to ordinary users.
    WithoutUserNamespaces,
}

impl RunAs {
    /// Whether the host may refuse an ordinary user what this needs.
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

/// Performs both stages. The line on stdout tells the parent that the probe itself begins.
fn sealed() {
    isolate(&POLICY, SandboxMode::Enforce).unwrap();
    sealed_only();
}

fn sealed_only() {
    seal(&POLICY, SandboxMode::Enforce).unwrap();
    println!("sealed");
}

fn probes() -> impl Iterator<Item = &'static SandboxProbe> {
    [denied::PROBES, allowed::PROBES, isolation::PROBES]
        .into_iter()
        .flatten()
}

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    if let [word, name, _start] = &words[..]
        && word == "probe"
    {
        // SAFETY: no handler is installed. SIGALRM ends a probe that hangs.
        unsafe { libc::alarm(30) };
        let probe = probes().find(|probe| probe.name == name).unwrap();
        (probe.run)();
        return ExitCode::SUCCESS;
    }

    // Test runners ask for the list of tests; each probe is one.
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
        let starts: &[RunAs] = match (probe.name, root) {
            (isolation::FROM_WITHIN, true) => &[
                RunAs::Tester,
                RunAs::Unprivileged,
                RunAs::OnlyRoot,
                RunAs::WithoutUserNamespaces,
            ],
            (isolation::FROM_WITHIN, false) => {
                &[RunAs::Tester, RunAs::OnlyRoot, RunAs::WithoutUserNamespaces]
            }
            (_, true) => &[RunAs::Tester, RunAs::Unprivileged],
            (_, false) => &[RunAs::Tester],
        };
        for &start in starts {
            let result = match probe.name {
                isolation::FROM_OUTSIDE if root => isolation::check_from_outside(start),
                isolation::FROM_OUTSIDE => continue, // only root can inspect the process
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

fn run(probe: &SandboxProbe, start: RunAs) -> Result<(), String> {
    let output = match command(probe.name, start).stdin(Stdio::null()).output() {
        // The host itself refuses user namespaces to ordinary users.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && start.needs_rights() => {
            println!("{}: not tried as {start:?}: {error}", probe.name);
            return Ok(());
        }
        output => output.map_err(|error| format!("cannot start: {error}"))?,
    };
    let stdout = String::from_utf8_lossy(&output.stdout);
    let good = match probe.end {
        ProbeEnd::Success => output.status.success(),
        ProbeEnd::Signal(signals) => {
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

/// Returns the command that runs `probe`. `/proc/self/exe` works even where the unprivileged
/// user may not search the directory of this program.
fn command(probe: &str, start: RunAs) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["probe", probe, &format!("{start:?}")])
        .env_remove("RUST_BACKTRACE");
    match start {
        RunAs::Tester => {
            let join_group = || {
                if rustix::process::geteuid().is_root() {
                    let group = rustix::process::Gid::from_raw(4242);
                    rustix::thread::set_thread_groups(&[group])?;
                }
                Ok(())
            };
            // SAFETY: this process has one thread, so its child may call any function.
            unsafe { command.pre_exec(join_group) };
        }
        RunAs::Unprivileged => {
            command.uid(65534).gid(65534);
        }
        RunAs::OnlyRoot => {
            // SAFETY: as above.
            unsafe { command.pre_exec(|| user_namespace(0)) };
        }
        RunAs::WithoutUserNamespaces => {
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

/// Moves to a user namespace that maps only the caller, as `uid`.
fn user_namespace(uid: u32) -> io::Result<()> {
    let (outer_uid, outer_gid) = (rustix::process::geteuid(), rustix::process::getegid());
    // SAFETY: the descriptor table stays shared (no CLONE_FILES).
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWUSER)? };
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{uid} {outer_uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("{uid} {outer_gid} 1"))
}

/// Starts a probe that prints "sealed" and then waits for the end of its stdin.
fn start_waiting(probe: &str, start: RunAs) -> Result<Child, String> {
    let mut child = command(probe, start)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start: {error}"))?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.as_mut() {
        // If the probe never prints it, its alarm ends the probe and this read.
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

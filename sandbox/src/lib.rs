//! What an outrigger process does to itself before it talks to anyone: it gives
//! up everything it does not need for its work.
//!
//! A process opens its files and its socket first and then calls, in this order,
//!
//! 1. [`isolate`], while it has one thread: an unprivileged user, namespaces of
//!    its own, an empty read-only root, no capabilities, Landlock allowing nothing;
//! 2. [`seal`], once its threads run: a seccomp allow-list, and whoever makes
//!    another system call is killed.
//!
//! Open descriptors keep working through both. What a process may still do is
//! its [`Policy`]; the tables here ([`BASE`], [`SOCKET`], [`LISTENER`],
//! [`VHOST_USER`]) hold what they all share, and a device keeps a table of its
//! own beside its `main`. `vcpu-runner` uses [`seal`] alone.
//!
//! ```no_run
//! use outrigger_sandbox::{BASE, Mode, Policy, Rule, SOCKET, VHOST_USER, isolate, seal};
//!
//! static POLICY: Policy = Policy {
//!     process: "device-disk",
//!     syscalls: &[BASE, SOCKET, VHOST_USER, &[Rule::any(libc::SYS_preadv)]],
//!     keep_network: false,
//!     max_files: 256,
//! };
//!
//! # fn main() -> Result<(), outrigger_sandbox::Error> {
//! let mode: Mode = "on".parse()?; // --sandbox
//! // ... open the image and the socket ...
//! eprintln!("{}", isolate(&POLICY, mode)?);
//! // ... start the threads ...
//! seal(&POLICY, mode)?;
//! // ... serve ...
//! # Ok(())
//! # }
//! ```

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("the system call tables are written for Linux on x86-64");

mod landlock;
mod namespaces;
mod policy;
mod privileges;
mod seccomp;

use std::{fmt, io, str::FromStr};

pub use self::landlock::remove_files_only_in;
pub use policy::{BASE, Check, LISTENER, Policy, Rule, SOCKET, VHOST_USER};
pub use seccomp::seal;

/// How strict the sandbox is: the value of `--sandbox`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// `on`: a system call outside the policy kills the process (SIGSYS).
    #[default]
    Enforce,
    /// `log`: such a call is let through and written to the kernel's audit log.
    /// For working on a policy; everything but seccomp is in force all the same.
    Log,
    /// `off`: [`isolate`] and [`seal`] do nothing.
    Off,
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self, Error> {
        match word {
            "on" => Ok(Self::Enforce),
            "log" => Ok(Self::Log),
            "off" => Ok(Self::Off),
            _ => Err(Error::Mode(word.to_owned())),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enforce => "on",
            Self::Log => "log",
            Self::Off => "off",
        })
    }
}

/// Why a process could not be sandboxed. It should not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a step that nothing may stand in for.
    #[error("sandbox: cannot {action}: {cause}")]
    Step {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// [`isolate`] was called after a thread had been started.
    #[error("sandbox: a process isolates itself before it starts threads, and this one has some")]
    Threads,
    /// The kernel has Landlock and would not take the rule set.
    #[error("sandbox: cannot apply Landlock: {0}")]
    Landlock(#[from] ::landlock::RulesetError),
    /// A policy names a system call twice, so that one of the rules would
    /// silently widen the other.
    #[error("sandbox: the policy of {process} has two rules for system call {syscall}")]
    DuplicateRule {
        /// [`Policy::process`].
        process: &'static str,
        /// The number of the call.
        syscall: libc::c_long,
    },
    /// A policy that is no valid filter: an argument number over 5, too long.
    #[error("sandbox: the policy of {process} is no seccomp filter: {cause}")]
    Filter {
        /// [`Policy::process`].
        process: &'static str,
        /// What the filter compiler says.
        cause: seccompiler::BackendError,
    },
    /// The kernel would not take the filter.
    #[error("sandbox: cannot install the seccomp filter: {0}")]
    Seccomp(seccompiler::Error),
    /// Not a value of `--sandbox`.
    #[error("sandbox is {0:?}, but must be on, log or off")]
    Mode(String),
}

/// Names the step whose system call failed.
trait Step<T> {
    fn step(self, action: &'static str) -> Result<T, Error>;
}

impl<T> Step<T> for rustix::io::Result<T> {
    fn step(self, action: &'static str) -> Result<T, Error> {
        self.map_err(|errno| Error::Step {
            action,
            cause: errno.into(),
        })
    }
}

/// What [`isolate`] achieved on this host. Displayed, it is one line for the log.
#[derive(Debug, Default)]
pub struct Isolation {
    /// [`Mode::Off`] leaves all the rest as it was.
    pub mode: Mode,
    /// The user the process runs as now, as its user namespace numbers it.
    pub uid: u32,
    /// Namespaces of its own, by their names in `/proc/PID/ns`.
    pub namespaces: Vec<&'static str>,
    /// The root directory is an empty read-only file system.
    pub empty_root: bool,
    /// The Landlock ABI in force; 0 on a kernel without Landlock.
    pub landlock_abi: u32,
    /// Why `namespaces` or `empty_root` is less than all: this host's answer.
    pub refused: Option<io::Error>,
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.mode == Mode::Off {
            return f.write_str("sandbox off: this process may do all that its user may");
        }
        write!(f, "sandbox {}: uid {}, namespaces", self.mode, self.uid)?;
        if self.namespaces.is_empty() {
            f.write_str(" none")?;
        }
        for name in &self.namespaces {
            write!(f, " {name}")?;
        }
        f.write_str(if self.empty_root {
            ", empty root"
        } else {
            ", root of the host"
        })?;
        match self.landlock_abi {
            0 => f.write_str(", no Landlock in this kernel")?,
            abi => write!(f, ", Landlock ABI {abi}")?,
        }
        match &self.refused {
            Some(errno) => write!(f, "; the host refuses the rest: {errno}"),
            None => Ok(()),
        }
    }
}

/// Stage 1: cuts the calling process off from the host, keeping what it has open.
///
/// Call it **before the first thread is started**: the kernel gives a user
/// namespace only to a process with one thread (unshare(2)), and user ids,
/// capabilities and Landlock bind the calling thread and those it starts later,
/// not its siblings. The order inside matters as well: namespaces take
/// capabilities, so these go afterwards, and Landlock comes last because it
/// forbids mounting.
///
/// A host may refuse namespaces to ordinary users (a sysctl, AppArmor, a
/// container's own seccomp filter), and an old kernel may lack Landlock. Then
/// the process goes on without, and [`Isolation`] says so.
///
/// # Errors
/// [`Error::Threads`] if it comes too late; every other failure that is not the
/// kind of refusal above. The process is then half isolated and should exit.
pub fn isolate(policy: &Policy, mode: Mode) -> Result<Isolation, Error> {
    let mut isolation = Isolation {
        mode,
        ..Isolation::default()
    };
    if mode != Mode::Off {
        let parent_death = privileges::parent_death_signal()?;
        namespaces::leave_host(policy.keep_network, &mut isolation)?;
        privileges::give_up(policy.max_files, parent_death)?;
        isolation.landlock_abi = landlock::allow_nothing()?;
    }
    isolation.uid = rustix::process::geteuid().as_raw();
    Ok(isolation)
}

//! How a process of outrigger confines itself before it talks to its peer: it gives up
//! every right that it does not need.
//!
//! A process first opens its files and its socket and then calls two functions, in this
//! order:
//!
//! 1. [`isolate`], while it has a single thread: changes to an unprivileged user, enters
//!    namespaces of its own with an empty read-only root, drops all capabilities and applies
//!    a Landlock rule set that allows nothing.
//! 2. [`seal`], once its threads run: installs a seccomp allow-list. Any other system call
//!    kills the process.
//!
//! Open descriptors keep working after both. The [`Policy`] of a process lists what it may
//! still do. The tables in this crate ([`BASE`], [`SOCKET`], [`LISTENER`], [`VHOST_USER`])
//! hold the system calls that several processes need; each device program has a table of its
//! own beside its `main`. `vcpu-runner` uses only [`seal`].
//!
//! ```no_run
//! use outrigger_sandbox::{BASE, SandboxMode, Policy, Rule, SOCKET, VHOST_USER, isolate, seal};
//!
//! static POLICY: Policy = Policy {
//!     process: "device-disk",
//!     syscalls: &[BASE, SOCKET, VHOST_USER, &[Rule::any(libc::SYS_preadv)]],
//!     keep_network: false,
//!     max_files: 256,
//! };
//!
//! # fn main() -> Result<(), outrigger_sandbox::SandboxError> {
//! let mode: SandboxMode = "on".parse()?; // --sandbox
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

use serde::Deserialize;

pub use self::landlock::remove_files_only_in;
pub use policy::{BASE, Check, LISTENER, Policy, Rule, SOCKET, VHOST_USER};
pub use seccomp::seal;

/// The value of `--sandbox`.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
pub enum SandboxMode {
    /// `on`: a system call outside the policy kills the process (SIGSYS).
    #[default]
    #[serde(rename = "on")]
    Enforce,
    /// `log`: a system call outside the policy is allowed and written to the kernel's audit
    /// log. This helps to develop a policy. [`isolate`] works as with `on`.
    #[serde(rename = "log")]
    Log,
    /// `off`: [`isolate`] and [`seal`] do nothing.
    #[serde(rename = "off")]
    Off,
}

impl FromStr for SandboxMode {
    type Err = SandboxError;

    fn from_str(word: &str) -> Result<Self, SandboxError> {
        match word {
            "on" => Ok(Self::Enforce),
            "log" => Ok(Self::Log),
            "off" => Ok(Self::Off),
            _ => Err(SandboxError::InvalidMode),
        }
    }
}

impl fmt::Display for SandboxMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enforce => "on",
            Self::Log => "log",
            Self::Off => "off",
        })
    }
}

/// Why a process could not be sandboxed. The process should exit.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A required system call failed.
    #[error("sandbox: cannot {action}: {cause}")]
    Step {
        /// The purpose of the system call, to complete "cannot …".
        action: &'static str,
        /// The error that the kernel returned.
        cause: io::Error,
    },
    /// [`isolate`] was called in a process with several threads.
    #[error("sandbox: the process has several threads: call isolate before starting any")]
    Threads,
    /// The kernel has Landlock, but rejected the rule set.
    #[error("sandbox: cannot apply Landlock: {0}")]
    Landlock(#[from] ::landlock::RulesetError),
    /// The policy has two rules for a system call: one would silently widen the other.
    #[error("sandbox: the policy of {process} has two rules for system call {syscall}")]
    DuplicateRule {
        /// [`Policy::process`].
        process: &'static str,
        /// The number of the system call.
        syscall: libc::c_long,
    },
    /// The policy cannot be compiled to a filter: an argument number above 5, an empty choice
    /// or too many rules.
    #[error("sandbox: the policy of {process} is not a valid seccomp filter: {cause}")]
    Filter {
        /// [`Policy::process`].
        process: &'static str,
        /// The error of the filter compiler.
        cause: seccompiler::BackendError,
    },
    /// The kernel rejected the filter.
    #[error("sandbox: cannot install the seccomp filter: {0}")]
    Seccomp(seccompiler::Error),
    /// Not a value of `--sandbox`.
    #[error("unknown sandbox mode: use on, log or off")]
    InvalidMode,
}

/// Adds to the error of a system call what the call was for.
trait ActionContext<T> {
    fn action(self, action: &'static str) -> Result<T, SandboxError>;
}

impl<T> ActionContext<T> for rustix::io::Result<T> {
    fn action(self, action: &'static str) -> Result<T, SandboxError> {
        self.map_err(|errno| SandboxError::Step {
            action,
            cause: errno.into(),
        })
    }
}

/// What [`isolate`] achieved on this host. Its `Display` form is one line for the log.
#[derive(Debug, Default)]
pub struct Isolation {
    /// The mode. With [`SandboxMode::Off`], nothing was changed.
    pub mode: SandboxMode,
    /// The user that the process runs as, as seen in its user namespace.
    pub uid: u32,
    /// The namespaces that the process entered, by their names in `/proc/PID/ns`.
    pub namespaces: Vec<&'static str>,
    /// Whether the root directory is an empty read-only file system.
    pub empty_root: bool,
    /// The Landlock ABI in force; 0 in a kernel without Landlock.
    pub landlock_abi: u32,
    /// Why the host refused namespaces or the empty root, if it did.
    pub refused: Option<io::Error>,
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.mode == SandboxMode::Off {
            return f.write_str("sandbox off: this process has all rights of its user");
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

/// Stage 1: isolates the calling process from the host. Open descriptors stay open.
///
/// Call it **before the first thread is started**: the kernel lets only a process with a
/// single thread enter a user namespace (unshare(2)), and changes to user ids, capabilities
/// and Landlock apply to the calling thread and the threads that it starts later. The order
/// of the steps matters as well: entering namespaces needs capabilities, so these are dropped
/// afterwards, and Landlock comes last because it forbids mounting.
///
/// A host may refuse namespaces to ordinary users (by a sysctl, AppArmor, or the seccomp
/// filter of a container), and an old kernel may lack Landlock. The process then continues
/// without them, and [`Isolation`] says so.
///
/// # Errors
/// [`SandboxError::Threads`] if the process has several threads; [`SandboxError::Step`] or
/// [`SandboxError::Landlock`] for a failure other than such a refusal. The process is then
/// partly isolated and should exit.
pub fn isolate(policy: &Policy, mode: SandboxMode) -> Result<Isolation, SandboxError> {
    let mut isolation = Isolation {
        mode,
        ..Isolation::default()
    };
    if mode != SandboxMode::Off {
        let parent_death = privileges::parent_death_signal()?;
        namespaces::leave_host(policy.keep_network, &mut isolation)?;
        privileges::give_up(policy.max_files, parent_death)?;
        isolation.landlock_abi = landlock::allow_nothing()?;
    }
    isolation.uid = rustix::process::geteuid().as_raw();
    Ok(isolation)
}

//! The rules for system calls, and the tables of rules that several processes share. This
//! module is only data; module `seccomp` compiles it to a filter.
//!
//! Before you add a system call, check whether the process can make it before
//! [`crate::seal`]. No table may allow a call that opens an object by name (open, socket),
//! reaches another program or process (execve, clone, ptrace, kill), makes memory executable,
//! or creates an io_uring, because seccomp does not see the operations of an io_uring. A
//! process may use an io_uring that it created before it was sealed and restricted to the
//! operations that its table allows anyway (docs/sandbox.md).

use libc::c_long;

/// The system calls that a process may make, and how far it is isolated from the host.
#[derive(Debug)]
pub struct Policy {
    /// Name of the process, for error messages.
    pub process: &'static str,
    /// The tables of allowed system calls: those of this crate that apply, and the process's
    /// own. No system call may have two rules.
    pub syscalls: &'static [&'static [Rule]],
    /// Whether the process stays in its network namespace because it works there. A process
    /// that only uses a tap device or socket that is open already does not need this.
    pub keep_network: bool,
    /// The largest number of files open at the same time (RLIMIT_NOFILE).
    pub max_files: u64,
}

/// Allows one system call.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The number of the system call, `libc::SYS_*`.
    pub syscall: c_long,
    /// Conditions on its arguments, all of which must hold.
    pub when: &'static [Check],
}

impl Rule {
    /// Allows `syscall` with any arguments.
    pub const fn any(syscall: c_long) -> Self {
        Self { syscall, when: &[] }
    }

    /// Allows `syscall` when all of `checks` hold.
    pub const fn when(syscall: c_long, checks: &'static [Check]) -> Self {
        Self {
            syscall,
            when: checks,
        }
    }
}

/// A condition on one argument of a system call. Arguments are numbered from 0.
///
/// Only the low 32 bits are compared. That is all that the kernel uses of an argument of type
/// int (requests, commands, ids, lengths), and it holds all flags of mmap(2) and similar
/// calls. It is not suitable for pointers.
#[derive(Clone, Copy, Debug)]
pub enum Check {
    /// The argument is one of these values. List the most frequent value first.
    OneOf(u8, &'static [u32]),
    /// The argument has none of these bits.
    Without(u8, u32),
    /// The argument is the id of the calling process, which is determined by `seal`.
    OwnPid(u8),
}

use Check::{OneOf, OwnPid, Without};

/// The system calls that the Rust and C libraries make in every process after its start:
/// memory, waiting, time, reading and writing, ending a thread or the process.
///
/// A thread may still be starting when the process is sealed, so the table allows the calls
/// that a new thread makes. It does not allow the call that creates a thread.
pub const BASE: &[Rule] = &[
    // Open files.
    Rule::any(libc::SYS_read),
    Rule::any(libc::SYS_write),
    Rule::any(libc::SYS_readv),
    Rule::any(libc::SYS_writev),
    Rule::any(libc::SYS_close),
    Rule::when(
        libc::SYS_fcntl,
        &[OneOf(
            1,
            &[
                libc::F_DUPFD_CLOEXEC as u32,
                libc::F_GETFD as u32,
                libc::F_SETFD as u32,
                libc::F_GETFL as u32,
                libc::F_SETFL as u32,
                libc::F_GET_SEALS as u32,
                libc::F_ADD_SEALS as u32,
            ],
        )],
    ),
    Rule::any(libc::SYS_eventfd2),
    // Waiting.
    Rule::any(libc::SYS_poll),
    Rule::any(libc::SYS_ppoll),
    Rule::any(libc::SYS_epoll_create1),
    Rule::any(libc::SYS_epoll_ctl),
    Rule::any(libc::SYS_epoll_wait),
    Rule::any(libc::SYS_epoll_pwait),
    Rule::any(libc::SYS_epoll_pwait2),
    Rule::any(libc::SYS_futex),
    Rule::any(libc::SYS_nanosleep),
    Rule::any(libc::SYS_clock_nanosleep),
    Rule::any(libc::SYS_restart_syscall),
    Rule::any(libc::SYS_sched_yield),
    // The clock, on hosts whose vDSO cannot read it.
    Rule::any(libc::SYS_clock_gettime),
    // Memory, never executable.
    Rule::when(libc::SYS_mmap, &[Without(2, libc::PROT_EXEC as u32)]),
    Rule::when(libc::SYS_mprotect, &[Without(2, libc::PROT_EXEC as u32)]),
    Rule::any(libc::SYS_munmap),
    Rule::any(libc::SYS_mremap),
    Rule::any(libc::SYS_madvise),
    Rule::any(libc::SYS_brk),
    Rule::any(libc::SYS_getrandom),
    // Handling signals, and abort(3), which sends one to its own thread.
    Rule::any(libc::SYS_rt_sigaction),
    Rule::any(libc::SYS_rt_sigprocmask),
    Rule::any(libc::SYS_rt_sigreturn),
    Rule::any(libc::SYS_sigaltstack),
    Rule::any(libc::SYS_getpid),
    Rule::any(libc::SYS_gettid),
    Rule::when(libc::SYS_tgkill, &[OwnPid(0)]),
    // The start and the end of a thread.
    Rule::any(libc::SYS_set_robust_list),
    Rule::any(libc::SYS_rseq),
    Rule::any(libc::SYS_sched_getaffinity),
    Rule::when(libc::SYS_prctl, &[OneOf(0, &[libc::PR_SET_NAME as u32])]),
    Rule::any(libc::SYS_exit),
    Rule::any(libc::SYS_exit_group),
];

/// Sending and receiving on a connected socket, with descriptors and with timeouts.
///
/// Use fcntl(2) to make a socket non-blocking: ioctl(2) can do too much to be allowed here.
pub const SOCKET: &[Rule] = &[
    Rule::any(libc::SYS_recvmsg),
    Rule::any(libc::SYS_sendmsg),
    Rule::any(libc::SYS_recvfrom),
    // Without an address, as send(2) calls it.
    Rule::when(libc::SYS_sendto, &[OneOf(5, &[0])]),
    Rule::any(libc::SYS_shutdown),
    Rule::when(
        libc::SYS_setsockopt,
        &[
            OneOf(1, &[libc::SOL_SOCKET as u32]),
            OneOf(2, &[libc::SO_RCVTIMEO as u32, libc::SO_SNDTIMEO as u32]),
        ],
    ),
];

/// Accepting connections on a listening socket.
pub const LISTENER: &[Rule] = &[Rule::any(libc::SYS_accept4)];

/// The calls that a vhost-user back end needs beside [`SOCKET`]: to read the length of a
/// memory region's file (an access beyond its end raises SIGBUS), and to create the memory
/// for GET_INFLIGHT_FD.
pub const VHOST_USER: &[Rule] = &[
    Rule::any(libc::SYS_fstat),
    Rule::any(libc::SYS_memfd_create),
    // device-disk uses this, too, for an image that ends within a sector.
    Rule::any(libc::SYS_ftruncate),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SandboxError;

    const fn policy(syscalls: &'static [&'static [Rule]]) -> Policy {
        Policy {
            process: "test",
            syscalls,
            keep_network: false,
            max_files: 64,
        }
    }

    #[test]
    fn shared_tables_have_no_rule_twice() {
        policy(const { &[BASE, SOCKET, LISTENER, VHOST_USER] })
            .check()
            .unwrap();
    }

    #[test]
    fn a_second_rule_for_a_system_call_is_refused() {
        let wider = policy(const { &[BASE, &[Rule::any(libc::SYS_mmap)]] });
        let error = wider.check().unwrap_err();
        assert!(
            matches!(error, SandboxError::DuplicateRule { syscall, .. } if syscall == libc::SYS_mmap),
            "{error}"
        );
    }

    #[test]
    fn a_condition_on_a_seventh_argument_is_refused() {
        let wrong = policy(const { &[&[Rule::when(libc::SYS_ioctl, &[OneOf(6, &[1])])]] });
        assert!(matches!(wrong.check(), Err(SandboxError::Filter { .. })));
    }

    #[test]
    fn an_empty_choice_is_refused_and_does_not_allow_everything() {
        let wrong = policy(const { &[&[Rule::when(libc::SYS_ioctl, &[OneOf(1, &[])])]] });
        assert!(matches!(wrong.check(), Err(SandboxError::Filter { .. })));
    }
}

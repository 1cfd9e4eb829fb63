//! What a process may do once it is sealed: rules, and the tables of rules that
//! several processes share. All is data; `seccomp` makes a filter of it.
//!
//! Before adding a call, look at whether the work can be done before
//! [`crate::seal`]. What no table here may ever allow: a way to name an object
//! that is not open yet (open, socket), another program or process (execve,
//! clone, ptrace, kill), executable memory, and making an io_uring, whose operations
//! seccomp does not see. A process that made one before, restricted to what its table
//! would allow it anyway, may enter it (docs/sandbox.md).

use libc::c_long;

/// What a process may do, and how much of the host it keeps.
#[derive(Debug)]
pub struct Policy {
    /// Name of the process, for messages.
    pub process: &'static str,
    /// The allowed system calls in layers: the tables of this crate that apply,
    /// and the process's own. No call may have two rules.
    pub syscalls: &'static [&'static [Rule]],
    /// Stay in the network namespace, because the process works in it (one
    /// that it was put into, or made itself). An open tap device or socket
    /// does not need this.
    pub keep_network: bool,
    /// Highest number of files open at a time (RLIMIT_NOFILE).
    pub max_files: u64,
}

/// Allows one system call.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The call's number, `libc::SYS_*`.
    pub syscall: c_long,
    /// What its arguments must be; all of these together.
    pub when: &'static [Check],
}

impl Rule {
    /// Allows `syscall` with whatever arguments.
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

/// A condition on one argument of a system call; arguments count from 0.
///
/// The low 32 bits are compared. This is what the kernel looks at for all
/// arguments of type int (requests, commands, ids, lengths) and where all
/// flags of mmap(2) and the like are; it is of no use for pointers.
#[derive(Clone, Copy, Debug)]
pub enum Check {
    /// The argument is one of these. The likeliest value comes first.
    OneOf(u8, &'static [u32]),
    /// The argument has none of these bits.
    Without(u8, u32),
    /// The argument is the id of the calling process, found out when sealing.
    OwnPid(u8),
}

use Check::{OneOf, OwnPid, Without};

/// What the Rust and C libraries need in any process that has finished starting:
/// memory, waiting, time, reading and writing, the end of a thread or process.
///
/// Threads may be in the middle of their own start when the process is sealed,
/// so the calls of that are here as well; starting one is not.
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
    // The clock, where the host's cannot be read without the kernel.
    Rule::any(libc::SYS_clock_gettime),
    // Memory, never executable.
    Rule::when(libc::SYS_mmap, &[Without(2, libc::PROT_EXEC as u32)]),
    Rule::when(libc::SYS_mprotect, &[Without(2, libc::PROT_EXEC as u32)]),
    Rule::any(libc::SYS_munmap),
    Rule::any(libc::SYS_mremap),
    Rule::any(libc::SYS_madvise),
    Rule::any(libc::SYS_brk),
    Rule::any(libc::SYS_getrandom),
    // Signals: handling them, and abort(3), which sends one to its own thread.
    Rule::any(libc::SYS_rt_sigaction),
    Rule::any(libc::SYS_rt_sigprocmask),
    Rule::any(libc::SYS_rt_sigreturn),
    Rule::any(libc::SYS_sigaltstack),
    Rule::any(libc::SYS_getpid),
    Rule::any(libc::SYS_gettid),
    Rule::when(libc::SYS_tgkill, &[OwnPid(0)]),
    // A thread's first steps and its last.
    Rule::any(libc::SYS_set_robust_list),
    Rule::any(libc::SYS_rseq),
    Rule::any(libc::SYS_sched_getaffinity),
    Rule::when(libc::SYS_prctl, &[OneOf(0, &[libc::PR_SET_NAME as u32])]),
    Rule::any(libc::SYS_exit),
    Rule::any(libc::SYS_exit_group),
];

/// Talking over a connected socket, with descriptors passed along; deadlines.
///
/// To make a socket non-blocking use fcntl(2): `ioctl` is left to each process's
/// own table.
pub const SOCKET: &[Rule] = &[
    Rule::any(libc::SYS_recvmsg),
    Rule::any(libc::SYS_sendmsg),
    Rule::any(libc::SYS_recvfrom),
    // No address: this is what send(2) is.
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

/// Accepting connections on a socket that listens already.
pub const LISTENER: &[Rule] = &[Rule::any(libc::SYS_accept4)];

/// What a vhost-user back end adds to [`SOCKET`]: the length of a memory file it
/// was sent (a mapping longer than its file is a SIGBUS), and the memory it hands
/// out itself for GET_INFLIGHT_FD.
pub const VHOST_USER: &[Rule] = &[
    Rule::any(libc::SYS_fstat),
    Rule::any(libc::SYS_memfd_create),
    // Also for device-disk, whose image may end within a sector.
    Rule::any(libc::SYS_ftruncate),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    const fn policy(syscalls: &'static [&'static [Rule]]) -> Policy {
        Policy {
            process: "test",
            syscalls,
            keep_network: false,
            max_files: 64,
        }
    }

    #[test]
    fn shared_tables_fit_together() {
        policy(const { &[BASE, SOCKET, LISTENER, VHOST_USER] })
            .check()
            .unwrap();
    }

    #[test]
    fn second_rule_for_a_call_is_refused() {
        let wider = policy(const { &[BASE, &[Rule::any(libc::SYS_mmap)]] });
        let error = wider.check().unwrap_err();
        assert!(
            matches!(error, Error::DuplicateRule { syscall, .. } if syscall == libc::SYS_mmap),
            "{error}"
        );
    }

    #[test]
    fn seventh_argument_is_refused() {
        let wrong = policy(const { &[&[Rule::when(libc::SYS_ioctl, &[OneOf(6, &[1])])]] });
        assert!(matches!(wrong.check(), Err(Error::Filter { .. })));
    }

    #[test]
    fn choice_of_nothing_does_not_allow_all() {
        let wrong = policy(const { &[&[Rule::when(libc::SYS_ioctl, &[OneOf(1, &[])])]] });
        assert!(matches!(wrong.check(), Err(Error::Filter { .. })));
    }
}

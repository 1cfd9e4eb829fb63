//! System calls for which a sealed process is killed.

use std::arch::asm;
use std::sync::mpsc;
use std::thread;

use crate::{KILLED, ProbeEnd, SandboxProbe, sealed};

const fn killed(name: &'static str, run: fn()) -> SandboxProbe {
    SandboxProbe {
        name,
        run,
        end: KILLED,
    }
}

pub const PROBES: &[SandboxProbe] = &[
    // Opening an object by name.
    killed("open a file", || {
        call_sealed(libc::SYS_openat, [AT_FDCWD, path(), 0, 0, 0, 0])
    }),
    killed("open a file with open(2)", || {
        call_sealed(libc::SYS_open, [path(), 0, 0, 0, 0, 0])
    }),
    killed("stat a file", || {
        call_sealed(libc::SYS_statx, [AT_FDCWD, path(), 0, 0, 0, 0])
    }),
    killed("create a unix socket", || {
        call_sealed(libc::SYS_socket, [libc::AF_UNIX as usize, 1, 0, 0, 0, 0])
    }),
    killed("create an internet socket", || {
        call_sealed(libc::SYS_socket, [libc::AF_INET as usize, 1, 0, 0, 0, 0])
    }),
    killed("create a pair of sockets", || {
        call_sealed(libc::SYS_socketpair, [1, 1, 0, 0, 0, 0])
    }),
    killed("connect", || {
        call_sealed(libc::SYS_connect, [0, 0, 0, 0, 0, 0])
    }),
    killed("send to an address", || {
        call_sealed(libc::SYS_sendto, [0, 0, 0, 0, path(), 16])
    }),
    killed("accept without a listener table", || {
        call_sealed(libc::SYS_accept4, [0, 0, 0, 0, 0, 0])
    }),
    // Programs and processes.
    killed("fork", || {
        call_sealed(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0, 0, 0])
    }),
    killed("fork with fork(2)", || call_sealed(libc::SYS_fork, [0; 6])),
    killed("fork with clone3", || call_sealed(libc::SYS_clone3, [0; 6])),
    killed("start a thread", || {
        sealed();
        drop(thread::spawn(|| ()));
    }),
    killed("execute a program", || {
        call_sealed(libc::SYS_execve, [path(), 0, 0, 0, 0, 0])
    }),
    killed("execute an open program", || {
        call_sealed(libc::SYS_execveat, [0, path(), 0, 0, 0, 0])
    }),
    killed("trace a process", || {
        let parent = parent();
        let attach = libc::PTRACE_ATTACH as usize;
        call_sealed(libc::SYS_ptrace, [attach, parent, 0, 0, 0, 0])
    }),
    killed("read a process's memory", || {
        let parent = parent();
        call_sealed(libc::SYS_process_vm_readv, [parent, 0, 0, 0, 0, 0])
    }),
    killed("signal a process", || {
        let parent = parent();
        call_sealed(libc::SYS_kill, [parent, 0, 0, 0, 0, 0])
    }),
    killed("signal a thread of a process", || {
        let parent = parent();
        call_sealed(libc::SYS_tgkill, [parent, parent, 0, 0, 0, 0])
    }),
    killed("signal a thread with tkill", || {
        let parent = parent();
        call_sealed(libc::SYS_tkill, [parent, 0, 0, 0, 0, 0])
    }),
    killed("open a pidfd", || {
        let parent = parent();
        call_sealed(libc::SYS_pidfd_open, [parent, 0, 0, 0, 0, 0])
    }),
    killed("raise a limit of another process", || {
        let parent = parent();
        call_sealed(libc::SYS_prlimit64, [parent, 0, 0, 0, 0, 0])
    }),
    // Changing the identity or view of the process.
    killed("mount", || {
        call_sealed(libc::SYS_mount, [path(), path(), path(), 0, 0, 0])
    }),
    killed("unmount", || {
        call_sealed(libc::SYS_umount2, [path(), 0, 0, 0, 0, 0])
    }),
    killed("unshare again", || {
        let user = libc::CLONE_NEWUSER as usize;
        call_sealed(libc::SYS_unshare, [user, 0, 0, 0, 0, 0])
    }),
    killed("join a namespace", || {
        call_sealed(libc::SYS_setns, [0, 0, 0, 0, 0, 0])
    }),
    killed("change root", || {
        call_sealed(libc::SYS_chroot, [path(), 0, 0, 0, 0, 0])
    }),
    killed("become root", || call_sealed(libc::SYS_setuid, [0; 6])),
    killed("take capabilities", || {
        call_sealed(libc::SYS_capset, [0; 6])
    }),
    killed("become dumpable", || {
        let dumpable = libc::PR_SET_DUMPABLE as usize;
        call_sealed(libc::SYS_prctl, [dumpable, 1, 0, 0, 0, 0])
    }),
    killed("add a filter", || {
        let filter = libc::SECCOMP_SET_MODE_FILTER as usize;
        call_sealed(libc::SYS_seccomp, [filter, 0, 0, 0, 0, 0])
    }),
    // Subsystems with a large attack surface.
    killed("io_uring_setup", || {
        let parameters = [0u64; 15];
        let at = parameters.as_ptr() as usize;
        call_sealed(libc::SYS_io_uring_setup, [8, at, 0, 0, 0, 0])
    }),
    killed("io_uring_enter", || {
        call_sealed(libc::SYS_io_uring_enter, [0; 6])
    }),
    killed("bpf", || call_sealed(libc::SYS_bpf, [0; 6])),
    killed("perf_event_open", || {
        call_sealed(libc::SYS_perf_event_open, [0; 6])
    }),
    killed("userfaultfd", || call_sealed(libc::SYS_userfaultfd, [0; 6])),
    killed("add_key", || call_sealed(libc::SYS_add_key, [0; 6])),
    killed("ioctl not on the list", || {
        let request = libc::FIONBIO as usize;
        call_sealed(libc::SYS_ioctl, [0, request, 0, 0, 0, 0])
    }),
    killed("fcntl not on the list", || {
        let command = libc::F_SETOWN as usize;
        call_sealed(libc::SYS_fcntl, [0, command, 0, 0, 0, 0])
    }),
    killed("socket option not on the list", || {
        let (level, name) = (libc::SOL_SOCKET as usize, libc::SO_SNDBUF as usize);
        call_sealed(libc::SYS_setsockopt, [0, level, name, 0, 0, 0])
    }),
    killed("socket option of another level", || {
        let (level, name) = (libc::IPPROTO_TCP as usize, libc::SO_RCVTIMEO as usize);
        call_sealed(libc::SYS_setsockopt, [0, level, name, 0, 0, 0])
    }),
    // Executable memory.
    killed("map executable memory", || {
        let prot = (libc::PROT_READ | libc::PROT_EXEC) as usize;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
        call_sealed(libc::SYS_mmap, [0, 4096, prot, flags, usize::MAX, 0])
    }),
    killed("make memory executable", || {
        // SAFETY: this creates a new mapping, which nothing else uses.
        let page = unsafe {
            let (prot, flags) = (libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0)
        };
        let prot = (libc::PROT_READ | libc::PROT_EXEC) as usize;
        call_sealed(libc::SYS_mprotect, [page as usize, 4096, prot, 0, 0, 0])
    }),
    killed("make memory executable by key", || {
        let prot = (libc::PROT_READ | libc::PROT_EXEC) as usize;
        call_sealed(libc::SYS_pkey_mprotect, [0, 4096, prot, 0, 0, 0])
    }),
    // Ways around the filter.
    killed("open a file from an older thread", || {
        outrigger_sandbox::isolate(&crate::POLICY, outrigger_sandbox::SandboxMode::Enforce)
            .unwrap();
        let (go, wait) = mpsc::channel();
        let thread = thread::spawn(move || {
            wait.recv().unwrap();
            call(libc::SYS_openat, [AT_FDCWD, path(), 0, 0, 0, 0]);
        });
        crate::sealed_only();
        go.send(()).unwrap();
        thread.join().unwrap();
    }),
    killed("call with the number of another ABI (x32)", || {
        const X32: i64 = 0x4000_0000;
        call_sealed(X32 + libc::SYS_getpid, [0; 6])
    }),
    SandboxProbe {
        name: "call as a 32-bit program",
        run: || {
            sealed();
            const GETPID: usize = 20;
            // SAFETY: getpid has no arguments and touches no memory.
            unsafe {
                asm!("int 0x80", inlateout("rax") GETPID => _, lateout("r8") _, lateout("r9") _,
                     lateout("r10") _, lateout("r11") _)
            };
        },
        // A kernel without support for 32-bit programs raises SIGSEGV instead.
        end: ProbeEnd::Signal(&[libc::SIGSYS, libc::SIGSEGV]),
    },
];

const AT_FDCWD: usize = libc::AT_FDCWD as usize;

fn path() -> usize {
    c"/etc/passwd".as_ptr() as usize
}

fn parent() -> usize {
    // SAFETY: getppid(2) has no arguments and cannot fail.
    unsafe { libc::getppid() as usize }
}

/// Seals the process and makes one system call.
fn call_sealed(number: i64, arguments: [usize; 6]) {
    sealed();
    call(number, arguments);
}

fn call(number: i64, [a, b, c, d, e, f]: [usize; 6]) {
    // SAFETY: each probe passes null or pointers to memory that outlives the call.
    unsafe { libc::syscall(number, a, b, c, d, e, f) };
}

//! The program's table of system calls: what a sealed process can do with its I/O engine, and
//! what kills it. Each probe runs in a new process of this test, because most die by a
//! signal.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use outrigger_sandbox::{BASE, Policy, SandboxMode, seal};

use crate::SYSCALLS;
use crate::io_engine::{IoEngine, IoOp, IoPath, IoTransfer, REGISTER_FILES_UPDATE};

/// The environment variable with the name of the probe.
const PROBE: &str = "OUTRIGGER_TEST_SEALED";

static POLICY: Policy = Policy {
    process: "device-disk",
    syscalls: &[BASE, SYSCALLS],
    keep_network: false,
    max_files: 64,
};

type Probe = fn(&mut IoEngine) -> bool;

/// Returns whether the calls succeeded.
const ALLOWED: &[(&str, Probe)] = &[
    ("flush", |engine| {
        let flush = IoTransfer {
            request: 7,
            op: IoOp::Flush,
            path: IoPath::Cached,
            offset: 0,
            memory: vec![],
            bounce: None,
        };
        engine.queue(flush).is_ok()
            && engine.wait().is_ok()
            && matches!(engine.next_completed(), Some((7, Ok(()))))
    }),
    ("hold a socket", |engine| {
        let stdin = std::io::stdin();
        engine.hold_socket(Some(stdin.as_fd())).is_ok() && engine.hold_socket(None).is_ok()
    }),
];

const KILLED: &[(&str, Probe)] = &[
    ("make another io_uring", |_| {
        let parameters = [0u64; 15];
        let at = parameters.as_ptr() as usize;
        call(libc::SYS_io_uring_setup, [8, at, 0, 0])
    }),
    ("register buffers", |engine| {
        const BUFFERS: usize = 0;
        register(engine, BUFFERS)
    }),
    ("register restrictions", |engine| {
        const RESTRICTIONS: usize = 11;
        register(engine, RESTRICTIONS)
    }),
    ("a registered ring's number", |engine| {
        const USE_REGISTERED_RING: usize = 1 << 31;
        register(engine, USE_REGISTERED_RING | REGISTER_FILES_UPDATE as usize)
    }),
    ("read by an older call", |engine| {
        let fd = engine.as_fd().as_raw_fd() as usize;
        call(libc::SYS_preadv, [fd, 0, 0, 0])
    }),
    ("another ioctl", |engine| {
        let fd = engine.as_fd().as_raw_fd() as usize;
        call(libc::SYS_ioctl, [fd, libc::FIONREAD as usize, 0, 0])
    }),
];

fn register(engine: &IoEngine, what: usize) -> bool {
    let fd = engine.as_fd().as_raw_fd() as usize;
    call(libc::SYS_io_uring_register, [fd, what, 0, 0])
}

fn call(number: i64, [a, b, c, d]: [usize; 4]) -> bool {
    // SAFETY: the pointers are null, or point to valid memory.
    unsafe { libc::syscall(number, a, b, c, d) == 0 }
}

#[test]
fn a_sealed_process_can_use_its_io_engine_and_nothing_else() {
    let all = || ALLOWED.iter().chain(KILLED);
    if let Ok(name) = std::env::var(PROBE) {
        let (_, probe) = all().find(|it| it.0 == name).unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut engine = IoEngine::new(file.as_fd(), None).unwrap();
        seal(&POLICY, SandboxMode::Enforce).unwrap();
        let code = if probe(&mut engine) { 0 } else { 1 };
        // SAFETY: _exit has no preconditions. Cleaning up might need a forbidden system call.
        unsafe { libc::_exit(code) }
    }
    for (name, _) in all() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "sealed::a_sealed_process_can_use_its_io_engine_and_nothing_else",
            ])
            .env(PROBE, name)
            .output()
            .unwrap();
        let signal = KILLED
            .iter()
            .any(|it| it.0 == *name)
            .then_some(libc::SIGSYS);
        assert_eq!(output.status.signal(), signal, "{name}: {output:?}");
        assert!(
            signal.is_some() || output.status.success(),
            "{name}: {output:?}"
        );
    }
}

//! One child process.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::plan::Program;

/// Starts `program`. Besides what the plan gives it, it inherits `extra`.
///
/// The child dies with this process, whatever kills it, and leaves Ctrl-C to us.
/// Call this from a thread that lives as long as the child shall
/// (PR_SET_PDEATHSIG in prctl(2) means the thread, not the process).
///
/// # Errors
/// Names the program that cannot be started.
pub fn start(program: &Program, extra: &[&OwnedFd]) -> anyhow::Result<Child> {
    let path = find(program.name);
    let mut command = Command::new(&path);
    command.args(&program.args);
    if !program.needs_stdin {
        command.stdin(Stdio::null());
    }
    let fds: Vec<RawFd> = program
        .fds
        .iter()
        .chain(extra.iter().copied())
        .map(AsRawFd::as_raw_fd)
        .collect();
    let parent = std::process::id();
    // SAFETY: the closure makes async-signal-safe system calls only.
    unsafe {
        command.pre_exec(move || {
            for &fd in &fds {
                check(libc::fcntl(fd, libc::F_SETFD, 0))?;
            }
            libc::signal(libc::SIGINT, libc::SIG_IGN);
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            check(libc::sigprocmask(
                libc::SIG_SETMASK,
                &none,
                std::ptr::null_mut(),
            ))?;
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            // The parent may have died before the line above.
            if libc::getppid() as u32 != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
    command.spawn().map_err(|error| {
        let Program { id, name, .. } = program;
        if error.kind() == io::ErrorKind::NotFound && path == Path::new(name) {
            return anyhow::anyhow!("{id}: {name} is neither beside outrigger nor in PATH");
        }
        anyhow::anyhow!("{id}: {}: {error}", path.display())
    })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The program beside our own, else from PATH.
pub fn find(name: &str) -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join(name)))
        .filter(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from(name))
}

//! One child process.

use std::ffi::OsString;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

/// What to start, and what it inherits.
pub struct Start {
    /// Its role in the machine.
    pub id: String,
    /// Name of the program, which is looked for anew each time.
    pub name: &'static str,
    /// Arguments.
    pub args: Vec<OsString>,
    /// Descriptors that it inherits under their own numbers.
    pub fds: Vec<RawFd>,
    /// Reads this terminal.
    pub stdin: bool,
    /// In place of our standard error.
    pub stderr: Option<OwnedFd>,
}

/// Starts a process.
///
/// The child dies with this process, whatever kills it, and leaves Ctrl-C to us.
/// Call this from a thread that lives as long as the child shall
/// (PR_SET_PDEATHSIG in prctl(2) means the thread, not the process).
///
/// # Errors
/// Names the program that cannot be started.
pub fn start(start: Start) -> anyhow::Result<Child> {
    let Start { id, name, fds, .. } = start;
    let path = find(name);
    let mut command = Command::new(&path);
    command.args(start.args);
    if !start.stdin {
        command.stdin(Stdio::null());
    }
    if let Some(stderr) = start.stderr {
        command.stderr(stderr);
    }
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

/// A pipe to write "ready" to.
///
/// # Errors
/// When there are no descriptors left.
pub fn ready_pipe() -> io::Result<(PipeReader, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    Ok((reader, writer.into()))
}

/// The option for the writing end of [`ready_pipe`].
pub fn ready_option(writer: &OwnedFd) -> [OsString; 2] {
    let number = writer.as_raw_fd().to_string();
    ["--ready-fd".into(), number.into()]
}

/// Reads until the process says that it is ready or closes the pipe.
pub fn says_ready(mut reader: PipeReader) -> bool {
    let mut text = Vec::new();
    let mut buffer = [0; 64];
    while !text.ends_with(b"ready\n") {
        match reader.read(&mut buffer) {
            Ok(count) if count > 0 && text.len() < 4096 => {
                text.extend_from_slice(&buffer[..count]);
            }
            _ => return false,
        }
    }
    true
}

/// Longest complaint that is kept.
const COMPLAINT: usize = 1000;

/// Passes on what a process says on its standard error, and gives its first line to
/// `complaint`; an empty one if it ends without a word.
pub fn pass_on(mut reader: PipeReader, complaint: impl FnOnce(String)) {
    let mut first = Vec::new();
    let mut complaint = Some(complaint);
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = reader.read(&mut buffer) {
        let said = &buffer[..count];
        // Nobody is left to be told.
        let _ = io::stderr().write_all(said);
        let room = COMPLAINT - first.len();
        first.extend_from_slice(&said[..count.min(room)]);
        if let Some(end) = first.iter().position(|&byte| byte == b'\n')
            && let Some(complaint) = complaint.take()
        {
            complaint(String::from_utf8_lossy(&first[..end]).into_owned());
        }
    }
    if let Some(complaint) = complaint {
        complaint(String::from_utf8_lossy(&first).into_owned());
    }
}

/// How it ended, in words.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown status".into(),
    }
}

/// Its exit code, unless a signal ended it.
pub fn code_of(status: ExitStatus) -> Option<u8> {
    status.code().and_then(|code| u8::try_from(code).ok())
}

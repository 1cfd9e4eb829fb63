//! Starting one child process, and reading what it reports about its start.

use std::ffi::OsString;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

/// The command of a child process.
pub struct SpawnSpec {
    /// The device that it serves, or `runner`.
    pub id: String,
    /// Name of the executable, which is looked up for each process.
    pub program: &'static str,
    /// Arguments.
    pub args: Vec<OsString>,
    /// Descriptors that it inherits with unchanged numbers.
    pub fds: Vec<RawFd>,
    /// Whether it inherits standard input.
    pub stdin: bool,
    /// Replaces standard error.
    pub stderr: Option<OwnedFd>,
}

/// Starts a process.
///
/// The child gets SIGKILL when the launcher dies, and ignores SIGINT so that only the launcher
/// handles Ctrl-C. Call this from a thread that outlives the child: PR_SET_PDEATHSIG (prctl(2))
/// refers to the thread that started the child, not to the process.
///
/// # Errors
/// The program cannot be started. The message names it and the device.
pub fn spawn(spec: SpawnSpec) -> anyhow::Result<Child> {
    let SpawnSpec {
        id, program, fds, ..
    } = spec;
    let path = find_program(program);
    let mut command = Command::new(&path);
    command.args(spec.args);
    if !spec.stdin {
        command.stdin(Stdio::null());
    }
    if let Some(stderr) = spec.stderr {
        command.stderr(stderr);
    }
    let parent = std::process::id();
    // SAFETY: the closure only makes async-signal-safe calls.
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
            // The launcher may have died before the prctl.
            if libc::getppid() as u32 != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
    command.spawn().map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound && path == Path::new(program) {
            return anyhow::anyhow!("{id}: {program} is neither beside outrigger nor in PATH");
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

/// Returns the path of a program in the directory of this executable. If it is not there, the
/// plain name, for a search in PATH.
pub fn find_program(name: &str) -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join(name)))
        .filter(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from(name))
}

/// Adds the option with which the program reports that it is ready. Returns both ends of the
/// pipe; the caller closes the writer after the spawn.
///
/// # Errors
/// No pipe can be created.
pub fn add_ready_pipe(spec: &mut SpawnSpec) -> io::Result<(PipeReader, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    let writer = OwnedFd::from(writer);
    let number = writer.as_raw_fd();
    spec.args.push("--ready-fd".into());
    spec.args.push(number.to_string().into());
    spec.fds.push(number);
    Ok((reader, writer))
}

/// Waits until the process reports that it is ready. Returns false if it closes the pipe
/// without that.
pub fn wait_ready(mut reader: PipeReader) -> bool {
    const MAX_TEXT: usize = 4096;
    let mut text = Vec::new();
    let mut buffer = [0; 64];
    while !text.ends_with(b"ready\n") {
        match reader.read(&mut buffer) {
            Ok(count) if count > 0 && text.len() < MAX_TEXT => {
                text.extend_from_slice(&buffer[..count]);
            }
            _ => return false,
        }
    }
    true
}

/// Copies the standard error of a process to the launcher's until it is closed. Calls
/// `first_line` once with the first line, or with an empty line if there was none.
pub fn forward_stderr(mut reader: PipeReader, first_line: impl FnOnce(String)) {
    const MAX_LINE: usize = 1000;
    let mut line = Vec::new();
    let mut first_line = Some(first_line);
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = reader.read(&mut buffer) {
        let text = &buffer[..count];
        // If the launcher's own stderr is closed, the text cannot be reported anywhere.
        let _ = io::stderr().write_all(text);
        let room = MAX_LINE - line.len();
        line.extend_from_slice(&text[..count.min(room)]);
        if let Some(end) = line.iter().position(|&byte| byte == b'\n')
            && let Some(first_line) = first_line.take()
        {
            first_line(String::from_utf8_lossy(&line[..end]).into_owned());
        }
    }
    if let Some(first_line) = first_line {
        first_line(String::from_utf8_lossy(&line).into_owned());
    }
}

/// Describes in words how a process ended.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown status".into(),
    }
}

/// Returns the exit code of a process, unless a signal ended it.
pub fn exit_code(status: ExitStatus) -> Option<u8> {
    status.code().and_then(|code| u8::try_from(code).ok())
}

//! A device process under test, with a directory of its own. Dropping it ends the process and
//! removes the directory.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::{binaries, wait_until};

/// Default lifetime of a process under test ([`Launch::lifetime`] changes it). After that it
/// is killed, which closes its socket, so that no test waits for ever.
pub const LIFETIME: Duration = Duration::from_secs(120);

/// A running program.
pub struct Process {
    child: Arc<Mutex<Child>>,
    pid: u32,
    directory: TempDir,
    watchdog: Option<(Sender<()>, JoinHandle<()>)>,
}

/// Builds a command line.
pub struct Launch {
    command: Command,
    directory: TempDir,
    passed: Vec<OwnedFd>,
    lifetime: Duration,
}

impl Launch {
    /// The program of package `name`, built if necessary.
    pub fn new(name: &str) -> Self {
        Self::program(&binaries::binary(name))
    }

    /// Another program; without a slash in its name, one of those in PATH.
    pub fn program(program: &Path) -> Self {
        Launch {
            command: Command::new(program),
            directory: tempfile::tempdir().unwrap(),
            passed: Vec::new(),
            lifetime: LIFETIME,
        }
    }

    /// An open program file.
    pub fn of(program: &File) -> Self {
        let path = format!("/proc/self/fd/{}", program.as_raw_fd());
        Self::program(Path::new(&path))
    }

    /// Limits its lifetime.
    pub fn lifetime(mut self, time: Duration) -> Self {
        self.lifetime = time;
        self
    }

    /// Runs it as another user.
    pub fn as_user(mut self, user: u32) -> Self {
        self.command.uid(user).gid(user);
        self
    }

    /// The directory of the process.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Adds arguments.
    pub fn args<S: AsRef<std::ffi::OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// The command itself, for its standard streams and its environment.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Lets only this process inherit `fd`, and passes its number with `option`.
    pub fn pass(mut self, option: &str, fd: OwnedFd) -> Self {
        self.command.arg(option).arg(fd.as_raw_fd().to_string());
        self.passed.push(fd);
        self
    }

    /// Starts it without waiting until it is ready. Its standard error goes to a file, which
    /// [`Process::log`] reads.
    pub fn spawn(mut self) -> Process {
        let log = File::create(self.directory.path().join("log")).unwrap();
        let inherited: Vec<_> = self.passed.iter().map(|fd| fd.as_raw_fd()).collect();
        let prepare = move || {
            // The process is killed when its test dies.
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            for &fd in &inherited {
                // SAFETY: only a flag of a descriptor that is open is changed.
                if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: makes system calls only, and allocates nothing.
        unsafe { self.command.pre_exec(prepare) };
        let child = self
            .command
            .env_remove("RUST_BACKTRACE")
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| {
                panic!(
                    "{:?}: {e}; ./test.sh installs it",
                    self.command.get_program()
                )
            });
        let pid = child.id();
        let child = Arc::new(Mutex::new(child));
        let (sender, receiver) = channel();
        let watched = Arc::clone(&child);
        let lifetime = self.lifetime;
        let thread = std::thread::spawn(move || watch(&receiver, &watched, lifetime));
        Process {
            child,
            pid,
            directory: self.directory,
            watchdog: Some((sender, thread)),
        }
    }

    /// Starts it and waits until it reports that it is ready.
    pub fn ready(self) -> Process {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let process = self.pass("--ready-fd", writer).spawn();
        let mut said = String::new();
        // Ends when the process ends; the log then says why.
        File::from(reader).read_to_string(&mut said).unwrap();
        assert_eq!(said, "ready\n", "it did not start:\n{}", process.log());
        process
    }

    /// Starts it listening on a socket in its directory and waits until it is
    /// ready.
    pub fn listening(self) -> Process {
        let socket = self.directory.path().join("socket");
        self.listening_at(&socket)
    }

    /// Starts it listening on the socket `path` and waits until it is ready.
    pub fn listening_at(self, path: &Path) -> Process {
        self.args([Path::new("--socket-path"), path]).ready()
    }

    /// Starts it with a connected socket, whose other end is returned.
    pub fn connected(self) -> (Process, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (self.pass("--fd", theirs.into()).ready(), ours)
    }
}

fn watch(done: &Receiver<()>, child: &Mutex<Child>, lifetime: Duration) {
    if done.recv_timeout(lifetime) == Err(RecvTimeoutError::Timeout) {
        let _ = child.lock().unwrap().kill();
    }
}

impl Process {
    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Takes the directory, which then outlives the process.
    pub fn keep_directory(&mut self) -> TempDir {
        let log = self.directory.path().join("log");
        let other = tempfile::tempdir().unwrap();
        std::fs::copy(log, other.path().join("log")).unwrap();
        std::mem::replace(&mut self.directory, other)
    }

    /// A file of `/proc/PID`.
    pub fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid))
    }

    /// A new connection to its socket.
    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("socket")).unwrap()
    }

    /// What it has written to standard error so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid as i32).unwrap();
        // It is reaped only with `self`, so the pid is still its own.
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> bool {
        self.child().try_wait().unwrap().is_none()
    }

    /// Waits until it exits.
    pub fn wait(&self) -> ExitStatus {
        let mut status = None;
        wait_until("the process has ended", || {
            status = self.child().try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Processor time that it has used so far, in clock ticks (proc_pid_stat(5)).
    pub fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(self.proc("stat")).unwrap();
        // Fields are counted after the name, which may contain any byte.
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// A field of `/proc/PID/status`, or of that of one of its threads if
    /// `thread` is `task/TID/`.
    pub fn status(&self, thread: &str, field: &str) -> String {
        let status = std::fs::read_to_string(self.proc(&format!("{thread}status"))).unwrap();
        let value = status.lines().find_map(|line| line.strip_prefix(field));
        value.unwrap().trim_start_matches(':').trim().to_owned()
    }

    /// Its resident memory in bytes.
    pub fn resident(&self) -> u64 {
        let kibibytes = self.status("", "VmRSS").replace(" kB", "");
        kibibytes.parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        {
            let mut child = self.child();
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some((sender, thread)) = self.watchdog.take() {
            drop(sender);
            let _ = thread.join();
        }
        if std::thread::panicking() {
            eprintln!("--- log of the process:\n{}---", self.log());
        }
    }
}

/// Whether `fd` becomes readable within `time`.
pub fn readable_within(fd: &impl AsRawFd, time: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let timeout = Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: time.subsec_nanos().into(),
    };
    // SAFETY: `fd` outlives the call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

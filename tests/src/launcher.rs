//! The launcher under test, or a script in its place.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outrigger_protocol::control::{DeviceState, MachineStatus};
use rustix::process::{Pid, Signal, kill_process};

use crate::{DEADLINE, binaries, wait_until};

/// The directory of all programs, built from the present sources.
pub fn programs() -> PathBuf {
    for name in [
        "vcpu-runner",
        "device-disk",
        "device-net",
        "device-console",
        "device-platform",
    ] {
        binaries::binary(name);
    }
    let mut path = binaries::binary("outrigger");
    path.pop();
    path
}

/// A running launcher, in a session of its own by which its processes are found. Remaining
/// processes are killed on drop.
pub struct Launcher {
    child: Child,
    directory: tempfile::TempDir,
}

impl Launcher {
    /// Starts `outrigger` with these arguments in a directory of its own.
    pub fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self::start_in(directory, arguments)
    }

    /// Starts it in `directory`.
    pub fn start_in(directory: tempfile::TempDir, arguments: &[&str]) -> Self {
        Self::start_with(directory, arguments, Stdio::null())
    }

    /// Starts it in `directory`, with this standard input.
    pub fn start_with(directory: tempfile::TempDir, arguments: &[&str], stdin: Stdio) -> Self {
        let mut command = Command::new(programs().join("outrigger"));
        command.args(arguments);
        Self::spawn(directory, command, stdin)
    }

    /// Starts `command` in `directory`, in a session of its own.
    pub fn spawn(directory: tempfile::TempDir, mut command: Command, stdin: Stdio) -> Self {
        let output = |name: &str| File::create(directory.path().join(name)).unwrap();
        command
            .current_dir(directory.path())
            .env("XDG_RUNTIME_DIR", directory.path())
            .stdin(stdin)
            .stdout(output("stdout"))
            .stderr(output("stderr"));
        // SAFETY: setsid(2) is async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                Ok(())
            })
        };
        let child = command.spawn().unwrap();
        Launcher { child, directory }
    }

    /// Path of a file in its directory.
    pub fn read(&self, name: &str) -> String {
        let bytes = std::fs::read(self.directory.path().join(name)).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Process ids of a session, with the programs' names.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let session = self.child.id().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap() {
            let path = entry.unwrap().path();
            let Ok(stat) = std::fs::read_to_string(path.join("stat")) else {
                continue;
            };
            let Some((head, tail)) = stat.rsplit_once(')') else {
                continue;
            };
            let fields: Vec<&str> = tail.split_whitespace().collect();
            // State and session (proc_pid_stat(5) numbers 3 and 6).
            if fields[3] == session && fields[0] != "Z" {
                let (pid, name) = head.split_once(" (").unwrap();
                found.push((pid.parse().unwrap(), name.to_owned()));
            }
        }
        found
    }

    /// Its own process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Waits until the file `name` of its directory contains `text`.
    pub fn wait_file(&self, name: &str, text: &str) {
        let start = Instant::now();
        let content = || std::fs::read_to_string(self.directory.path().join(name));
        while !content().is_ok_and(|content| content.contains(text)) {
            assert!(
                start.elapsed() < DEADLINE,
                "{name} never says {text:?}, but {:?}\n{}",
                content(),
                self.read("stderr")
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Process id of the process called `name`; of two, the newer one.
    pub fn pid_of(&self, name: &str) -> Pid {
        let mut pid = None;
        wait_until(&format!("{name} runs"), || {
            // The kernel keeps 15 bytes of a name.
            pid = self
                .processes()
                .into_iter()
                .filter(|p| name.starts_with(&p.1) && p.1.len() >= 9)
                .max()
                .and_then(|p| Pid::from_raw(p.0));
            pid.is_some()
        });
        pid.unwrap()
    }

    /// Output and exit code of `outrigger ctl control ...`; the machine must have been started
    /// with `--control control`.
    pub fn ctl(&self, arguments: &[&str]) -> (i32, String, String) {
        self.ctl_at("control", arguments)
    }

    /// The same for the machine whose control socket is at `path`.
    pub fn ctl_at(&self, path: &str, arguments: &[&str]) -> (i32, String, String) {
        let output = Command::new(programs().join("outrigger"))
            .args(["ctl", path])
            .args(arguments)
            .current_dir(self.directory.path())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        let code = output.status.code().unwrap_or(-1);
        (code, text(&output.stdout), text(&output.stderr))
    }

    /// [`Launcher::ctl`], which must succeed; returns its output.
    pub fn do_ctl(&self, arguments: &[&str]) -> String {
        let (code, said, error) = self.ctl(arguments);
        let log = self.read("stderr");
        assert_eq!(
            (code, error.as_str()),
            (0, ""),
            "{arguments:?}: {said}\n{log}"
        );
        said
    }

    /// The machine's status, by [`Launcher::ctl`].
    pub fn status(&self) -> MachineStatus {
        serde_json::from_str(&self.do_ctl(&["status", "--json"])).unwrap()
    }

    /// The state of one of its devices.
    pub fn state(&self, id: &str) -> DeviceState {
        let devices = self.status().devices;
        devices.iter().find(|it| it.id == id).unwrap().state
    }

    /// Sends a signal to the process called `name`. A following signal to another process
    /// may overtake it, unless the test waits for the effect.
    pub fn signal(&self, name: &str, signal: Signal) -> Pid {
        let pid = self.pid_of(name);
        kill_process(pid, signal).unwrap();
        pid
    }

    /// Waits until a process other than `old` is called `name`.
    pub fn wait_successor(&self, name: &str, old: Pid) -> Pid {
        wait_until(&format!("{name} is another process"), || {
            self.pid_of(name) != old
        });
        self.pid_of(name)
    }

    /// Waits until it exits; returns the exit code, -1 for a signal.
    pub fn wait(&mut self) -> i32 {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(60) {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the launcher did not end: {}", self.read("stderr"));
    }

    /// Waits until all its processes are gone.
    pub fn expect_no_process_left(&self) {
        wait_until("no process is left", || self.processes().is_empty());
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for (pid, _) in self.processes() {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

/// Both ends of a new pseudo-terminal: the master, at which the test types, and the slave, for
/// the program.
///
/// # Panics
/// There are no pseudo-terminals left.
pub fn terminal() -> (File, File) {
    let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY;
    let terminal = rustix::pty::openpt(flags).unwrap();
    rustix::pty::unlockpt(&terminal).unwrap();
    let name = rustix::pty::ptsname(&terminal, Vec::new()).unwrap();
    let mut options = File::options();
    let slave = options.read(true).write(true).open(name.to_str().unwrap());
    (terminal.into(), slave.unwrap())
}

//! Whole machines: a runner and its device processes, each started as a script would do it.
//! The serial port and the events go to files.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use outrigger_protocol::control::{ControlReply, MachineEvent};

use crate::process::{LIFETIME, Launch, Process};
use crate::{binaries, wait_until};

/// How long a runner may take from the creation of its control socket to listen(2).
const LISTEN_DEADLINE: Duration = Duration::from_secs(5);

/// Whether to skip tests that need /dev/kvm (OUTRIGGER_SKIP_KVM=1).
///
/// # Panics
/// They are not to be skipped, and /dev/kvm cannot be opened.
pub fn skip_kvm() -> bool {
    if std::env::var_os("OUTRIGGER_SKIP_KVM").is_some_and(|value| value == "1") {
        eprintln!("skipped: OUTRIGGER_SKIP_KVM=1");
        return true;
    }
    let open = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(error) = open {
        panic!("/dev/kvm: {error}; set OUTRIGGER_SKIP_KVM=1 to leave out what needs it");
    }
    false
}

/// The embedded guest, built from the current sources.
///
/// # Panics
/// It does not build.
pub fn embedded_guest() -> &'static Path {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    GUEST.get_or_init(|| {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../embedded-guest/Cargo.toml");
        let target = binaries::target_directory().join("embedded-guest");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo)
            .args(["build", "--release", "--locked", "--quiet"])
            .args(["--manifest-path".as_ref(), manifest.as_os_str()])
            .args(["--target-dir".as_ref(), target.as_os_str()])
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .status()
            .unwrap();
        assert!(status.success(), "the embedded guest does not build");
        target.join("release/embedded-guest")
    })
}

/// A device process and the runner's option for it.
struct Device {
    id: String,
    option: String,
    process: Process,
}

/// Builds a machine.
pub struct Machine {
    kernel: PathBuf,
    cmdline: String,
    arguments: Vec<String>,
    devices: Vec<Device>,
    serial: bool,
    lifetime: Duration,
    directory: tempfile::TempDir,
}

impl Machine {
    /// A machine that boots the embedded guest with this command line and has only a serial
    /// port.
    pub fn embedded(cmdline: &str) -> Self {
        Self::new(embedded_guest(), cmdline)
    }

    /// A machine that boots `kernel`.
    pub fn new(kernel: &Path, cmdline: &str) -> Self {
        Machine {
            kernel: kernel.to_owned(),
            cmdline: cmdline.to_owned(),
            arguments: Vec::new(),
            devices: Vec::new(),
            serial: true,
            lifetime: LIFETIME,
            directory: tempfile::tempdir().unwrap(),
        }
    }

    /// The process that serves device `id`.
    pub fn process(&self, id: &str) -> &Process {
        &self.devices.iter().find(|d| d.id == id).unwrap().process
    }

    /// Appends to the kernel command line.
    pub fn cmdline(mut self, more: &str) -> Self {
        self.cmdline = format!("{} {more}", self.cmdline);
        self
    }

    /// Limits its running time.
    pub fn lifetime(mut self, time: Duration) -> Self {
        self.lifetime = time;
        self
    }

    /// Leaves the platform process out.
    pub fn without_platform(mut self) -> Self {
        self.serial = false;
        self
    }

    /// The machine's directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Adds options of the runner.
    pub fn args<S: Into<String>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Adds a device of `kind` served by `program` with `arguments`.
    pub fn device<S: AsRef<std::ffi::OsStr>>(
        self,
        id: &str,
        kind: &str,
        program: &str,
        arguments: impl IntoIterator<Item = S>,
    ) -> Self {
        let process = Launch::new(program).args(arguments).listening();
        let socket = process.directory().join("socket");
        self.served(id, kind, process, &socket)
    }

    /// Adds a device that a running process serves; `kind` is its type, with further keys if
    /// needed.
    pub fn served(mut self, id: &str, kind: &str, process: Process, socket: &Path) -> Self {
        self.devices.push(Device {
            id: id.to_owned(),
            option: format!("{id},socket={},type={kind}", socket.display()),
            process,
        });
        self
    }

    /// Adds `disk0`, an empty image of `size` bytes in the machine's directory.
    pub fn disk(self, size: u64) -> Self {
        let path = self.disk_path();
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        self.device(
            "disk0",
            "block",
            "device-disk",
            ["--blk-file".as_ref(), path.as_os_str()],
        )
    }

    /// The image of `disk0`.
    pub fn disk_path(&self) -> PathBuf {
        self.directory.path().join("disk.img")
    }

    /// Adds `net0`, an isolated network whose host side is 10.0.2.1.
    pub fn net(self) -> Self {
        self.device("net0", "net", "device-net", ["--isolated", "10.0.2.1/24"])
    }

    /// Adds `console0` on a unix socket in the machine's directory.
    pub fn console(self) -> Self {
        let path = self.directory.path().join("console");
        let arguments = ["--unix".as_ref(), path.as_os_str()];
        self.device("console0", "console", "device-console", arguments)
    }

    /// Starts the platform and then the runner.
    pub fn start(self) -> Running {
        self.prepare().start()
    }

    /// Starts the platform process, so that all device processes run.
    pub fn prepare(self) -> Prepared {
        let platform = self
            .serial
            .then(|| start_platform(self.directory.path(), self.lifetime));
        let events = self.directory.path().join("events");
        let control = self.directory.path().join("control");
        let mut launch = Launch::new("vcpu-runner").args([
            "--kernel".as_ref(),
            self.kernel.as_os_str(),
            "--cmdline".as_ref(),
            self.cmdline.as_ref(),
            "--events".as_ref(),
            events.as_os_str(),
            "--control".as_ref(),
            control.as_os_str(),
        ]);
        for device in &self.devices {
            launch = launch.args(["--device", &device.option]);
        }
        if platform.is_some() {
            let socket = self.directory.path().join("platform");
            launch = launch.args([
                "--platform".to_owned(),
                format!("socket={}", socket.display()),
            ]);
        }
        Prepared {
            launch: launch.args(self.arguments).lifetime(self.lifetime),
            devices: self.devices,
            platform,
            directory: self.directory,
        }
    }
}

/// A machine whose device processes run and whose runner does not run yet.
pub struct Prepared {
    launch: Launch,
    devices: Vec<Device>,
    platform: Option<Process>,
    directory: tempfile::TempDir,
}

impl Prepared {
    /// Path of the file with the serial port's output.
    pub fn serial_path(&self) -> PathBuf {
        self.directory.path().join("serial")
    }

    /// Starts the runner.
    pub fn start(self) -> Running {
        let serial = self.serial_path();
        Running {
            runner: self.launch.spawn(),
            devices: self.devices,
            platform: self.platform,
            serial,
            directory: self.directory,
        }
    }
}

/// Starts a platform process on the socket `platform` in `directory`, with the
/// serial port going to the file `serial` there.
fn start_platform(directory: &Path, lifetime: Duration) -> Process {
    let serial = format!("file={}", directory.join("serial").display());
    let socket = directory.join("platform");
    Launch::new("device-platform")
        .args(["--serial", &serial])
        .lifetime(lifetime)
        .listening_at(&socket)
}

/// A running machine. Dropping it ends all its processes.
pub struct Running {
    /// The runner.
    pub runner: Process,
    devices: Vec<Device>,
    platform: Option<Process>,
    serial: PathBuf,
    directory: tempfile::TempDir,
}

impl Running {
    /// The process that serves device `id`.
    pub fn process(&self, id: &str) -> &Process {
        if id == "platform" {
            return self.platform.as_ref().unwrap();
        }
        &self.devices.iter().find(|d| d.id == id).unwrap().process
    }

    /// The machine's directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Records `process` as the one that serves device `id`; returns the previous one.
    pub fn replace(&mut self, id: &str, process: Process) -> Process {
        let device = self.devices.iter_mut().find(|d| d.id == id).unwrap();
        std::mem::replace(&mut device.process, process)
    }

    /// Kills the platform process and starts another one at the same socket.
    pub fn replace_platform(&mut self) {
        let old = self.platform.take().unwrap();
        old.signal(rustix::process::Signal::KILL);
        old.wait();
        self.platform = Some(start_platform(self.directory.path(), LIFETIME));
    }

    /// Output of the serial port so far.
    pub fn serial(&self) -> String {
        let bytes = std::fs::read(&self.serial).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the serial port's output contains `text`.
    pub fn wait_serial(&self, text: &str) {
        wait_until(&format!("the guest says {text:?}"), || {
            assert!(
                self.runner.is_running() || self.serial().contains(text),
                "the runner has ended; serial: {}\nlog: {}",
                self.serial(),
                self.runner.log()
            );
            self.serial().contains(text)
        });
    }

    /// Events so far.
    pub fn events(&self) -> Vec<MachineEvent> {
        let path = self.directory.path().join("events");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        // The last line may be incomplete.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// Waits for an event.
    pub fn wait_event(&self, what: &str, wanted: impl Fn(&MachineEvent) -> bool) {
        wait_until(what, || self.events().iter().any(&wanted));
    }

    /// Sends a command to the control socket and returns the answer.
    pub fn control(&self, command: &str) -> ControlReply {
        self.control_line(&format!("{{\"command\":\"{command}\"}}"))
    }

    /// Sends a line to the control socket and returns the answer.
    pub fn control_line(&self, line: &str) -> ControlReply {
        let answer = self.try_control_line(line).unwrap();
        serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{line}: {answer:?}: {e}"))
    }

    /// Like [`Running::control`], but the machine may end meanwhile.
    pub fn try_control(&self, command: &str) -> bool {
        self.try_control_line(&format!("{{\"command\":\"{command}\"}}"))
            .is_ok_and(|answer| answer.contains("\"ok\":true"))
    }

    fn try_control_line(&self, line: &str) -> std::io::Result<String> {
        let path = self.directory.path().join("control");
        wait_until("the control socket is there", || path.exists());
        // bind(2) creates the path shortly before listen(2) lets clients connect.
        let deadline = Instant::now() + LISTEN_DEADLINE;
        let mut stream = outrigger_cli::socket::connect(&path, Some(deadline))?;
        stream.set_read_timeout(Some(crate::DEADLINE))?;
        writeln!(stream, "{line}")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(answer)
    }

    /// Waits for the runner to end; returns its exit code.
    pub fn wait(&self) -> i32 {
        let status: ExitStatus = self.runner.wait();
        status.code().unwrap_or_else(|| panic!("{status}"))
    }

    /// Waits until an embedded guest ends, which must pass.
    pub fn passes(&self) {
        self.expect(0);
        let serial = self.serial();
        assert!(serial.contains("guest: pass"), "{serial}");
    }

    /// Waits until the runner ends, which must be with this code.
    pub fn expect(&self, code: i32) {
        let got = self.wait();
        assert_eq!(
            got,
            code,
            "serial: {}\nlog: {}",
            self.serial(),
            self.runner.log()
        );
    }
}

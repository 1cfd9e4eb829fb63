//! QEMU as a foreign VMM: a machine whose devices are our processes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::linux::PATIENCE;
use crate::process::{Launch, Process};

const PROGRAM: &str = "qemu-system-x86_64";

/// A kind of machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Board {
    /// A PC with PCI Express and ACPI.
    Q35,
    /// No PCI and no ACPI: devices are listed on the kernel command line.
    Microvm,
}

impl Board {
    fn machine(self) -> &'static str {
        match self {
            Board::Q35 => "q35",
            Board::Microvm => "microvm,acpi=off,rtc=off,pit=off,pic=off,isa-serial=on",
        }
    }

    /// QEMU's name of a vhost-user device of `kind` on this machine.
    fn device(self, kind: &str) -> String {
        match self {
            Board::Q35 => format!("{kind}-pci"),
            Board::Microvm => kind.to_owned(),
        }
    }

    fn network_card(self) -> &'static str {
        match self {
            Board::Q35 => "virtio-net-pci",
            Board::Microvm => "virtio-net-device",
        }
    }
}

/// Builds a machine.
pub struct Qemu {
    launch: Launch,
    board: Board,
    serial: PathBuf,
}

/// # Panics
/// QEMU is not installed.
fn must_be_there() {
    let version = Command::new(PROGRAM).arg("--version").output();
    if let Err(error) = version {
        panic!("{PROGRAM}: {error}; install it (Debian: qemu-system-x86), or run ./test.sh");
    }
}

/// Output of QEMU for `-device name` without further options.
pub fn qemu_error(name: &str) -> String {
    must_be_there();
    let output = Command::new(PROGRAM)
        .args(["-M", "q35", "-nodefaults", "-display", "none"])
        .args(["-device", name])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    error.lines().next().unwrap_or_default().to_owned()
}

impl Qemu {
    /// A machine with a serial port, `cpus` processors and `memory` MiB of shared memory, which
    /// boots a kernel of the test guest.
    pub fn new(board: Board, cpus: u32, memory: u32, cmdline: &str) -> Self {
        must_be_there();
        let launch = Launch::program(Path::new(PROGRAM)).lifetime(PATIENCE);
        let serial = launch.directory().join("serial");
        let backend = format!("memory-backend-memfd,id=ram,size={memory}M,share=on");
        let launch = launch
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-accel", "kvm"])
            .args(["-cpu", "max,-arch-capabilities"])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .args(["-M", &format!("{},memory-backend=ram", board.machine())])
            .args(["-smp", &cpus.to_string()])
            .args(["-m", &format!("{memory}M")])
            .args(["-object", &backend])
            .args(["-serial", &format!("file:{}", serial.display())])
            .args(["-append", &format!("console=ttyS0 quiet {cmdline}")])
            .args([
                "-kernel".as_ref(),
                crate::linux::guest("vmlinux").as_os_str(),
            ])
            .args([
                "-initrd".as_ref(),
                crate::linux::guest("initramfs.cpio").as_os_str(),
            ]);
        Qemu {
            launch,
            board,
            serial,
        }
    }

    fn chardev(&mut self, id: &str, socket: &Path) {
        let chardev = format!("socket,id={id},path={}", socket.display());
        self.launch.command().args(["-chardev", &chardev]);
    }

    /// Adds a vhost-user device of `kind` (`vhost-user-blk`) behind `process`;
    /// `options` go to the device.
    pub fn device(mut self, kind: &str, process: &Process, options: &str) -> Self {
        let id = format!("c{}", process.pid());
        self.chardev(&id, &process.directory().join("socket"));
        let device = format!("{},chardev={id}{options}", self.board.device(kind));
        self.launch.command().args(["-device", &device]);
        self
    }

    /// Adds a vhost-user device of `kind` on `socket`, to which QEMU reconnects whenever the
    /// connection is lost; `options` go to the device.
    pub fn reconnecting(mut self, kind: &str, socket: &Path, options: &str) -> Self {
        let path = socket.display();
        let chardev = format!("socket,id=again,path={path},reconnect-ms=10");
        let device = format!("{},chardev=again{options}", self.board.device(kind));
        self.launch
            .command()
            .args(["-chardev", &chardev, "-device", &device]);
        self
    }

    /// Adds a network card behind `process`.
    pub fn net(mut self, process: &Process) -> Self {
        let id = format!("c{}", process.pid());
        self.chardev(&id, &process.directory().join("socket"));
        let netdev = format!("vhost-user,id=net,chardev={id}");
        let device = format!("{},netdev=net", self.board.network_card());
        self.launch
            .command()
            .args(["-netdev", &netdev, "-device", &device]);
        self
    }

    /// Adds QEMU options.
    pub fn args<S: AsRef<std::ffi::OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.launch = self.launch.args(args);
        self
    }

    /// Starts it.
    pub fn start(self) -> Running {
        Running {
            process: self.launch.spawn(),
            serial: self.serial,
        }
    }
}

/// A running machine. Dropping it ends it.
pub struct Running {
    /// QEMU.
    pub process: Process,
    serial: PathBuf,
}

impl Running {
    /// Output of the serial port so far.
    pub fn serial(&self) -> String {
        let bytes = std::fs::read(&self.serial).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the output of the serial port contains `text`; returns all output.
    ///
    /// # Panics
    /// It does not in time, or the guest reports a failure.
    pub fn wait_serial(&self, text: &str) -> String {
        let start = Instant::now();
        loop {
            // The state is read first, so that the last output is not missed.
            let running = self.process.is_running();
            let serial = self.serial();
            if serial.contains(text) {
                return serial;
            }
            assert!(
                running && start.elapsed() < PATIENCE && !serial.contains("GUEST FAIL"),
                "the guest never said {text:?}\nserial: {serial}\nlog: {}",
                self.process.log()
            );
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }
}

//! From a machine to the programs that make it up: which arguments, and which
//! descriptors each gets. How they meet is left open, so that the same plan can
//! be run ([`Plan::connect`]) and be written down ([`mod@crate::script`]).

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use clap::ValueEnum;

use crate::config::{
    Console, ConsoleKind, DebugConsole, DebugConsoleKind, Disk, Machine, Net, NetKind, SerialKind,
};

/// One program to start.
pub struct Program {
    /// Its role in the machine: `disk0`, `platform`, …
    pub id: String,
    /// Name of the program.
    pub name: &'static str,
    /// Arguments.
    pub args: Vec<OsString>,
    /// Descriptors that it inherits under their own numbers.
    pub fds: Vec<OwnedFd>,
    /// Reads this terminal.
    pub needs_stdin: bool,
    /// What to show of it.
    pub summary: String,
}

/// A device process.
pub struct Device {
    /// The program, which lacks its socket.
    pub program: Program,
    /// What kind of virtio device it is; `None` for the platform.
    kind: Option<&'static str>,
}

impl Device {
    /// The runner's option that plugs it in, with its socket at `endpoint`:
    /// `fd=N` or `socket=PATH`.
    pub fn option(&self, endpoint: &str) -> (&'static str, String) {
        match self.kind {
            Some(kind) => (
                "--device",
                format!("{},type={kind},{endpoint}", self.program.id),
            ),
            None => ("--platform", endpoint.to_owned()),
        }
    }
}

/// All programs of a machine.
pub struct Plan {
    /// Device processes, in the order of their slots, then the platform.
    pub devices: Vec<Device>,
    /// The runner.
    pub runner: Program,
}

fn args<const N: usize>(words: [&str; N]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

impl Program {
    fn new(id: String, name: &'static str, summary: String) -> Self {
        Program {
            id,
            name,
            args: Vec::new(),
            fds: Vec::new(),
            needs_stdin: false,
            summary,
        }
    }

    fn arg(&mut self, name: &str, value: impl Into<OsString>) {
        self.args.push(name.into());
        self.args.push(value.into());
    }

    fn optional(&mut self, name: &str, value: Option<impl ToString>) {
        if let Some(value) = value {
            self.arg(name, value.to_string());
        }
    }
}

impl Plan {
    /// Plans `machine`, which has been checked.
    pub fn new(machine: &Machine) -> Self {
        let device = |kind, program| Device {
            program,
            kind: Some(kind),
        };
        let mut devices = Vec::new();
        for (index, disk) in machine.disk.iter().enumerate() {
            devices.push(device("block", plan_disk(format!("disk{index}"), disk)));
        }
        for (index, net) in machine.net.iter().enumerate() {
            devices.push(device("net", plan_net(format!("net{index}"), net)));
        }
        for (index, console) in machine.console.iter().enumerate() {
            let program = plan_console(format!("console{index}"), console);
            devices.push(device("console", program));
        }
        devices.push(Device {
            program: plan_platform(machine),
            kind: None,
        });
        let mut runner = plan_runner(machine);
        let programs = devices.iter_mut().map(|device| &mut device.program);
        for program in programs.chain([&mut runner]) {
            program.optional("--sandbox", machine.sandbox.map(word));
            program.arg("--log-level", "warn");
        }
        Plan { devices, runner }
    }

    /// Connects each device process to the runner by a pair of sockets.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn connect(&mut self) -> std::io::Result<()> {
        for device in &mut self.devices {
            let (ours, theirs) = UnixStream::pair()?;
            let (option, value) = device.option(&format!("fd={}", ours.as_raw_fd()));
            self.runner.arg(option, value);
            self.runner.fds.push(ours.into());
            device.program.arg("--fd", theirs.as_raw_fd().to_string());
            device.program.fds.push(theirs.into());
        }
        Ok(())
    }
}

/// A value as it is written.
fn word(value: impl ValueEnum) -> String {
    let value = value.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

fn plan_runner(machine: &Machine) -> Program {
    let mut runner = Program::new("runner".into(), "vcpu-runner", summary(machine));
    if let Some(kernel) = &machine.kernel {
        runner.arg("--kernel", kernel.as_os_str());
    }
    if let Some(initrd) = &machine.initrd {
        runner.arg("--initrd", initrd.as_os_str());
    }
    runner.optional("--cmdline", machine.cmdline.as_ref());
    for load in &machine.load {
        runner.arg("--load", load);
    }
    runner.optional("--entry", machine.entry.as_ref());
    if machine.show_regs {
        runner.args.push("--show-regs".into());
    }
    runner.optional("--memory", machine.memory.as_ref());
    runner.optional("--cpus", machine.cpus);
    if let Some(control) = &machine.control {
        runner.arg("--control", control.as_os_str());
    }
    runner.optional("--on-reset", machine.on_reset.map(word));
    runner
}

fn summary(machine: &Machine) -> String {
    let cpus = machine.cpus.unwrap_or(1);
    let memory = machine.memory.as_deref().unwrap_or("512M");
    let plural = if cpus == 1 { "" } else { "s" };
    format!("{cpus} vCPU{plural}, {memory}")
}

fn plan_disk(id: String, disk: &Disk) -> Program {
    let mode = if disk.readonly { ", read-only" } else { "" };
    let summary = format!("{}{mode}", disk.path.display());
    let mut program = Program::new(id, "device-disk", summary);
    program.arg("--blk-file", disk.path.as_os_str());
    if disk.readonly {
        program.args.push("--read-only".into());
    }
    if !disk.lock {
        program.arg("--lock", "off");
    }
    program.optional("--queues", disk.queues);
    program.optional("--serial", disk.serial.as_ref());
    program
}

fn plan_net(id: String, net: &Net) -> Program {
    let mut program = match net.kind {
        NetKind::Isolated => {
            let address = net.address.as_deref().unwrap_or("10.0.2.1/24");
            let mut program = Program::new(id, "device-net", format!("isolated, {address}"));
            program.args = args(["--isolated", address]);
            program
        }
        NetKind::Tap => {
            let name = net.name.as_deref().unwrap_or_default();
            let mut program = Program::new(id, "device-net", format!("tap {name}"));
            program.args = args(["--tap", name]);
            program
        }
    };
    program.optional("--mac", net.mac.as_ref());
    program.optional("--mtu", net.mtu);
    program
}

fn plan_console(id: String, console: &Console) -> Program {
    let path = console.path.clone().unwrap_or_default();
    let at = |what: &str| format!("{what} {}", path.display());
    let (summary, words): (String, Vec<OsString>) = match console.kind {
        ConsoleKind::Stdio => ("stdio".into(), args(["--stdio"])),
        ConsoleKind::Pty => ("pseudo-terminal".into(), args(["--pty"])),
        ConsoleKind::Unix => (at("socket"), vec!["--unix".into(), path.clone().into()]),
        ConsoleKind::File => (at("file"), vec!["--file".into(), path.clone().into()]),
    };
    let mut program = Program::new(id, "device-console", summary);
    program.args = words;
    if console.kind == ConsoleKind::Pty && console.path.is_some() {
        program.arg("--pty-link", path);
    }
    program.needs_stdin = console.kind == ConsoleKind::Stdio;
    program
}

/// A file as `device-platform` takes it.
fn file(path: Option<&PathBuf>) -> OsString {
    let mut target = OsString::from("file=");
    target.extend(path.map(|path| path.as_os_str()));
    target
}

fn plan_platform(machine: &Machine) -> Program {
    let serial = machine.serial.as_ref();
    let (summary, target): (&str, OsString) = match serial.map(|serial| serial.kind) {
        Some(SerialKind::Stdio) => ("serial port on stdio", "stdio".into()),
        Some(SerialKind::File) => (
            "serial port to a file",
            file(serial.and_then(|serial| serial.path.as_ref())),
        ),
        Some(SerialKind::Null) | None => ("serial port to nowhere", "null".into()),
    };
    let mut program = Program::new("platform".into(), "device-platform", summary.into());
    program.needs_stdin = target == "stdio" && !machine.console_has_stdin();
    program.arg("--serial", target);
    if let Some(DebugConsole { kind, path }) = &machine.debug_console {
        let target = match kind {
            DebugConsoleKind::Stderr => "stderr".into(),
            DebugConsoleKind::Null => "null".into(),
            DebugConsoleKind::File => file(path.as_ref()),
        };
        program.arg("--debug-console", target);
    }
    program
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyval;

    fn machine() -> Machine {
        Machine {
            disk: vec![keyval::parse("path=a.img,readonly=on,lock=off").unwrap()],
            net: vec![keyval::parse("isolated").unwrap()],
            console: vec![keyval::parse("stdio").unwrap()],
            serial: Some(keyval::parse("stdio").unwrap()),
            ..toml::from_str("kernel = 'k'\nsandbox = 'log'").unwrap()
        }
    }

    /// Whether `words` are among the arguments, one behind the other.
    fn has(program: &Program, words: &[&str]) -> bool {
        program.args.windows(words.len()).any(|args| args == words)
    }

    #[test]
    fn every_device_shares_a_socket_with_the_runner() {
        let mut plan = Plan::new(&machine());
        plan.connect().unwrap();
        let programs: Vec<_> = plan.devices.iter().map(|d| &d.program).collect();
        let names: Vec<_> = programs.iter().map(|program| program.id.as_str()).collect();
        assert_eq!(names, ["disk0", "net0", "console0", "platform"]);
        assert_eq!(plan.runner.fds.len(), 4);
        assert!(has(programs[0], &["--read-only", "--lock", "off"]));
        assert!(programs[2].needs_stdin && !programs[3].needs_stdin);
        let devices = plan.runner.args.iter().filter(|a| *a == "--device");
        assert_eq!(devices.count(), 3);
        for program in programs.into_iter().chain([&plan.runner]) {
            assert!(has(program, &["--sandbox", "log"]), "{}", program.id);
        }
    }

    #[test]
    fn what_is_for_the_runner_and_the_platform_reaches_them() {
        let machine: Machine = toml::from_str(
            "load = ['a.bin@0xf0000', 'b.bin@0x100000']\nentry = 'protected'\n\
             show-regs = true\non-reset = 'exit'\n\
             [debug-console]\ntype = 'file'\npath = 'debug'",
        )
        .unwrap();
        machine.check().unwrap();
        let plan = Plan::new(&machine);
        let loads = ["--load", "a.bin@0xf0000", "--load", "b.bin@0x100000"];
        assert!(has(&plan.runner, &loads));
        assert!(has(&plan.runner, &["--entry", "protected"]));
        assert!(has(&plan.runner, &["--show-regs"]));
        assert!(has(&plan.runner, &["--on-reset", "exit"]));
        assert!(!has(&plan.runner, &["--kernel"]));
        let platform = &plan.devices[0].program;
        assert!(has(platform, &["--debug-console", "file=debug"]));
    }
}

//! From a machine to the programs that make it up: which arguments, and which
//! descriptors each gets.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use crate::config::{Console, ConsoleKind, Disk, Machine, Net, NetKind, Serial, SerialKind};

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

/// All programs of a machine.
pub struct Plan {
    /// Device processes, in the order of their slots, then the platform.
    pub devices: Vec<Program>,
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
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn new(machine: &Machine) -> std::io::Result<Self> {
        let mut devices = Vec::new();
        let mut runner = Program::new("runner".into(), "vcpu-runner", summary(machine));
        for (index, disk) in machine.disk.iter().enumerate() {
            let mut program = plan_disk(format!("disk{index}"), disk);
            connect(&mut runner, &mut program, "block")?;
            devices.push(program);
        }
        for (index, net) in machine.net.iter().enumerate() {
            let mut program = plan_net(format!("net{index}"), net);
            connect(&mut runner, &mut program, "net")?;
            devices.push(program);
        }
        for (index, console) in machine.console.iter().enumerate() {
            let mut program = plan_console(format!("console{index}"), console);
            connect(&mut runner, &mut program, "console")?;
            devices.push(program);
        }
        let mut platform = plan_platform(machine);
        let ours = socket(&mut platform)?;
        runner.arg("--platform", format!("fd={}", ours.as_raw_fd()));
        runner.fds.push(ours);
        devices.push(platform);

        runner.arg("--kernel", machine.kernel.as_os_str());
        if let Some(initrd) = &machine.initrd {
            runner.arg("--initrd", initrd.as_os_str());
        }
        runner.optional("--cmdline", machine.cmdline.as_ref());
        runner.optional("--memory", machine.memory.as_ref());
        runner.optional("--cpus", machine.cpus);
        if let Some(control) = &machine.control {
            runner.arg("--control", control.as_os_str());
        }
        runner.optional("--on-reset", machine.on_reset.as_ref());
        for program in devices.iter_mut().chain([&mut runner]) {
            program.optional("--sandbox", machine.sandbox.as_ref());
            program.arg("--log-level", "warn");
        }
        Ok(Plan { devices, runner })
    }
}

/// Makes the socket between runner and `program`; returns the runner's end.
fn socket(program: &mut Program) -> std::io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    program.arg("--fd", theirs.as_raw_fd().to_string());
    program.fds.push(theirs.into());
    Ok(ours.into())
}

fn connect(runner: &mut Program, program: &mut Program, kind: &str) -> std::io::Result<()> {
    let ours = socket(program)?;
    let device = format!("{},type={kind},fd={}", program.id, ours.as_raw_fd());
    runner.arg("--device", device);
    runner.fds.push(ours);
    Ok(())
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

fn plan_platform(machine: &Machine) -> Program {
    let mut program = Program::new("platform".into(), "device-platform", String::new());
    let (summary, target): (&str, OsString) = match &machine.serial {
        Some(Serial {
            kind: SerialKind::Stdio,
            ..
        }) => ("serial port on stdio", "stdio".into()),
        Some(Serial {
            kind: SerialKind::File,
            path,
        }) => {
            let mut target = OsString::from("file=");
            target.push(path.clone().unwrap_or(PathBuf::new()));
            ("serial port to a file", target)
        }
        _ => ("serial port to nowhere", "null".into()),
    };
    program.summary = summary.into();
    program.needs_stdin = target == "stdio" && !machine.console_has_stdin();
    program.arg("--serial", target);
    program
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyval;

    #[test]
    fn every_device_shares_a_socket_with_the_runner() {
        let machine = Machine {
            disk: vec![keyval::parse("path=a.img,readonly=on").unwrap()],
            net: vec![keyval::parse("isolated").unwrap()],
            console: vec![keyval::parse("stdio").unwrap()],
            serial: Some(keyval::parse("stdio").unwrap()),
            ..toml::from_str("kernel = 'k'").unwrap()
        };
        let plan = Plan::new(&machine).unwrap();
        let names: Vec<_> = plan.devices.iter().map(|d| d.id.as_str()).collect();
        assert_eq!(names, ["disk0", "net0", "console0", "platform"]);
        assert_eq!(plan.runner.fds.len(), 4);
        assert!(plan.devices[0].args.contains(&"--read-only".into()));
        assert!(plan.devices[2].needs_stdin && !plan.devices[3].needs_stdin);
        let devices = plan.runner.args.iter().filter(|a| *a == "--device");
        assert_eq!(devices.count(), 3);
    }
}

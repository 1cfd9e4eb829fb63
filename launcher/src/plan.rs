//! From a machine to the programs that make it up: which arguments and which
//! resources of the host each gets. How they meet is left open, so that the same plan
//! can be run ([`mod@crate::supervise`]) and be written down ([`mod@crate::script`]).

use std::ffi::OsString;
use std::os::fd::OwnedFd;

use clap::ValueEnum;

use crate::config::{
    Console, ConsoleKind, DebugConsole, DebugConsoleKind, Disk, Machine, Net, NetKind, Restart,
    SerialKind,
};
use crate::resource::Resource;

/// One program to start.
#[derive(Clone)]
pub struct Program {
    /// Its role in the machine: `disk0`, `platform`, …
    pub id: String,
    /// Name of the program.
    pub name: &'static str,
    /// Arguments.
    pub args: Vec<OsString>,
    /// What it opens, or what is opened for it.
    pub resources: Vec<Resource>,
    /// Reads this terminal.
    pub needs_stdin: bool,
    /// Has a control socket of its own.
    pub has_control: bool,
    /// What to show of it.
    pub summary: String,
}

/// A device process.
pub struct Device {
    /// The program, which lacks its socket.
    pub program: Program,
    /// What kind of virtio device it is; `None` for the platform.
    pub kind: Option<&'static str>,
}

impl Device {
    /// The runner's option that plugs it in, with its socket at `path`.
    pub fn option(&self, path: &str) -> (&'static str, String) {
        match self.kind {
            Some(kind) => (
                "--device",
                format!("{},type={kind},socket={path}", self.program.id),
            ),
            None => ("--platform", format!("socket={path}")),
        }
    }
}

/// All programs of a machine.
pub struct Plan {
    /// Device processes, in the order of their slots, then the platform.
    pub devices: Vec<Device>,
    /// The runner.
    pub runner: Program,
    /// Descriptors that it inherits under their own numbers.
    pub inherited: Vec<OwnedFd>,
    /// When device processes are started again.
    pub restart: Restart,
}

/// The name of the platform's process.
pub const PLATFORM: &str = "platform";

fn args<const N: usize>(words: [&str; N]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

impl Program {
    fn new(id: String, name: &'static str, summary: String) -> Self {
        Program {
            id,
            name,
            args: Vec::new(),
            resources: Vec::new(),
            needs_stdin: false,
            has_control: false,
            summary,
        }
    }

    /// Adds an option with its value.
    pub fn arg(&mut self, name: &str, value: impl Into<OsString>) {
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
        let mut devices = Vec::new();
        for index in 0..machine.disk.len() {
            devices.extend(device(machine, &format!("disk{index}")));
        }
        for index in 0..machine.net.len() {
            devices.extend(device(machine, &format!("net{index}")));
        }
        for index in 0..machine.console.len() {
            devices.extend(device(machine, &format!("console{index}")));
        }
        devices.extend(device(machine, PLATFORM));
        let mut runner = plan_runner(machine);
        everywhere(&mut runner, machine);
        Plan {
            devices,
            runner,
            inherited: Vec::new(),
            restart: machine.restart.unwrap_or_default(),
        }
    }
}

/// Splits the name of a device, `disk0`, into its kind and its number.
pub fn split(id: &str) -> Option<(&str, usize)> {
    let digits = id.find(|c: char| c.is_ascii_digit())?;
    Some((&id[..digits], id[digits..].parse().ok()?))
}

/// The device of `machine` that is called `id`, if there is one.
pub fn device(machine: &Machine, id: &str) -> Option<Device> {
    let (kind, mut program) = if id == PLATFORM {
        (None, plan_platform(machine))
    } else {
        let (kind, index) = split(id)?;
        let id = id.to_owned();
        match kind {
            "disk" => (Some("block"), plan_disk(id, machine.disk.get(index)?)),
            "net" => (Some("net"), plan_net(id, machine.net.get(index)?)),
            "console" => (
                Some("console"),
                plan_console(id, machine.console.get(index)?),
            ),
            _ => return None,
        }
    };
    everywhere(&mut program, machine);
    Some(Device { program, kind })
}

/// What every program is told.
fn everywhere(program: &mut Program, machine: &Machine) {
    program.optional("--sandbox", machine.sandbox.map(word));
    program.arg("--log-level", "warn");
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
    runner.optional("--on-reset", machine.on_reset.map(word));
    runner.optional("--on-loss", machine.on_loss.as_ref());
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
    program.resources.push(Resource::Image {
        path: disk.path.clone(),
        readonly: disk.readonly,
    });
    if disk.readonly {
        program.args.push("--read-only".into());
    }
    if !disk.lock {
        program.arg("--lock", "off");
    }
    program.has_control = true;
    program.optional("--format", disk.format.map(word));
    program.optional("--backing", disk.backing.map(word));
    program.optional("--cache", disk.cache.map(word));
    program.optional("--queues", disk.queues);
    program.optional("--poll-us", disk.poll_us);
    program.optional("--block-size", disk.block_size);
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
            program.resources.push(Resource::Tap { name: name.into() });
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
    let (summary, resource) = match console.kind {
        ConsoleKind::Stdio => ("stdio".into(), None),
        ConsoleKind::Pty => (
            "pseudo-terminal".into(),
            Some(Resource::Pty {
                link: console.path.clone(),
            }),
        ),
        ConsoleKind::Unix => (at("socket"), Some(Resource::Listener { path })),
        ConsoleKind::File => (at("file"), Some(Resource::Log { path })),
    };
    let mut program = Program::new(id, "device-console", summary);
    program.needs_stdin = resource.is_none();
    match resource {
        Some(resource) => program.resources.push(resource),
        None => program.args.push("--stdio".into()),
    }
    program.resources.push(Resource::Backlog);
    program
}

fn plan_platform(machine: &Machine) -> Program {
    let serial = machine.serial.as_ref();
    let kind = serial.map_or(SerialKind::Null, |serial| serial.kind);
    let summary = match kind {
        SerialKind::Stdio => "serial port on stdio",
        SerialKind::File => "serial port to a file",
        SerialKind::Null => "serial port to nowhere",
    };
    let mut program = Program::new(PLATFORM.into(), "device-platform", summary.into());
    let output = |option, path: Option<&_>| Resource::Output {
        option,
        path: path.cloned().unwrap_or_default(),
    };
    match kind {
        SerialKind::Stdio => program.arg("--serial", "stdio"),
        SerialKind::Null => program.arg("--serial", "null"),
        SerialKind::File => {
            let path = serial.and_then(|serial| serial.path.as_ref());
            program.resources.push(output("--serial", path));
        }
    }
    program.needs_stdin = kind == SerialKind::Stdio && !machine.console_has_stdin();
    match &machine.debug_console {
        None => {}
        Some(DebugConsole { kind, path }) => match kind {
            DebugConsoleKind::Stderr => program.arg("--debug-console", "stderr"),
            DebugConsoleKind::Null => program.arg("--debug-console", "null"),
            DebugConsoleKind::File => {
                let file = output("--debug-console", path.as_ref());
                program.resources.push(file);
            }
        },
    }
    program
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

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
    fn every_device_has_a_program_and_the_runner_comes_last() {
        let plan = Plan::new(&machine());
        let programs: Vec<_> = plan.devices.iter().map(|d| &d.program).collect();
        let names: Vec<_> = programs.iter().map(|program| program.id.as_str()).collect();
        assert_eq!(names, ["disk0", "net0", "console0", "platform"]);
        assert!(has(programs[0], &["--read-only", "--lock", "off"]));
        assert!(programs[2].needs_stdin && !programs[3].needs_stdin);
        assert_eq!(
            plan.devices[0].option("/run/a"),
            ("--device", "disk0,type=block,socket=/run/a".into())
        );
        assert_eq!(
            plan.devices[3].option("/run/b"),
            ("--platform", "socket=/run/b".into())
        );
        for program in programs.into_iter().chain([&plan.runner]) {
            assert!(has(program, &["--sandbox", "log"]), "{}", program.id);
        }
    }

    #[test]
    fn a_disk_is_told_what_was_given_and_no_more() {
        let disk = |text: &str| plan_disk("disk0".into(), &keyval::parse(text).unwrap());
        assert!(disk("path=a").args.is_empty());
        let all =
            disk("path=a,format=qcow,backing=deny,cache=unsafe,queues=2,poll-us=0,block-size=512");
        assert_eq!(
            all.args.join(OsStr::new(" ")),
            "--format qcow --backing deny --cache unsafe --queues 2 --poll-us 0 --block-size 512"
        );
    }

    #[test]
    fn a_device_is_found_by_its_name() {
        let machine = machine();
        for id in ["disk0", "net0", "console0", "platform"] {
            assert_eq!(device(&machine, id).unwrap().program.id, id);
        }
        for id in [
            "disk1",
            "disk",
            "runner",
            "",
            "0",
            "disk0x",
            "disk99999999999999999999",
        ] {
            assert!(device(&machine, id).is_none(), "{id}");
        }
    }

    #[test]
    fn what_is_for_the_runner_and_the_platform_reaches_them() {
        let machine: Machine = toml::from_str(
            "load = ['a.bin@0xf0000', 'b.bin@0x100000']\nentry = 'protected'\n\
             show-regs = true\non-reset = 'exit'\non-loss = 'error:3'\n\
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
        assert!(has(&plan.runner, &["--on-loss", "error:3"]));
        assert!(!has(&plan.runner, &["--kernel"]));
        let debug = plan.devices[0].program.resources[0].by_path();
        assert_eq!(debug, ["--debug-console", "file=debug"]);
    }
}

//! Derives the programs of a machine from its description: the arguments and the host
//! resources of each. The sockets between them are left open, so that the same plan can be run
//! by [`crate::supervise`] and printed by [`mod@crate::script`].

use std::ffi::OsString;
use std::os::fd::OwnedFd;

use crate::config::{
    ConsoleConfig, ConsoleKind, DebugConsoleConfig, DebugConsoleKind, DiskConfig, MachineConfig,
    NetConfig, NetKind, RestartPolicy, SerialKind,
};
use crate::resource::HostResource;

/// One program to start.
#[derive(Clone)]
pub struct ProgramPlan {
    /// The device that it serves, such as `disk0` or `platform`; or `runner`.
    pub id: String,
    /// Name of the executable.
    pub name: &'static str,
    /// Arguments, without those for resources and sockets.
    pub args: Vec<OsString>,
    /// The host resources that it uses.
    pub resources: Vec<HostResource>,
    /// Whether it reads from the launcher's terminal.
    pub needs_stdin: bool,
    /// Whether it has a control socket.
    pub has_control: bool,
    /// A description for the user.
    pub summary: String,
}

/// A device process.
pub struct DevicePlan {
    /// The program of its process.
    pub program: ProgramPlan,
    /// The virtio device type as the runner names it; `None` for the platform.
    pub kind: Option<&'static str>,
}

impl DevicePlan {
    /// Returns the option of the runner that attaches the device, whose socket is at `path`.
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
pub struct MachinePlan {
    /// The devices in the order of their PCI slots, then the platform.
    pub devices: Vec<DevicePlan>,
    /// The runner.
    pub runner: ProgramPlan,
    /// Descriptors that the runner inherits with unchanged numbers.
    pub inherited: Vec<OwnedFd>,
    /// When device processes that have ended are started again.
    pub restart: RestartPolicy,
}

/// The id of the platform process.
pub const PLATFORM: &str = "platform";

impl ProgramPlan {
    fn new(id: String, name: &'static str, summary: String) -> Self {
        ProgramPlan {
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

    fn optional_arg(&mut self, name: &str, value: Option<impl ToString>) {
        if let Some(value) = value {
            self.arg(name, value.to_string());
        }
    }
}

impl MachinePlan {
    /// Plans `machine`, which must have passed [`MachineConfig::check`].
    pub fn new(machine: &MachineConfig) -> Self {
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
        common_args(&mut runner, machine);
        MachinePlan {
            devices,
            runner,
            inherited: Vec::new(),
            restart: machine.restart.unwrap_or_default(),
        }
    }
}

/// Splits a device id such as `disk0` into its kind and its index.
pub fn split_id(id: &str) -> Option<(&str, usize)> {
    let digits = id.find(|c: char| c.is_ascii_digit())?;
    Some((&id[..digits], id[digits..].parse().ok()?))
}

/// Plans the device `id` of `machine`, if it exists.
pub fn device(machine: &MachineConfig, id: &str) -> Option<DevicePlan> {
    let (kind, mut program) = if id == PLATFORM {
        (None, plan_platform(machine))
    } else {
        let (kind, index) = split_id(id)?;
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
    program.arg("--id", id);
    common_args(&mut program, machine);
    Some(DevicePlan { program, kind })
}

/// Adds the arguments that every program gets.
fn common_args(program: &mut ProgramPlan, machine: &MachineConfig) {
    program.optional_arg("--sandbox", machine.sandbox);
    program.arg("--log-level", "warn");
}

fn plan_runner(machine: &MachineConfig) -> ProgramPlan {
    let mut runner = ProgramPlan::new("runner".into(), "vcpu-runner", summary(machine));
    if let Some(kernel) = &machine.kernel {
        runner.arg("--kernel", kernel.as_os_str());
    }
    if let Some(initrd) = &machine.initrd {
        runner.arg("--initrd", initrd.as_os_str());
    }
    runner.optional_arg("--cmdline", machine.cmdline.as_ref());
    for load in &machine.load {
        runner.arg("--load", load);
    }
    runner.optional_arg("--entry", machine.entry.as_ref());
    if machine.show_regs {
        runner.args.push("--show-regs".into());
    }
    runner.optional_arg("--memory", machine.memory.as_ref());
    runner.optional_arg("--cpus", machine.cpus);
    runner.optional_arg("--on-reset", machine.on_reset);
    runner.optional_arg("--on-loss", machine.on_loss.as_ref());
    runner
}

fn summary(machine: &MachineConfig) -> String {
    let cpus = machine.cpus.unwrap_or(1);
    let memory = machine.memory.as_deref().unwrap_or("512M");
    let plural = if cpus == 1 { "" } else { "s" };
    format!("{cpus} vCPU{plural}, {memory}")
}

fn plan_disk(id: String, disk: &DiskConfig) -> ProgramPlan {
    let mode = if disk.readonly { ", read-only" } else { "" };
    let summary = format!("{}{mode}", disk.path.display());
    let mut program = ProgramPlan::new(id, "device-disk", summary);
    program.resources.push(HostResource::Image {
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
    program.optional_arg("--format", disk.format);
    program.optional_arg("--backing", disk.backing);
    program.optional_arg("--cache", disk.cache);
    program.optional_arg("--queues", disk.queues);
    program.optional_arg("--poll-us", disk.poll_us);
    program.optional_arg("--block-size", disk.block_size);
    program.optional_arg("--serial", disk.serial.as_ref());
    program
}

fn plan_net(id: String, net: &NetConfig) -> ProgramPlan {
    let mut program = match net.kind {
        NetKind::Isolated => {
            let address = net.address.as_deref().unwrap_or("10.0.2.1/24");
            let mut program = ProgramPlan::new(id, "device-net", format!("isolated, {address}"));
            program.arg("--isolated", address);
            program
        }
        NetKind::Tap => {
            let name = net.name.as_deref().unwrap_or_default();
            let mut program = ProgramPlan::new(id, "device-net", format!("tap {name}"));
            program
                .resources
                .push(HostResource::Tap { name: name.into() });
            program
        }
    };
    program.optional_arg("--mac", net.mac.as_ref());
    program.optional_arg("--mtu", net.mtu);
    program
}

fn plan_console(id: String, console: &ConsoleConfig) -> ProgramPlan {
    let path = console.path.clone().unwrap_or_default();
    let at = |what: &str| format!("{what} {}", path.display());
    let (summary, resource) = match console.kind {
        ConsoleKind::Stdio => ("stdio".into(), None),
        ConsoleKind::Pty => (
            "pseudo-terminal".into(),
            Some(HostResource::Pty {
                link: console.path.clone(),
            }),
        ),
        ConsoleKind::Unix => (at("socket"), Some(HostResource::Listener { path })),
        ConsoleKind::File => (at("file"), Some(HostResource::Log { path })),
    };
    let mut program = ProgramPlan::new(id, "device-console", summary);
    program.needs_stdin = resource.is_none();
    match resource {
        Some(resource) => program.resources.push(resource),
        None => program.args.push("--stdio".into()),
    }
    program.resources.push(HostResource::Backlog);
    program
}

fn plan_platform(machine: &MachineConfig) -> ProgramPlan {
    let serial = machine.serial.as_ref();
    let kind = serial.map_or(SerialKind::Null, |serial| serial.kind);
    let summary = match kind {
        SerialKind::Stdio => "serial port on stdio",
        SerialKind::File => "serial port to a file",
        SerialKind::Null => "serial port output discarded",
    };
    let mut program = ProgramPlan::new(PLATFORM.into(), "device-platform", summary.into());
    let output = |option, path: Option<&_>| HostResource::Output {
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
        Some(DebugConsoleConfig { kind, path }) => match kind {
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

    fn machine() -> MachineConfig {
        MachineConfig {
            disk: vec![keyval::parse("path=a.img,readonly=on,lock=off").unwrap()],
            net: vec![keyval::parse("isolated").unwrap()],
            console: vec![keyval::parse("stdio").unwrap()],
            serial: Some(keyval::parse("stdio").unwrap()),
            ..toml::from_str("kernel = 'k'\nsandbox = 'log'").unwrap()
        }
    }

    /// Whether the arguments contain `words` in sequence.
    fn has(program: &ProgramPlan, words: &[&str]) -> bool {
        program.args.windows(words.len()).any(|args| args == words)
    }

    #[test]
    fn every_device_has_a_program_in_slot_order() {
        let plan = MachinePlan::new(&machine());
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
        for program in &programs {
            assert!(has(program, &["--id", &program.id]), "{}", program.id);
        }
        for program in programs.into_iter().chain([&plan.runner]) {
            assert!(has(program, &["--sandbox", "log"]), "{}", program.id);
        }
    }

    #[test]
    fn a_disk_program_gets_exactly_the_options_that_were_given() {
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
    fn a_device_is_found_by_its_id() {
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
    fn options_of_the_runner_and_the_platform_are_passed_on() {
        let machine: MachineConfig = toml::from_str(
            "load = ['a.bin@0xf0000', 'b.bin@0x100000']\nentry = 'protected'\n\
             show-regs = true\non-reset = 'exit'\non-loss = 'error:3'\n\
             [debug-console]\ntype = 'file'\npath = 'debug'",
        )
        .unwrap();
        machine.check().unwrap();
        let plan = MachinePlan::new(&machine);
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

//! The description of a virtual machine. One schema serves the command line of `outrigger
//! run` (clap) and the VM file (serde): every field is an option and a key.
//!
//! Documentation comments on fields of [`MachineConfig`] are the help texts.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use outrigger_cli::{BackingPolicy, CacheMode, ImageFormat, OnReset};
use outrigger_sandbox::SandboxMode;
use serde::Deserialize;

use crate::keyval;

/// A virtual machine.
#[derive(Args, Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MachineConfig {
    /// Kernel to boot: ELF or bzImage
    #[arg(long, value_name = "FILE", required_unless_present = "load")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,

    /// Instead of a kernel: a file to copy unchanged to an address of guest memory; may be
    /// given several times
    #[arg(long, value_name = "FILE@ADDR", conflicts_with = "kernel")]
    #[serde(default)]
    pub load: Vec<String>,

    /// CPU mode and address in which the loaded files start
    #[arg(long, value_name = "real|protected|long[=ADDR]", requires = "load")]
    pub entry: Option<String>,

    /// Print the registers of each vCPU before the machine runs
    #[arg(long)]
    #[serde(default)]
    pub show_regs: bool,

    /// Guest RAM
    #[arg(long, value_name = "SIZE[,hugepages=2M|1G|thp]")]
    pub memory: Option<String>,

    /// Number of vCPUs
    #[arg(long, value_name = "N")]
    pub cpus: Option<u8>,

    /// A disk; may be given several times
    ///
    /// Keys besides path: readonly=on, lock=off, format=raw|qcow2|qcow,
    /// backing=allow|deny, cache=writeback|none|unsafe, queues=N, poll-us=N,
    /// block-size=512|4096, serial=TEXT. They have the meaning of the options of
    /// device-disk
    #[arg(long, value_name = "path=FILE[,format=F][,KEY=VALUE...]",
          value_parser = keyval::parse::<DiskConfig>)]
    #[serde(default)]
    pub disk: Vec<DiskConfig>,

    /// A network interface; may be given several times
    #[arg(long, value_name = "isolated[,address=A/N]|tap,name=T[,mac=M][,mtu=N]",
          value_parser = keyval::parse::<NetConfig>)]
    #[serde(default)]
    pub net: Vec<NetConfig>,

    /// A virtio console; may be given several times
    #[arg(long, value_name = "stdio|pty[,path=LINK]|unix,path=P|file,path=P",
          value_parser = keyval::parse::<ConsoleConfig>)]
    #[serde(default)]
    pub console: Vec<ConsoleConfig>,

    /// Where the serial port is connected [default: null]
    #[arg(long, value_name = "stdio|null|file,path=P",
          value_parser = keyval::parse::<SerialConfig>)]
    pub serial: Option<SerialConfig>,

    /// Where bytes written to the debug ports go [default: to the serial port's output]
    #[arg(long, value_name = "stderr|null|file,path=P",
          value_parser = keyval::parse::<DebugConsoleConfig>)]
    pub debug_console: Option<DebugConsoleConfig>,

    /// Unix socket to create for control commands, which `outrigger ctl` sends
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// What happens when the guest resets the machine
    #[arg(long, value_enum, value_name = "reset|exit")]
    pub on_reset: Option<OnReset>,

    /// When a device process that has ended is started again [default: on-failure]
    #[arg(long, value_enum, value_name = "always|on-failure|never")]
    pub restart: Option<RestartPolicy>,

    /// What happens when a device process is lost: the device waits for a successor without
    /// limit; or, after SECONDS, the guest's driver is told that the device failed, or the
    /// machine ends with exit code 5 [default: wait]
    #[arg(long, value_name = "wait|error[:SECONDS]|stop[:SECONDS]")]
    pub on_loss: Option<String>,

    /// Confine the processes. With log, a forbidden system call is logged and not refused
    #[arg(long, value_name = "on|log|off", value_parser = sandbox_modes())]
    pub sandbox: Option<SandboxMode>,
}

/// The values of `--sandbox`, which shell completion offers.
fn sandbox_modes() -> impl TypedValueParser<Value = SandboxMode> {
    PossibleValuesParser::new(["on", "log", "off"]).try_map(|word| word.parse::<SandboxMode>())
}

/// When a device process that has ended is started again.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Always
    Always,
    /// When a signal killed it or its exit code is not 0
    #[default]
    OnFailure,
    /// Never
    Never,
}

/// A disk. Options that are not given get the defaults of device-disk.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskConfig {
    /// Image file or block device.
    pub path: PathBuf,
    /// Refuse writes.
    #[serde(default)]
    pub readonly: bool,
    /// Lock the image against other programs.
    #[serde(default = "locked")]
    pub lock: bool,
    /// Format of the image.
    pub format: Option<ImageFormat>,
    /// Whether the backing file that the image names is opened.
    pub backing: Option<BackingPolicy>,
    /// How writes reach the medium.
    pub cache: Option<CacheMode>,
    /// Number of queues.
    pub queues: Option<u16>,
    /// For how many microseconds the thread of a queue polls for requests before it sleeps.
    pub poll_us: Option<u32>,
    /// Logical block size in bytes, 512 or 4096.
    pub block_size: Option<u16>,
    /// Serial number.
    pub serial: Option<String>,
}

fn locked() -> bool {
    true
}

/// What a network interface is connected to.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum NetKind {
    /// A new network namespace that has a single address.
    Isolated,
    /// An existing tap device.
    Tap,
}

/// A network interface.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// What it is connected to.
    #[serde(rename = "type")]
    pub kind: NetKind,
    /// For `isolated`: the address in the namespace, with its prefix length.
    pub address: Option<String>,
    /// For `tap`: the name of the tap device.
    pub name: Option<String>,
    /// The guest's MAC address.
    pub mac: Option<String>,
    /// Largest packet in bytes.
    pub mtu: Option<u16>,
}

/// What a virtio console is connected to.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleKind {
    /// The terminal of the launcher.
    Stdio,
    /// A new pseudo-terminal.
    Pty,
    /// A unix socket that clients connect to.
    Unix,
    /// A file, for output only.
    File,
}

/// A virtio console.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// What it is connected to.
    #[serde(rename = "type")]
    pub kind: ConsoleKind,
    /// The socket or the file; for `pty`, a symbolic link to create.
    pub path: Option<PathBuf>,
}

/// What the serial port is connected to.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum SerialKind {
    /// The terminal of the launcher; for output only if a console has it.
    Stdio,
    /// Nothing: output is discarded.
    Null,
    /// A file that output is appended to.
    File,
}

/// The serial port.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// What it is connected to.
    #[serde(rename = "type")]
    pub kind: SerialKind,
    /// The file.
    pub path: Option<PathBuf>,
}

/// Where bytes written to the debug ports go.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum DebugConsoleKind {
    /// Standard error.
    Stderr,
    /// Nowhere: they are discarded.
    Null,
    /// A file that they are appended to.
    File,
}

/// The debug ports.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct DebugConsoleConfig {
    /// Where the bytes go.
    #[serde(rename = "type")]
    pub kind: DebugConsoleKind,
    /// The file.
    pub path: Option<PathBuf>,
}

impl MachineConfig {
    /// Whether a console reads from the launcher's terminal. The serial port then must not.
    pub fn console_has_stdin(&self) -> bool {
        self.console.iter().any(|c| c.kind == ConsoleKind::Stdio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_and_the_vm_file_have_the_same_meaning() {
        let file: MachineConfig = toml::from_str(
            r#"
            kernel = "vmlinux"
            cpus = 2
            on-reset = "exit"
            restart = "on-failure"
            on-loss = "stop:5"
            sandbox = "log"
            [[disk]]
            path = "a.img"
            readonly = true
            lock = false
            format = "qcow2"
            backing = "allow"
            cache = "none"
            queues = 4
            poll-us = 50
            block-size = 4096
            serial = "123"
            [[net]]
            type = "isolated"
            address = "10.1.0.1/24"
            mtu = 1400
            [[console]]
            type = "pty"
            [debug-console]
            type = "file"
            path = "debug"
            "#,
        )
        .unwrap();
        file.check().unwrap();
        #[derive(clap::Parser)]
        struct RunOptions {
            #[command(flatten)]
            machine: MachineConfig,
        }
        let options: RunOptions = clap::Parser::try_parse_from([
            "run",
            "--kernel=vmlinux",
            "--cpus=2",
            "--on-reset=exit",
            "--restart=on-failure",
            "--on-loss=stop:5",
            "--sandbox=log",
            "--disk=path=a.img,readonly=on,lock=off,format=qcow2,backing=allow,cache=none,\
             queues=4,poll-us=50,block-size=4096,serial=123",
            "--net=isolated,address=10.1.0.1/24,mtu=1400",
            "--console=pty",
            "--debug-console=file,path=debug",
        ])
        .unwrap();
        assert_eq!(options.machine, file);
        assert_eq!(file.on_reset, Some(OnReset::Exit));
        assert_eq!(file.restart, Some(RestartPolicy::OnFailure));
        assert_eq!(file.on_loss.as_deref(), Some("stop:5"));
        assert_eq!(file.disk[0].queues, Some(4));
    }
}

//! A virtual machine as the user describes it: the one schema of the VM file
//! (TOML) and of the `key=value` options.

use std::path::PathBuf;

use clap::ValueEnum;
use serde::Deserialize;

/// A machine.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Machine {
    /// Kernel to boot.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// In place of a kernel: files and addresses as `vcpu-runner --load` takes them.
    #[serde(default)]
    pub load: Vec<String>,
    /// How to start what was loaded, as `vcpu-runner --entry` takes it.
    pub entry: Option<String>,
    /// Print the registers before the run.
    #[serde(default)]
    pub show_regs: bool,
    /// Guest RAM as `vcpu-runner --memory` takes it.
    pub memory: Option<String>,
    /// Number of vCPUs.
    pub cpus: Option<u8>,
    /// Disks.
    #[serde(default)]
    pub disk: Vec<Disk>,
    /// Networks.
    #[serde(default)]
    pub net: Vec<Net>,
    /// Virtio consoles.
    #[serde(default)]
    pub console: Vec<Console>,
    /// Where the serial port goes; nowhere if not given.
    pub serial: Option<Serial>,
    /// Where bytes to the debug ports go; where the serial port's go if not given.
    pub debug_console: Option<DebugConsole>,
    /// Control socket to create.
    pub control: Option<PathBuf>,
    /// What a guest's reset does.
    pub on_reset: Option<OnReset>,
    /// When a device process is started again.
    pub restart: Option<Restart>,
    /// What a lost device means for the machine, as `vcpu-runner --on-loss` takes it.
    pub on_loss: Option<String>,
    /// Confinement of all processes.
    pub sandbox: Option<Sandbox>,
}

/// What a guest's reset does.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OnReset {
    /// The machine starts again
    Reset,
    /// The machine ends with code 3
    Exit,
}

/// When a device process that has ended is started again.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// However it ended
    Always,
    /// When it was killed, or its exit code is not 0
    #[default]
    OnFailure,
    /// Not at all
    Never,
}

/// Whether processes are confined.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Sandbox {
    /// They are
    On,
    /// What would be forbidden is logged
    Log,
    /// They are not
    Off,
}

/// Forms that a disk image can have.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// QEMU's, version 2 and 3.
    Qcow2,
    /// QEMU's first.
    Qcow,
}

/// Whether an image may name another one that it is based on.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    /// It may.
    Allow,
    /// It is refused then.
    Deny,
}

/// How writes get to the medium.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// Through the host's page cache, until the guest flushes.
    Writeback,
    /// Past it.
    None,
    /// Through it, and no flush waits for them.
    Unsafe,
}

/// A disk. What is not given is left to device-disk.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Disk {
    /// Image file or block device.
    pub path: PathBuf,
    /// Refuse writes.
    #[serde(default)]
    pub readonly: bool,
    /// Lock the image against other programs.
    #[serde(default = "locked")]
    pub lock: bool,
    /// Form of the image.
    pub format: Option<Format>,
    /// What may be said in it of a backing file.
    pub backing: Option<Backing>,
    /// How writes get to the medium.
    pub cache: Option<Cache>,
    /// Number of queues.
    pub queues: Option<u16>,
    /// For how many microseconds a queue's thread looks for more before it sleeps.
    pub poll_us: Option<u32>,
    /// Logical block size in bytes, 512 or 4096.
    pub block_size: Option<u16>,
    /// Serial number.
    pub serial: Option<String>,
}

fn locked() -> bool {
    true
}

/// Kinds of networks.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum NetKind {
    /// A network namespace of its own with one address in it.
    Isolated,
    /// An existing tap device.
    Tap,
}

/// A network.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// What is at the far end.
    #[serde(rename = "type")]
    pub kind: NetKind,
    /// Address and prefix length of the far end, for `isolated`.
    pub address: Option<String>,
    /// Name of the tap, for `tap`.
    pub name: Option<String>,
    /// The guest's MAC address.
    pub mac: Option<String>,
    /// Largest packet in bytes.
    pub mtu: Option<u16>,
}

/// Kinds of consoles.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleKind {
    /// This terminal.
    Stdio,
    /// A pseudo-terminal.
    Pty,
    /// A unix socket that clients connect to.
    Unix,
    /// A file, output only.
    File,
}

/// A virtio console.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// Where it goes.
    #[serde(rename = "type")]
    pub kind: ConsoleKind,
    /// The socket, the file, or a link to make to the pseudo-terminal.
    pub path: Option<PathBuf>,
}

/// Kinds of serial lines.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum SerialKind {
    /// This terminal's output and input.
    Stdio,
    /// Nowhere.
    Null,
    /// A file that is appended to.
    File,
}

/// The serial port.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// Where it goes.
    #[serde(rename = "type")]
    pub kind: SerialKind,
    /// The file.
    pub path: Option<PathBuf>,
}

/// Kinds of debug consoles.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum DebugConsoleKind {
    /// Standard error.
    Stderr,
    /// Nowhere.
    Null,
    /// A file that is appended to.
    File,
}

/// The debug ports.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct DebugConsole {
    /// Where it goes.
    #[serde(rename = "type")]
    pub kind: DebugConsoleKind,
    /// The file.
    pub path: Option<PathBuf>,
}

impl Machine {
    /// Whether a console reads this terminal; the serial port then only writes.
    pub fn console_has_stdin(&self) -> bool {
        self.console.iter().any(|c| c.kind == ConsoleKind::Stdio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyval;

    #[test]
    fn options_and_files_mean_the_same() {
        let file: Machine = toml::from_str(
            r#"
            kernel = "vmlinux"
            cpus = 2
            on-reset = "exit"
            restart = "on-failure"
            on-loss = "stop:5"
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
        let disk: Disk = keyval::parse(
            "path=a.img,readonly=on,lock=off,format=qcow2,backing=allow,cache=none,queues=4,\
             poll-us=50,block-size=4096,serial=123",
        )
        .unwrap();
        assert_eq!(file.disk[0], disk);
        let net: Net = keyval::parse("isolated,address=10.1.0.1/24,mtu=1400").unwrap();
        assert_eq!(file.net[0], net);
        assert_eq!(file.console[0], keyval::parse("pty").unwrap());
        let debug = keyval::parse("file,path=debug").unwrap();
        assert_eq!(file.debug_console, Some(debug));
        assert_eq!(file.on_reset, Some(OnReset::Exit));
        assert_eq!(file.restart, Some(Restart::OnFailure));
        assert_eq!(file.on_loss.as_deref(), Some("stop:5"));
    }
}

//! A virtual machine as the user describes it: the one schema of the VM file
//! (TOML) and of the `key=value` options.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Deserialize;

/// A description that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);

/// A machine.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Machine {
    /// Kernel to boot.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
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
    /// Control socket to create.
    pub control: Option<PathBuf>,
    /// `reset` or `exit`.
    pub on_reset: Option<String>,
    /// `on`, `log` or `off`.
    pub sandbox: Option<String>,
}

/// A disk.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Image file or block device.
    pub path: PathBuf,
    /// Refuse writes.
    #[serde(default)]
    pub readonly: bool,
    /// Number of queues.
    pub queues: Option<u16>,
    /// Serial number.
    pub serial: Option<String>,
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

/// Reads a VM file.
///
/// # Errors
/// When it cannot be read or does not follow the schema.
pub fn load(path: &Path) -> anyhow::Result<Machine> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("VM file {}", path.display()))?;
    toml::from_str(&text).map_err(|error| {
        Invalid(format!("VM file {}: {}", path.display(), one_line(&error))).into()
    })
}

fn one_line(error: &toml::de::Error) -> String {
    error.message().replace('\n', " ")
}

impl Machine {
    /// What the schema cannot say.
    ///
    /// # Errors
    /// Names the device and the option.
    pub fn check(&self) -> Result<(), Invalid> {
        let need = |what: &str, key: &str, given: bool, wanted: bool| match (given, wanted) {
            (false, true) => Err(Invalid(format!("{what} needs {key}="))),
            (true, false) => Err(Invalid(format!("{what} takes no {key}="))),
            _ => Ok(()),
        };
        for net in &self.net {
            let tap = net.kind == NetKind::Tap;
            let what = if tap {
                "a tap network"
            } else {
                "an isolated network"
            };
            need(what, "name", net.name.is_some(), tap)?;
            if tap {
                need(what, "address", net.address.is_some(), false)?;
            }
        }
        for console in &self.console {
            match console.kind {
                ConsoleKind::Unix => need("a unix console", "path", console.path.is_some(), true)?,
                ConsoleKind::File => need("a file console", "path", console.path.is_some(), true)?,
                ConsoleKind::Stdio => {
                    need("a stdio console", "path", console.path.is_some(), false)?
                }
                ConsoleKind::Pty => {}
            }
        }
        if let Some(serial) = &self.serial {
            let wanted = serial.kind == SerialKind::File;
            need("the serial port", "path", serial.path.is_some(), wanted)?;
        }
        let on_stdin = self
            .console
            .iter()
            .filter(|console| console.kind == ConsoleKind::Stdio)
            .count();
        if on_stdin > 1 {
            return Err(Invalid("only one console can be on stdio".into()));
        }
        Ok(())
    }

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
            [[disk]]
            path = "a.img"
            readonly = true
            queues = 4
            serial = "123"
            [[net]]
            type = "isolated"
            address = "10.1.0.1/24"
            mtu = 1400
            [[console]]
            type = "pty"
            "#,
        )
        .unwrap();
        file.check().unwrap();
        let disk: Disk = keyval::parse("path=a.img,readonly=on,queues=4,serial=123").unwrap();
        assert_eq!(file.disk[0], disk);
        let net: Net = keyval::parse("isolated,address=10.1.0.1/24,mtu=1400").unwrap();
        assert_eq!(file.net[0], net);
        assert_eq!(file.console[0], keyval::parse("pty").unwrap());
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        assert!(toml::from_str::<Machine>("kernel = 'k'\ncolour = 'red'").is_err());
        let mut machine: Machine = toml::from_str("kernel = 'k'").unwrap();
        machine.net = vec![keyval::parse("tap").unwrap()];
        assert!(machine.check().unwrap_err().to_string().contains("name="));
        machine.net.clear();
        machine.console = vec![
            keyval::parse("stdio").unwrap(),
            keyval::parse("stdio").unwrap(),
        ];
        assert!(machine.check().is_err());
        assert!(keyval::parse::<Disk>("path=a,path=b").is_err());
        assert!(keyval::parse::<Disk>("path=a,readonly=perhaps").is_err());
        assert!(keyval::parse::<Disk>("readonly=on").is_err());
        assert!(keyval::parse::<Disk>("path=a,queues=many").is_err());
        assert!(keyval::parse::<Net>("bridge").is_err());
    }
}

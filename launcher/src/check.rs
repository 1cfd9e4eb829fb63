//! The checks of a machine's description that its schema cannot express: values that are
//! needed together, exclude each other or are out of range.

use std::path::Path;

use outrigger_cli::{Usage, socket};

use crate::config::{ConsoleKind, DebugConsoleKind, MachineConfig, NetKind, SerialKind};

/// Checks that `key` is given for `what` exactly if it is `needed` there.
fn check_key(what: &str, key: &str, given: bool, needed: bool) -> Result<(), Usage> {
    match (given, needed) {
        (false, true) => Err(Usage(format!("{what} needs {key}="))),
        (true, false) => Err(Usage(format!("{what} takes no {key}="))),
        _ => Ok(()),
    }
}

impl MachineConfig {
    /// Checks the description as a whole.
    ///
    /// # Errors
    /// The first mistake, with the device and the option that it is about.
    pub fn check(&self) -> Result<(), Usage> {
        if self.kernel.is_none() && self.load.is_empty() {
            return Err(Usage("nothing to boot: give kernel or load".into()));
        }
        self.check_disks()?;
        self.check_nets()?;
        self.check_consoles()?;
        self.check_sockets()?;
        self.check_paths()
    }

    fn check_disks(&self) -> Result<(), Usage> {
        for (index, disk) in self.disk.iter().enumerate() {
            if let Some(size) = disk.block_size
                && ![512, 4096].contains(&size)
            {
                let why = format!("disk{index}: block-size={size}: use 512 or 4096");
                return Err(Usage(why));
            }
        }
        Ok(())
    }

    fn check_nets(&self) -> Result<(), Usage> {
        for (index, net) in self.net.iter().enumerate() {
            let tap = net.kind == NetKind::Tap;
            let kind = if tap { "a tap" } else { "an isolated" };
            let what = format!("net{index}: {kind} network");
            check_key(&what, "name", net.name.is_some(), tap)?;
            if tap {
                check_key(&what, "address", net.address.is_some(), false)?;
                let same_tap = |other: &crate::config::NetConfig| other.name == net.name;
                if let Some(first) = self.net[..index].iter().position(same_tap) {
                    let name = net.name.as_deref().unwrap_or_default();
                    return Err(Usage(format!(
                        "net{index}: tap {name} is in use by net{first}"
                    )));
                }
            }
        }
        Ok(())
    }

    fn check_consoles(&self) -> Result<(), Usage> {
        for (index, console) in self.console.iter().enumerate() {
            let (kind, needed) = match console.kind {
                ConsoleKind::Unix => ("a unix", true),
                ConsoleKind::File => ("a file", true),
                ConsoleKind::Stdio => ("a stdio", false),
                ConsoleKind::Pty => continue,
            };
            let what = format!("console{index}: {kind} console");
            check_key(&what, "path", console.path.is_some(), needed)?;
        }
        if let Some(serial) = &self.serial {
            let needed = serial.kind == SerialKind::File;
            check_key("the serial port", "path", serial.path.is_some(), needed)?;
        }
        if let Some(debug) = &self.debug_console {
            let needed = debug.kind == DebugConsoleKind::File;
            check_key("the debug console", "path", debug.path.is_some(), needed)?;
        }
        let on_stdio = self.console.iter().filter(|c| c.kind == ConsoleKind::Stdio);
        if on_stdio.count() > 1 {
            return Err(Usage("only one console can use stdio".into()));
        }
        Ok(())
    }

    fn check_sockets(&self) -> Result<(), Usage> {
        let mut sockets: Vec<(String, &Path)> = Vec::new();
        for (index, console) in self.console.iter().enumerate() {
            if let (ConsoleKind::Unix, Some(path)) = (console.kind, &console.path) {
                sockets.push((format!("console{index}"), path));
            }
        }
        if let Some(path) = &self.control {
            sockets.push(("the control socket".into(), path));
        }
        for (what, path) in sockets.iter().filter(|it| !it.1.as_os_str().is_empty()) {
            socket::socket_path(path.to_path_buf())
                .map_err(|why| Usage(format!("{what}: {}: {why}", path.display())))?;
        }
        Ok(())
    }

    /// Checks that no path is empty, and that no path that is written to has two uses.
    fn check_paths(&self) -> Result<(), Usage> {
        let mut uses: Vec<(String, &Path, bool)> = Vec::new();
        for (index, disk) in self.disk.iter().enumerate() {
            uses.push((format!("disk{index}"), &disk.path, disk.readonly));
        }
        for (index, console) in self.console.iter().enumerate() {
            let path = console.path.iter();
            uses.extend(path.map(|path| (format!("console{index}"), path.as_path(), false)));
        }
        let serial = self
            .serial
            .iter()
            .filter_map(|serial| serial.path.as_deref());
        let debug = self
            .debug_console
            .iter()
            .filter_map(|debug| debug.path.as_deref());
        uses.extend(serial.map(|path| ("the serial port".to_owned(), path, false)));
        uses.extend(debug.map(|path| ("the debug console".to_owned(), path, false)));
        let control = self.control.as_deref().into_iter();
        uses.extend(control.map(|path| ("the control socket".to_owned(), path, false)));
        for (index, (what, path, shared)) in uses.iter().enumerate() {
            if path.as_os_str().is_empty() {
                return Err(Usage(format!("{what}: the path is empty: give a path")));
            }
            let other = uses[..index]
                .iter()
                .find(|u| u.1 == *path && !(u.2 && *shared));
            if let Some((first, ..)) = other {
                let path = path.display();
                return Err(Usage(format!("{what}: {path} is in use by {first}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyval;

    fn machine(text: &str) -> MachineConfig {
        toml::from_str(&format!("kernel = 'k'\n{text}")).unwrap()
    }

    #[test]
    fn a_mistake_is_reported_with_its_device_and_key() {
        for (text, message) in [
            ("[[net]]\ntype = 'tap'", "net0: a tap network needs name="),
            (
                "[[net]]\ntype = 'isolated'\nname = 't'",
                "net0: an isolated network takes no name=",
            ),
            (
                "[[net]]\ntype = 'tap'\nname = 't'\n[[net]]\ntype = 'tap'\nname = 't'",
                "net1: tap t is in use by net0",
            ),
            (
                "[[console]]\ntype = 'unix'",
                "console0: a unix console needs path=",
            ),
            (
                "[[console]]\ntype = 'stdio'\n[[console]]\ntype = 'stdio'",
                "only one console can use stdio",
            ),
            (
                "[serial]\ntype = 'null'\npath = 'a'",
                "the serial port takes no path=",
            ),
            (
                "[[disk]]\npath = 'a'\nblock-size = 1024",
                "disk0: block-size=1024: use 512 or 4096",
            ),
            (
                "[[disk]]\npath = ''",
                "disk0: the path is empty: give a path",
            ),
            (
                "[[disk]]\npath = 'a'\n[[disk]]\npath = 'a'",
                "disk1: a is in use by disk0",
            ),
            (
                "control = 'a'\n[serial]\ntype = 'file'\npath = 'a'",
                "the control socket: a is in use by the serial port",
            ),
        ] {
            assert_eq!(machine(text).check().unwrap_err().to_string(), message);
        }
        let empty: MachineConfig = toml::from_str("").unwrap();
        assert!(empty.check().is_err());
        let read_only = "path=a,readonly=on";
        let mut twice = machine("");
        twice.disk = vec![
            keyval::parse(read_only).unwrap(),
            keyval::parse(read_only).unwrap(),
        ];
        twice.check().unwrap();
    }
}

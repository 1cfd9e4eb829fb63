//! Loop devices (loop(4)).

use std::path::Path;
use std::process::Command;

/// A file as a block device, for as long as this lives.
pub struct Loop(String);

impl Loop {
    /// `None`, with a message, when this host or user has no loop devices.
    pub fn new(file: &Path) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .ok()?;
        let name = String::from_utf8(output.stdout).ok()?;
        output
            .status
            .success()
            .then(|| Loop(name.trim().to_owned()))
            .or_else(|| {
                eprintln!("skipped: no loop devices on this host");
                None
            })
    }

    /// The block device.
    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

//! The Linux test guest that `tests/guest/build.sh` makes; `test.sh` says where in
//! OUTRIGGER_LINUX_GUEST.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::machine::{Machine, Running};

/// Emulated guest kernels take their time.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// A file of the guest's directory.
///
/// # Panics
/// When nobody said where that is.
pub fn guest(file: &str) -> PathBuf {
    let directory = std::env::var_os("OUTRIGGER_LINUX_GUEST")
        .expect("OUTRIGGER_LINUX_GUEST is not set: run ./test.sh, or set it to what tests/guest/build.sh prints");
    Path::new(&directory).join(file)
}

/// A machine that boots this kernel with the full initramfs.
pub fn linux(kernel: &str, options: &str) -> Machine {
    let cmdline = format!("console=ttyS0 quiet {options}");
    let initrd = guest("initramfs.cpio").display().to_string();
    Machine::new(&guest(kernel), &cmdline).args(["--initrd", &initrd])
}

/// Waits until the serial port has said `text`.
///
/// # Panics
/// When it never does, or the machine ends.
pub fn wait_serial(machine: &Running, text: &str) {
    let start = Instant::now();
    while !machine.serial().contains(text) {
        assert!(
            start.elapsed() < PATIENCE && machine.runner.is_running(),
            "the guest never said {text:?}\nserial: {}\nlog: {}",
            machine.serial(),
            machine.runner.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits for the machine's end, which must have this code.
///
/// # Panics
/// When it has another.
pub fn wait_end(machine: &Running, code: i32) {
    let start = Instant::now();
    while machine.runner.is_running() && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(20));
    }
    machine.expect(code);
}

//! Test support: front ends, guests and machines that drive real processes, spawned from
//! their real binaries.
//!
//! * [`process`] builds, starts, watches and reaps the device process;
//! * [`ram`] is guest memory, shared as the runner shares it;
//! * [`queue`] is a split virtqueue from the driver's side;
//! * [`guest`] joins them over vhost-user: it negotiates, shares memory, starts and stops
//!   rings;
//! * [`chaos`] checks the image of a guest whose disk was killed repeatedly;
//! * [`driver`] is a foreign front end for disks, and [`qemu`] a foreign VMM.
//!
//! Everything here panics when something is wrong, and every wait has a
//! deadline: this crate is for tests only.

// `chaos` shares files with the embedded guest, which has no std.
extern crate alloc;

pub mod binaries;
pub mod chaos;
pub mod console;
pub mod disk;
pub mod driver;
pub mod guest;
pub mod images;
pub mod launcher;
pub mod linux;
pub mod loops;
pub mod machine;
pub mod net;
pub mod process;
pub mod qemu;
pub mod queue;
pub mod ram;
pub mod raw;
pub mod runner;
pub mod scripted;
pub mod slow_file;

use std::time::{Duration, Instant};

/// How long any step may take before a test fails. Generous, because the machine may be
/// busy.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds.
///
/// # Panics
/// It does not hold within [`DEADLINE`]; the message names `what`.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "still not: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

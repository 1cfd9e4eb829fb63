//! device-net as seen by the guest. The host's side is a network namespace of the device
//! process or of the test, so nothing leaves the host. The tests need root to enter the
//! namespace of another process.

mod attach;
mod frames;
mod offload;
mod tcp;

use std::fs::File;

use outrigger_tests::guest::{EVENT_IDX, Guest};
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::ram::Ram;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

fn isolated(options: &[&str]) -> Process {
    Launch::new("device-net")
        .args(["--isolated"])
        .args(options)
        .listening()
}

/// Starts a guest with these features and enough memory for all tests.
fn boot(process: &Process, features: u64) -> Guest {
    let ram = Ram::new(&[(0, 1 << 20), (1 << 32, 32 << 20)]);
    let mut guest = Guest::new(process.connect(), ram);
    guest.negotiate(features | EVENT_IDX);
    guest.share_memory();
    guest.add_queue(256);
    guest.add_queue(256);
    guest
}

/// Runs `f` in the network namespace of `process`. Sockets that it creates stay in that
/// namespace.
fn in_network_of<T: Send>(process: &Process, f: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(process.proc("ns/net")).unwrap();
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), kind).unwrap();
            f()
        });
        inside.join().unwrap()
    })
}

//! What the manual is about.

use clap::{Command, CommandFactory};

/// All programs that a user may call.
pub fn programs() -> Vec<Command> {
    vec![
        outrigger::Options::command(),
        vcpu_runner::options::Options::command(),
        device_disk::Options::command(),
        device_net::Options::command(),
        device_console::Options::command(),
        device_platform::Options::command(),
    ]
}

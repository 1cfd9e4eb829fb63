//! What the manual is about.

use clap::{Command, CommandFactory};

/// All programs that a user may call.
pub fn programs() -> Vec<Command> {
    vec![
        outrigger::Options::command(),
        vcpu_runner::options::RunnerOptions::command(),
        device_disk::DiskOptions::command(),
        device_net::NetOptions::command(),
        device_console::ConsoleOptions::command(),
        device_platform::PlatformOptions::command(),
    ]
}

//! The programs that the manual and the shell completions cover.

use clap::{Command, CommandFactory};

/// Returns the command lines of all programs that users call.
pub fn programs() -> Vec<Command> {
    vec![
        outrigger::LauncherOptions::command(),
        vcpu_runner::options::RunnerOptions::command(),
        device_disk::DiskOptions::command(),
        device_net::NetOptions::command(),
        device_console::ConsoleOptions::command(),
        device_platform::PlatformOptions::command(),
    ]
}

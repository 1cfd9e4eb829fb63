//! `outrigger-manual DIR`: writes a man page for every program and every command of
//! `outrigger` (`DIR/man1`), and completions for bash, zsh and fish (`DIR/completions`). Both
//! are generated from the structures that parse the command lines.
//!
//! This is a separate program so that the others do not contain their manual, and so that
//! only those who need it spend the time to build it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use clap_complete::Shell;
use outrigger_manual::programs;

/// Writes man pages and shell completion for all programs of outrigger.
#[derive(Parser)]
#[command(name = "outrigger-manual", version)]
struct ManualOptions {
    /// Directory to write to; it is created if necessary
    directory: PathBuf,
}

fn main() -> ExitCode {
    let options: ManualOptions = outrigger_cli::parse();
    match write(&options.directory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            outrigger_cli::report_error("outrigger-manual", error);
            ExitCode::FAILURE
        }
    }
}

fn write(directory: &Path) -> anyhow::Result<()> {
    let pages = create_directory(directory.join("man1"))?;
    let completions = create_directory(directory.join("completions"))?;
    for mut command in programs() {
        clap_mangen::generate_to(command.clone(), &pages)
            .with_context(|| pages.display().to_string())?;
        let name = command.get_name().to_owned();
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            clap_complete::generate_to(shell, &mut command, &name, &completions)
                .with_context(|| completions.display().to_string())?;
        }
    }
    Ok(())
}

fn create_directory(directory: PathBuf) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    Ok(directory)
}

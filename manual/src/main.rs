//! `outrigger-manual DIR`: writes a man page (`DIR/man1`) for every program and
//! every command of `outrigger`, and completion for bash, zsh and fish
//! (`DIR/completions`), from the very structures that parse the command lines.
//!
//! A program of its own, so that the programs themselves need not carry their
//! manual, and no build but the one that asks for it takes the time.

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
struct Options {
    /// Directory to write to; made if there is none
    directory: PathBuf,
}

fn main() -> ExitCode {
    let options: Options = outrigger_cli::parse();
    match write(&options.directory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            outrigger_cli::report_error("outrigger-manual", error);
            ExitCode::FAILURE
        }
    }
}

fn write(directory: &Path) -> anyhow::Result<()> {
    let pages = make(directory.join("man1"))?;
    let completions = make(directory.join("completions"))?;
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

fn make(directory: PathBuf) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    Ok(directory)
}

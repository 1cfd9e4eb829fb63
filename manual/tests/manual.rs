//! Compares the output of `outrigger-manual` with the command lines of the programs.

use std::path::Path;
use std::process::Command;

use outrigger_manual::programs;

fn generate() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_outrigger-manual"))
        .arg(directory.path())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{errors}");
    directory
}

/// Returns the programs and the commands of `outrigger` with the names of their pages.
fn pages() -> Vec<(String, clap::Command)> {
    let mut pages = Vec::new();
    for program in programs() {
        for command in program.get_subcommands() {
            let page = format!("{}-{}", program.get_name(), command.get_name());
            pages.push((page, command.clone()));
        }
        pages.push((program.get_name().to_owned(), program));
    }
    pages
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_program_has_a_page_that_names_every_option() {
    let directory = generate();
    for (name, command) in pages() {
        let page = read(&directory.path().join(format!("man1/{name}.1")));
        let title = page.lines().find(|line| line.starts_with(".TH "));
        let title = title.unwrap_or_else(|| panic!("{name}: no .TH"));
        assert!(title.to_lowercase().contains(&name), "{title}");
        // roff writes a hyphen at which a line must not break as `\-`.
        for option in command.get_arguments().filter_map(clap::Arg::get_long) {
            let option = format!("--{option}").replace('-', "\\-");
            assert!(page.contains(&option), "{name}: {option} is missing");
        }
        for section in [".SH NAME", ".SH SYNOPSIS", ".SH DESCRIPTION"] {
            assert!(page.contains(section), "{name}: {section} is missing");
        }
    }
}

/// Returns the completions that bash offers for the last of `words` when the user presses TAB.
fn completed(script: &Path, words: &[&str]) -> Vec<String> {
    let last = words.len() - 1;
    let previous = words[last.saturating_sub(1)];
    let completion = format!(
        "source \"$0\"; set -- $(complete -p {0}); while [ \"$1\" != -F ]; do shift; done; function=$2; \
         COMP_WORDS=({1}); COMP_CWORD={last}; $function {0} {2:?} {previous:?}; \
         printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        words[0],
        words.join(" "),
        words[last],
    );
    let output = Command::new("bash")
        .args(["--norc", "-c", &completion])
        .arg(script)
        .output()
        .expect("bash can be started");
    let words = String::from_utf8(output.stdout).unwrap();
    words.lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_programs_commands_and_options() {
    let directory = generate();
    let script = |name: &str| directory.path().join(format!("completions/{name}.bash"));
    for program in programs() {
        let name = program.get_name();
        let checked = Command::new("bash").arg("-n").arg(script(name)).status();
        assert!(checked.unwrap().success(), "{name}");
        let offered = completed(&script(name), &[name, "--h"]);
        assert_eq!(offered, ["--help"], "{name}");
    }
    let disk = script("device-disk");
    assert_eq!(
        completed(&disk, &["device-disk", "--blk-fi"]),
        ["--blk-file"]
    );
    let outrigger = script("outrigger");
    assert_eq!(completed(&outrigger, &["outrigger", "de"]), ["demo"]);
    assert_eq!(
        completed(&outrigger, &["outrigger", "run", "--kern"]),
        ["--kernel"]
    );
}

#[test]
fn completion_for_zsh_and_fish_names_every_program() {
    let directory = generate();
    for program in programs() {
        let name = program.get_name();
        let completions = directory.path().join("completions");
        assert!(read(&completions.join(format!("_{name}"))).starts_with("#compdef"));
        assert!(read(&completions.join(format!("{name}.fish"))).contains("complete -c"));
    }
}

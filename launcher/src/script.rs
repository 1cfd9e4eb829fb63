//! Prints a plan as a script for any POSIX shell: the commands of all processes, with sockets
//! in a temporary directory.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use outrigger_cli::CONSOLE_QUIT;
use outrigger_protocol::exit;

use crate::config::MachineConfig;
use crate::plan::{MachinePlan, ProgramPlan};
use crate::resource::HostResource;
use crate::supervise::READY_LIMIT;
use crate::supervise::spawn::find_program;

/// The script up to the first program. Names between @ stand for numbers.
const HEAD: &str = r#"#!/bin/sh
# Runs a virtual machine as outrigger does: first the device processes, each of which
# listens on a socket, then the runner, which connects to them.
set -eu

dir=$(mktemp -d)
devices= runner= again=
exec 3<&0 # keeps standard input for processes in the background

# Ends all processes, and the script with the exit code.
end() {
    code=$?
    trap '' HUP INT TERM
    for pid in $devices; do kill "$pid" 2>/dev/null || :; done
    for pid in $devices; do
        status=0
        wait "$pid" || status=$?
        # The user quit the console (Ctrl-A x) to end the machine.
        if [ "$status" = @CONSOLE_QUIT@ ] && [ "$code" = @DEVICE_LOST@ ]; then code=0; fi
    done
    rm -rf "$dir"
    exit "$code"
}
trap end EXIT

# A signal ends the runner, and with it the machine.
signal() {
    [ -n "$runner" ] || exit 1
    again=1
    kill "$runner" 2>/dev/null || :
}
trap signal HUP INT TERM

# Waits until the process of device $1, whose process id is $2, is ready.
started() {
    devices="$devices $2"
    ready=$(timeout @READY_LIMIT@ head -n 1 "$dir/$1.ready") || {
        echo "$1 was not ready within @READY_LIMIT@ s" >&2
        exit 1
    }
    # A process that could not start has reported the reason.
    [ "$ready" = ready ] || {
        code=0
        wait "$2" || code=$?
        devices=${devices% "$2"} # the kernel may reuse its id
        [ "$code" != 0 ] || code=1
        exit "$code"
    }
}
"#;

/// The rest of the script, after the runner's options. A signal interrupts `wait`, so it is
/// repeated.
const TAIL: &str = r#" </dev/null 3<&- &
runner=$!

while :; do
    code=0
    wait "$runner" || code=$?
    [ -n "$again" ] && kill -0 "$runner" 2>/dev/null || break
    again=
done
exit "$code"
"#;

/// The script starts no process again, so waiting for a successor would never end.
const ON_LOSS: &str = " \\\n    --on-loss stop";

/// Prints `plan` of `machine` as a script to standard output.
///
/// # Errors
/// Standard output cannot be written.
pub fn print(machine: &MachineConfig, plan: &MachinePlan) -> std::io::Result<()> {
    let mut output = std::io::stdout().lock();
    output.write_all(&script(machine, plan))?;
    output.flush()
}

fn script(machine: &MachineConfig, plan: &MachinePlan) -> Vec<u8> {
    let mut text = HEAD
        .replace("@READY_LIMIT@", &READY_LIMIT.as_secs().to_string())
        .replace("@CONSOLE_QUIT@", &CONSOLE_QUIT.to_string())
        .replace("@DEVICE_LOST@", &exit::DEVICE_LOST.to_string())
        .into_bytes();
    for device in &plan.devices {
        let id = &device.program.id;
        let stdin = if device.program.needs_stdin {
            "<&3"
        } else {
            "</dev/null"
        };
        text.extend(format!("\nmkfifo \"$dir/{id}.ready\"\n").bytes());
        command(&mut text, &device.program);
        if device.program.has_control {
            text.extend(format!(" \\\n    --control \"$dir/{id}.control\"").bytes());
        }
        let socket = format!(
            " \\\n    --socket-path \"$dir/{id}\" \\\n    \
             --ready-fd 4 4>\"$dir/{id}.ready\" {stdin} 3<&- &\nstarted {id} $!\n"
        );
        text.extend(socket.bytes());
    }
    text.push(b'\n');
    command(&mut text, &plan.runner);
    for device in &plan.devices {
        let (option, value) = device.option(&format!("$dir/{}", device.program.id));
        text.extend(format!(" \\\n    {option} \"{value}\"").bytes());
    }
    if let Some(control) = &machine.control {
        text.extend_from_slice(b" \\\n    --control ");
        quote(&mut text, control.as_os_str());
    }
    if machine.on_loss.is_none() {
        text.extend_from_slice(ON_LOSS.as_bytes());
    }
    text.extend(TAIL.bytes());
    text
}

/// Appends the command of `program`, after a comment that describes it.
fn command(text: &mut Vec<u8>, program: &ProgramPlan) {
    let summary = program.summary.escape_debug();
    text.extend(format!("# {}: {summary}\n", program.id).bytes());
    quote(text, find_program(program.name).as_os_str());
    let is_option = |word: &OsStr| word.as_bytes().starts_with(b"--");
    let mut after_option = false;
    let resources = program.resources.iter().flat_map(HostResource::by_path);
    for word in program.args.iter().cloned().chain(resources) {
        // An option and its value are on one line.
        let same_line = after_option && !is_option(&word);
        text.extend_from_slice(if same_line { b" " } else { b" \\\n    " });
        quote(text, &word);
        after_option = is_option(&word);
    }
}

/// Appends a word, quoted if any byte needs it, so that any shell reads back the same bytes.
fn quote(text: &mut Vec<u8>, word: &OsStr) {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_./:=@%+,-".contains(byte);
    if !word.is_empty() && word.as_bytes().iter().all(plain) {
        text.extend_from_slice(word.as_bytes());
        return;
    }
    text.push(b'\'');
    for &byte in word.as_bytes() {
        match byte {
            b'\'' => text.extend_from_slice(br"'\''"),
            byte => text.push(byte),
        }
    }
    text.push(b'\'');
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Words with characters that are special in a shell.
    #[test]
    fn a_shell_reads_every_word_back() {
        for word in [
            "plain",
            "",
            "two words",
            "it's",
            "$HOME",
            "`id`",
            "a\nb",
            "\\",
            "*",
            "~",
            "#",
            "''",
        ] {
            let mut text = b"printf %s ".to_vec();
            quote(&mut text, OsStr::new(word));
            let text = OsStr::from_bytes(&text);
            let output = Command::new("sh").arg("-c").arg(text).output().unwrap();
            assert_eq!(output.stdout, word.as_bytes(), "{text:?}");
        }
    }

    #[test]
    fn a_newline_in_a_file_name_does_not_end_a_comment() {
        let machine = toml::from_str("kernel = 'k'\n[[disk]]\npath = \"a\\ntouch b\"").unwrap();
        let text = script(&machine, &MachinePlan::new(&machine));
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("# disk0: a\\ntouch b\n"), "{text}");
        assert!(text.contains("--blk-file 'a\ntouch b'"), "{text}");
    }
}

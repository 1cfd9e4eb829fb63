//! A plan as a shell script: the plain commands that would be run, for any POSIX
//! shell. The processes meet at sockets in a temporary directory.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use outrigger_cli::CONSOLE_QUIT;
use outrigger_protocol::exit;

use crate::config::Machine;
use crate::plan::{Plan, Program};
use crate::resource::Resource;
use crate::supervise::READY;
use crate::supervise::process;

/// What the shell does before it starts programs. Capitals in @ stand for numbers.
const HEAD: &str = r#"#!/bin/sh
# A machine as outrigger would run it: every device a process that listens on a
# socket, then the runner, which connects to them.
set -eu

dir=$(mktemp -d)
devices= runner= again=
exec 3<&0 # else a process in the background has no standard input

# Ends with the exit code, and with nobody left.
end() {
    code=$?
    trap '' HUP INT TERM
    for pid in $devices; do kill "$pid" 2>/dev/null || :; done
    for pid in $devices; do
        status=0
        wait "$pid" || status=$?
        # Whoever leaves the console by Ctrl-A x wishes the machine to end.
        if [ "$status" = @CONSOLE_QUIT@ ] && [ "$code" = @DEVICE_LOST@ ]; then code=0; fi
    done
    rm -rf "$dir"
    exit "$code"
}
trap end EXIT

# A signal ends the runner, and its end is that of the machine.
signal() {
    [ -n "$runner" ] || exit 1
    again=1
    kill "$runner" 2>/dev/null || :
}
trap signal HUP INT TERM

# Waits until device process $1, whose process id is $2, serves.
started() {
    devices="$devices $2"
    ready=$(timeout @READY@ head -n 1 "$dir/$1.ready") || {
        echo "$1 was not ready within @READY@ s" >&2
        exit 1
    }
    # A process that could not start has said why.
    [ "$ready" = ready ] || {
        code=0
        wait "$2" || code=$?
        devices=${devices% "$2"} # its number may be another's now
        [ "$code" != 0 ] || code=1
        exit "$code"
    }
}
"#;

/// What it does when all are started. A wait that a signal cuts short is done again.
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

/// Nobody starts a process again here, so nobody is waited for.
const ON_LOSS: &str = " \\\n    --on-loss stop";

/// Prints `plan` of `machine` as a script to standard output.
///
/// # Errors
/// When nobody takes it.
pub fn print(machine: &Machine, plan: &Plan) -> std::io::Result<()> {
    let mut output = std::io::stdout().lock();
    output.write_all(&script(machine, plan))?;
    output.flush()
}

fn script(machine: &Machine, plan: &Plan) -> Vec<u8> {
    let mut text = HEAD
        .replace("@READY@", &READY.as_secs().to_string())
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

/// The command of `program`, below a comment that says what it is.
fn command(text: &mut Vec<u8>, program: &Program) {
    let summary = program.summary.escape_debug();
    text.extend(format!("# {}: {summary}\n", program.id).bytes());
    quote(text, process::find(program.name).as_os_str());
    let is_option = |word: &OsStr| word.as_bytes().starts_with(b"--");
    let mut after_option = false;
    let resources = program.resources.iter().flat_map(Resource::by_path);
    for word in program.args.iter().cloned().chain(resources) {
        // An option and its value share a line.
        let together = after_option && !is_option(&word);
        text.extend_from_slice(if together { b" " } else { b" \\\n    " });
        quote(text, &word);
        after_option = is_option(&word);
    }
}

/// A word as any shell reads it back, whatever bytes it is made of.
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

    /// Words that a shell could take for something else come back as they were.
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
    fn a_comment_stays_a_comment() {
        let machine = toml::from_str("kernel = 'k'\n[[disk]]\npath = \"a\\ntouch b\"").unwrap();
        let text = script(&machine, &Plan::new(&machine));
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("# disk0: a\\ntouch b\n"), "{text}");
        assert!(text.contains("--blk-file 'a\ntouch b'"), "{text}");
    }
}

//! Flat images: the examples, the registers that are printed, and guests that cannot go on.
//! And the report of `--probe`.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use outrigger_tests::binaries::binary;
use outrigger_tests::machine::skip_kvm;
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::runner::Place;
use outrigger_tests::wait_until;
use rustix::process::Signal;

fn examples() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/harness")
}

/// Runs the script of an example; returns exit code, stdout and stderr.
fn run_example(name: &str, options: &[&str]) -> (i32, String, String) {
    let programs = binary("vcpu-runner");
    binary("device-platform");
    let output = Command::new(examples().join("run.sh"))
        .arg(name)
        .args(options)
        .env("OUTRIGGER_BIN", programs.parent().unwrap())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let code = output.status.code().unwrap();
    (code, text(output.stdout), text(output.stderr))
}

#[test]
fn the_examples_print_the_expected_output() {
    if skip_kvm() {
        return;
    }
    for name in ["real16", "protected32", "long64"] {
        let expected = examples().join(format!("{name}.expected"));
        let expected = std::fs::read_to_string(expected).unwrap();
        assert_eq!(
            run_example(name, &[]),
            (0, expected, String::new()),
            "{name}"
        );
    }
}

/// The blocks of registers in the output of a runner: title and lines.
fn blocks(said: &str) -> Vec<(String, Vec<String>)> {
    let mut blocks: Vec<(String, Vec<String>)> = Vec::new();
    for line in said.lines() {
        if line.starts_with("vCPU ") {
            blocks.push((line.to_owned(), Vec::new()));
        } else if line.starts_with("  ") {
            blocks.last_mut().unwrap().1.push(line.to_owned());
        }
    }
    blocks
}

/// Number of lines of a block.
const BLOCK: usize = 18;

#[test]
fn registers_are_printed_before_the_run() {
    if skip_kvm() {
        return;
    }
    for (name, rip, cs, cr0, efer) in [
        (
            "real16",
            "rip  000000000000fff0",
            "cs   f000 base 00000000000f0000",
            "cr0  0000000060000010",
            "efer 0000000000000000",
        ),
        (
            "protected32",
            "rip  0000000000100000",
            "l 0 db 1",
            "cr0  0000000000000011",
            "efer 0000000000000000",
        ),
        (
            "long64",
            "rip  0000000000100000",
            "l 1 db 0",
            "cr0  0000000080000011",
            "efer 0000000000000500",
        ),
    ] {
        let (code, _, said) = run_example(name, &["--show-regs", "--cpus", "2"]);
        assert_eq!(code, 0, "{said}");
        let blocks = blocks(&said);
        let titles: Vec<&str> = blocks.iter().map(|b| b.0.as_str()).collect();
        assert_eq!(
            titles,
            ["vCPU 0: before the run", "vCPU 1: before the run"],
            "{said}"
        );
        for (_, lines) in &blocks {
            assert_eq!(lines.len(), BLOCK, "{said}");
        }
        let first = blocks[0].1.join("\n");
        for words in [rip, cs, cr0, efer] {
            assert!(first.contains(words), "{words}: {said}");
        }
    }
}

/// Runs a flat image in protected mode at 1 MiB, in the sandbox, to its end.
fn run_flat(image: &[u8], options: &[&str]) -> (Process, Place) {
    let place = Place::default();
    let load = format!("{}@0x100000", place.file("image", image));
    let control = place.name("control");
    let process = Launch::new("vcpu-runner")
        .args(["--load", &load, "--entry", "protected", "--memory", "16M"])
        .args(["--control", &control, "--log-level", "off"])
        .args(options)
        .spawn();
    (process, place)
}

/// Loads a floating-point number from an address without memory. KVM has to emulate the
/// instruction, and cannot on any host.
const NOT_EMULATED: &[u8] = b"\xdd\x05\x00\x00\x00\xd0"; // fldl 0xd0000000
/// There is no interrupt table, so the exception causes a triple fault.
const UNDEFINED: &[u8] = b"\x0f\x0b"; // ud2
/// Jumps to an address without memory.
const ASTRAY: &[u8] = b"\xe9\xfb\xff\xef\xcf"; // jmp 0xd0000000

#[test]
fn registers_are_printed_once_when_a_guest_cannot_go_on() {
    if skip_kvm() {
        return;
    }
    for (image, code, block, line) in [
        (
            UNDEFINED,
            4,
            &[
                "vCPU 0: triple fault",
                "rip  0000000000100000",
                "code at 0x100000: 0f 0b 00",
            ][..],
            &["triple fault of vCPU 0"][..],
        ),
        (
            NOT_EMULATED,
            1,
            &[
                "vCPU 0: cannot go on",
                "code at 0x100000: dd 05 00 00 00 d0 00",
            ],
            &[
                "vCPU 0",
                "KVM internal error, suberror 1",
                "emulator",
                "KVM-PVM",
            ],
        ),
        (
            ASTRAY,
            1,
            &[
                "vCPU 0: cannot go on",
                "code at 0xd0000000: not readable",
                "not RAM",
            ],
            &["vCPU 0", "KVM internal error"],
        ),
    ] {
        let (process, place) = run_flat(image, &["--cpus", "2"]);
        assert_eq!(process.wait().code(), Some(code), "{}", process.log());
        let said = process.log();
        let blocks = blocks(&said);
        assert_eq!(blocks.len(), 1, "{said}");
        assert_eq!(blocks[0].1.len(), BLOCK, "{said}");
        for words in block {
            assert!(said.contains(words), "{words}: {said}");
        }
        let last = said.lines().last().unwrap();
        assert_eq!(
            said.lines()
                .filter(|l| l.starts_with("vcpu-runner: "))
                .count(),
            1
        );
        for words in line {
            assert!(last.contains(words), "{words}: {last}");
        }
        assert!(
            !Path::new(&place.name("control")).exists(),
            "the control socket was not removed"
        );
    }
}

#[test]
fn the_runner_removes_only_its_own_control_socket() {
    if skip_kvm() {
        return;
    }
    const SPIN: &[u8] = b"\xeb\xfe";
    for sandbox in ["on", "off"] {
        let (process, place) = run_flat(SPIN, &["--sandbox", sandbox]);
        let control = place.name("control");
        wait_until("the control socket is served", || {
            UnixStream::connect(&control).is_ok()
        });
        process.signal(Signal::TERM);
        assert_eq!(process.wait().code(), Some(0), "{}", process.log());
        assert!(!Path::new(&control).exists());
    }
    // Another process replaces the socket by a file of its own.
    let (process, place) = run_flat(SPIN, &[]);
    let control = place.name("control");
    wait_until("the control socket is served", || {
        UnixStream::connect(&control).is_ok()
    });
    std::fs::remove_file(&control).unwrap();
    place.file("control", "another's");
    process.signal(Signal::TERM);
    assert_eq!(process.wait().code(), Some(0), "{}", process.log());
    assert_eq!(std::fs::read(&control).unwrap(), b"another's");
}

#[test]
fn a_reset_loads_the_images_again() {
    if skip_kvm() {
        return;
    }
    // Prints a letter, changes it in memory, and resets the machine.
    let mut image = vec![
        0xa0, 0x20, 0x00, 0x10, 0x00, // mov 0x100020, %al
        0xe6, 0xf1, // out %al, $0xf1
        0xfe, 0x05, 0x20, 0x00, 0x10, 0x00, // incb 0x100020
        0x66, 0xba, 0xf9, 0x0c, // mov $0xcf9, %dx
        0xb0, 0x06, // mov $6, %al
        0xee, // out %al, (%dx)
        0xeb, 0xfe, // jmp .
    ];
    image.resize(0x20, 0);
    image.push(b'A');
    let output = tempfile::tempdir().unwrap();
    let output = output.path().join("output");
    let platform = Launch::new("device-platform")
        .args(["--serial", "null", "--debug-console"])
        .args([format!("file={}", output.display())])
        .listening();
    let socket = platform.directory().join("socket");
    let endpoint = format!("socket={}", socket.display());
    let (process, _place) = run_flat(&image, &["--platform", &endpoint]);
    wait_until("the guest has started five times", || {
        std::fs::read(&output).is_ok_and(|printed| printed.len() >= 5)
    });
    process.signal(Signal::TERM);
    assert_eq!(process.wait().code(), Some(0), "{}", process.log());
    let printed = std::fs::read(&output).unwrap();
    assert!(printed.iter().all(|&byte| byte == b'A'), "{printed:?}");
}

#[test]
fn the_probe_reports_a_host_that_runs_guests() {
    if skip_kvm() {
        return;
    }
    let probe = |options: &[&str]| {
        let output = Command::new(binary("vcpu-runner"))
            .arg("--probe")
            .args(options)
            .output()
            .unwrap();
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
        String::from_utf8(output.stdout).unwrap()
    };
    let text = probe(&[]);
    for words in [
        "runs guests   yes",
        "API version 12",
        "KVM_CAP_IRQFD: device processes",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let json: serde_json::Value = serde_json::from_str(&probe(&["--format", "json"])).unwrap();
    assert_eq!(json["runs_guests"], true);
    assert!(json["problem"].is_null());
    assert_eq!(json["kvm"]["api_version"], 12);
    let kind = json["cpu"]["virtualisation"].as_str().unwrap();
    assert!(["vmx", "svm", "pvm", "none"].contains(&kind), "{kind}");
    assert!(json["kvm"]["max_vcpus"].as_u64().unwrap() >= 1);
    let capabilities = json["kvm"]["capabilities"].as_array().unwrap();
    assert!(capabilities.len() > 12);
    for capability in capabilities {
        let there = capability["value"].as_i64().unwrap() > 0;
        assert!(there || capability["needed"] == false, "{capability}");
        assert!(capability["purpose"].as_str().unwrap().len() > 15);
    }
    assert!(json["memory"]["total"].as_u64().unwrap() > 1 << 20);
    let sandbox = json["sandbox"].as_object().unwrap();
    for key in ["user_namespaces", "landlock_abi", "seccomp", "tun_error"] {
        assert!(sandbox.contains_key(key), "{key}");
    }
    // As documented.
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/probe.md");
    let page = std::fs::read_to_string(page).unwrap();
    for (key, value) in json.as_object().unwrap() {
        for key in std::iter::once(key).chain(value.as_object().into_iter().flat_map(|o| o.keys()))
        {
            assert!(
                page.contains(&format!("`{key}`")),
                "{key} is not in docs/probe.md"
            );
        }
    }
}

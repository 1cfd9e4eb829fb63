//! Mistakes that the runner finds before it needs KVM. It ends with the right exit code and
//! one line that names the mistake, and leaves no file behind.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use outrigger_tests::binaries::binary;
use outrigger_tests::process::Launch;
use outrigger_tests::runner::{Place, check_line, mistake};

/// Exit code for an invalid command line.
const USAGE: i32 = 2;
const FAILURE: i32 = 1;

#[test]
fn wrong_repeated_or_contradicting_options_are_usage_errors() {
    let long = format!("/{}", "x".repeat(120));
    let device = format!("--kernel k --device d,type=block,socket={long}");
    let control = format!("--kernel k --control {long}");
    let platform = format!("--kernel k --platform socket={long}");
    Place::default().expect(&[
        mistake("", USAGE, &["--kernel"]),
        mistake("--kernel a --kernel b", USAGE, &["--kernel", "multiple"]),
        mistake(
            "--kernel k --memory 1G --memory 1G",
            USAGE,
            &["--memory", "multiple"],
        ),
        mistake(
            "--kernel k --cpus 1 --cpus 2",
            USAGE,
            &["--cpus", "multiple"],
        ),
        mistake("--kernel k --cpus 0", USAGE, &["--cpus", "1..=64"]),
        mistake("--kernel k --cpus 65", USAGE, &["--cpus", "1..=64"]),
        mistake("--kernel k --cpus many", USAGE, &["--cpus", "many"]),
        mistake("--kernel k --memory 0", USAGE, &["--memory", "8 MiB"]),
        mistake("--kernel k --memory lots", USAGE, &["--memory", "lots"]),
        mistake(
            "--kernel k --memory 99999999T",
            USAGE,
            &["--memory", "99999999T"],
        ),
        mistake(
            "--kernel k --memory 9M,hugepages=2M",
            USAGE,
            &["--memory", "2097152"],
        ),
        mistake(
            "--kernel k --memory 8M,colour=red",
            USAGE,
            &["--memory", "colour=red"],
        ),
        mistake(
            "--kernel k --on-loss wait:3",
            USAGE,
            &["--on-loss", "wait takes no time limit"],
        ),
        mistake("--kernel k --on-loss stop:x", USAGE, &["stop:x", "seconds"]),
        mistake("--kernel k --load i@0", USAGE, &["--kernel", "--load"]),
        mistake("--kernel k --entry long", USAGE, &["--kernel", "--entry"]),
        mistake("--entry long", USAGE, &["--load"]),
        mistake("--load i@0 --initrd r", USAGE, &["--load", "--initrd"]),
        mistake("--load i@0 --cmdline c", USAGE, &["--load", "--cmdline"]),
        mistake("--load i", USAGE, &["--load", "FILE@ADDR"]),
        mistake("--load i@nowhere", USAGE, &["--load", "nowhere"]),
        mistake("--load i@0 --entry virtual", USAGE, &["--entry", "virtual"]),
        mistake(
            "--load i@0 --entry real=0x100000",
            USAGE,
            &["--entry", "0xfffff"],
        ),
        mistake("--probe --kernel k", USAGE, &["--probe", "--kernel"]),
        mistake("--probe --load i@0", USAGE, &["--probe", "--load"]),
        mistake("--probe --memory 1G", USAGE, &["--probe", "--memory"]),
        mistake("--kernel k --format json", USAGE, &["--format", "--probe"]),
        mistake(
            "--kernel k --on-reset explode",
            USAGE,
            &["--on-reset", "explode"],
        ),
        mistake("--kernel k --sandbox maybe", USAGE, &["--sandbox", "maybe"]),
        mistake("--kernel k --nonsense", USAGE, &["--nonsense"]),
        mistake(&device, USAGE, &["--device", "107"]),
        mistake(&control, USAGE, &["--control", "107"]),
        mistake(&platform, USAGE, &["--platform", "107"]),
        mistake(
            "--kernel k --device d,type=block",
            USAGE,
            &["--device", "socket="],
        ),
        mistake(
            "--kernel k --device d,type=blok,fd=3",
            USAGE,
            &["--device", "blok"],
        ),
        mistake(
            "--kernel k --device d,type=block,socket=/a --device d,type=net,socket=/b",
            USAGE,
            &["two devices", "d"],
        ),
        mistake(
            "--kernel k --device d,type=block,socket=/a --device e,type=net,socket=/a",
            USAGE,
            &["device e", "same socket"],
        ),
        mistake(
            "--kernel k --device d,type=block,socket=/a --platform socket=/a",
            USAGE,
            &["device d", "same socket"],
        ),
    ]);
}

#[test]
fn files_that_cannot_be_opened_are_named() {
    let place = Place::default();
    let kernel = place.file("kernel", "k");
    let empty = place.file("empty", "");
    let directory = place.path().display().to_string();
    let missing = place.name("missing");
    for (option, rest) in [
        ("--kernel FILE", ""),
        ("--initrd FILE", "--kernel KERNEL"),
        ("--load FILE@0x100000", "--entry long"),
    ] {
        let with = |file: &str| {
            format!("{option} {rest}")
                .replace("FILE", file)
                .replace("KERNEL", &kernel)
        };
        place.expect(&[
            mistake(&with(&missing), FAILURE, &[&missing, "No such file"]),
            mistake(&with(&empty), FAILURE, &[&empty, "empty"]),
            mistake(
                &with(&directory),
                FAILURE,
                &[&directory, "not a regular file"],
            ),
        ]);
    }
    // A file name with newlines and escape sequences does not break the line.
    let mut lines = mistake("--kernel", FAILURE, &["a\\nb\\u{1b}[1m", "No such file"]);
    lines.args.push(place.name("a\nb\u{1b}[1m"));
    place.expect(&[lines]);
    let events = |target: &str| format!("--kernel {kernel} --events {target}");
    place.expect(&[
        mistake(
            &events("99"),
            FAILURE,
            &["--events 99", "Bad file descriptor"],
        ),
        mistake(
            &events("/nowhere/e"),
            FAILURE,
            &["--events /nowhere/e", "No such file"],
        ),
        mistake(
            &events(&directory),
            FAILURE,
            &["--events", &directory, "directory"],
        ),
        mistake(
            &format!("--kernel {kernel} --control /nowhere/c"),
            FAILURE,
            &["--control /nowhere/c", "its directory does not exist"],
        ),
        mistake(
            &format!("--kernel {kernel} --control {directory}/.."),
            FAILURE,
            &["--control", "/..: the path does not end with a file name"],
        ),
    ]);
}

/// A command that runs the runner with an empty /dev, if this user can create that.
fn without_devices() -> Option<Command> {
    let root = rustix::process::geteuid().is_root();
    let namespaces = if root { "--mount" } else { "-Urm" };
    let shell = |script: &str| {
        let mut command = Command::new("unshare");
        command.args([namespaces, "sh", "-c"]);
        command.arg(format!("mount -t tmpfs none /dev && {script}"));
        command
    };
    if !shell("true").status().is_ok_and(|status| status.success()) {
        eprintln!("skipped: no mount namespaces for this user");
        return None;
    }
    let mut command = shell("exec \"$0\" \"$@\"");
    command.arg(binary("vcpu-runner"));
    Some(command)
}

#[test]
fn a_missing_dev_kvm_is_reported_with_a_remedy() {
    let place = Place::default();
    let kernel = place.file("kernel", "k");
    let control = place.name("control");
    let run = |args: &str| {
        let mistake = mistake(
            args,
            FAILURE,
            &["/dev/kvm", "No such file", "load the module"],
        );
        let mut command = without_devices()?;
        let output = command.args(&mistake.args).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        check_line(&mistake, output.status.code(), &said);
        Some(String::from_utf8(output.stdout).unwrap())
    };
    let Some(_) = run(&format!("--kernel {kernel} --control {control}")) else {
        return;
    };
    assert!(!Path::new(&control).exists());
    let text = run("--probe").unwrap();
    for line in [
        "runs guests   no",
        "problem       /dev/kvm",
        "remedy        load",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&run("--probe --format json").unwrap()).unwrap();
    assert_eq!(json["runs_guests"], false);
    assert!(json["kvm"].is_null());
    assert!(
        json["problem"]["what"]
            .as_str()
            .unwrap()
            .contains("/dev/kvm")
    );
}

#[test]
fn a_dev_kvm_without_access_is_reported_with_a_remedy() {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can switch to another user");
        return;
    }
    let closed =
        std::fs::metadata("/dev/kvm").is_ok_and(|kvm| kvm.permissions().mode() & 0o6 != 0o6);
    if !closed {
        eprintln!("skipped: /dev/kvm is missing here, or open to all");
        return;
    }
    let place = Place::default();
    let kernel = place.file("kernel", "k");
    std::fs::set_permissions(place.path(), Permissions::from_mode(0o755)).unwrap();
    let program = File::open(binary("vcpu-runner")).unwrap();
    for args in [format!("--kernel {kernel}"), "--probe".into()] {
        let mistake = mistake(
            &args,
            FAILURE,
            &["/dev/kvm", "Permission denied", "group", "kvm"],
        );
        let mut launch = Launch::of(&program).as_user(NOBODY).args(&mistake.args);
        launch.command().stdout(std::process::Stdio::null());
        let process = launch.spawn();
        let code = process.wait().code();
        check_line(&mistake, code, &process.log());
    }
}

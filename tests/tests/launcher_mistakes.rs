//! Mistakes of a user that the launcher detects: one line on stderr that names the cause, the
//! documented exit code, and no file or process left behind. `vm_launcher` has the mistakes
//! that are detected only with a virtual machine.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use outrigger_tests::launcher::{Launcher, programs};
use outrigger_tests::process::Launch;

/// Exit codes (README, "Running a machine").
const FAILURE: i32 = 1;
const USAGE: i32 = 2;

/// Waits for the end of `launcher` and checks its exit code and message. Its directory must
/// contain only `before` and the two output files.
fn expect(mut launcher: Launcher, code: i32, parts: &[&str], mut before: Vec<String>) {
    let got = launcher.wait();
    let message = launcher.read("stderr");
    assert_eq!(got, code, "{message}");
    assert_eq!(message.lines().count(), 1, "one line: {message}");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
    assert_eq!(launcher.read("stdout"), "");
    launcher.expect_no_process_left();
    before.extend(["stderr".into(), "stdout".into()]);
    before.sort();
    assert_eq!(names(launcher.directory()), before);
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<String> = entries
        .map(|entry| name(entry).into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn mistakes_in_a_vm_file_are_one_line() {
    for (text, code, parts) in [
        (
            "kernel = 'k'\ncmdlin = 'x'\n",
            USAGE,
            &["vm.toml", "line 2", "unknown key `cmdlin`", "`cmdline`"][..],
        ),
        (
            "kernel = 'k'\n[[dsik]]\npath = 'a'\n",
            USAGE,
            &["vm.toml", "line 2", "`dsik`", "nearest", "`disk`"],
        ),
        (
            "kernel = 'k'\n[[net]]\ntype = 'isolatd'\n",
            USAGE,
            &["line 3", "`isolatd`", "`isolated`"],
        ),
        (
            "kernel = 'k'\ncpus = 'two'\n",
            USAGE,
            &["vm.toml", "line 2", "cpus", "invalid type"],
        ),
        (
            "kernel = 'k'\n\nmemory = \n",
            USAGE,
            &["vm.toml", "line 3", "memory"],
        ),
        (
            "kernel = 'k'\nkernel = 'j'\n",
            USAGE,
            &["line 2", "kernel", "duplicate"],
        ),
        ("cpus = 2\n", USAGE, &["nothing to boot", "kernel"]),
        (
            "kernel = 'k'\n[[disk]]\npath = 'a'\n[[disk]]\npath = 'a'\n",
            USAGE,
            &["disk1", "a is in use by disk0"],
        ),
        (
            "kernel = 'k'\n[[net]]\ntype = 'tap'\n",
            USAGE,
            &["net0", "name="],
        ),
    ] {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("vm.toml"), text).unwrap();
        let launcher = Launcher::start_in(directory, &["up", "vm.toml"]);
        expect(launcher, code, parts, vec!["vm.toml".into()]);
    }
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("vm.toml"), b"kernel = '\xff'\n").unwrap();
    let binary = Launcher::start_in(directory, &["up", "vm.toml"]);
    let parts = ["outrigger: VM file vm.toml: not UTF-8 from byte 10 on"];
    expect(binary, USAGE, &parts, vec!["vm.toml".into()]);
    let missing = Launcher::start(&["up", "missing.toml"]);
    let parts = ["outrigger: VM file missing.toml: No such file"];
    expect(missing, FAILURE, &parts, Vec::new());
    let directory = Launcher::start(&["up", "/"]);
    expect(
        directory,
        FAILURE,
        &["outrigger: VM file /: Is a directory"],
        Vec::new(),
    );
}

#[test]
fn mistakes_on_the_command_line_are_one_line() {
    let path = format!("/tmp/{}", "x".repeat(108));
    let long = format!("unix,path={path}");
    let kernel = ["--kernel", "k"];
    for (arguments, code, parts) in [
        (
            &["--disk", "pth=a"][..],
            USAGE,
            &["--disk", "`pth`", "`path`"][..],
        ),
        (
            &["--disk", "path=a,path=b"],
            USAGE,
            &["--disk", "path is given twice"],
        ),
        (
            &["--disk", "path=a,queues=many"],
            USAGE,
            &["--disk", "queues=many"],
        ),
        (
            &["--disk", "readonly=on"],
            USAGE,
            &["--disk", "missing", "`path`"],
        ),
        (&["--disk", "path="], USAGE, &["disk0", "empty"]),
        (
            &["--net", "isolate"],
            USAGE,
            &["--net", "`isolate`", "`isolated`"],
        ),
        (&["--net", "isolated,name=t"], USAGE, &["net0", "name="]),
        (&["--console", "unix"], USAGE, &["console0", "path="]),
        (
            &["--console", "stdio", "--console", "stdio"],
            USAGE,
            &["only one", "stdio"],
        ),
        (
            &["--kernel", "again"],
            USAGE,
            &["--kernel", "multiple times"],
        ),
        (&["--load", "a@0"], USAGE, &["--load", "--kernel"]),
        (
            &["--on-reset", "perhaps"],
            USAGE,
            &["--on-reset", "perhaps"],
        ),
        (&["--sandbox", "perhaps"], USAGE, &["--sandbox", "perhaps"]),
        (&["--cpus", "many"], USAGE, &["--cpus", "many"]),
        (&["--dsik", "path=a"], USAGE, &["--dsik", "--disk"]),
        (&["--print-script"], USAGE, &["--print-script", "--quiet"]),
        // The process concerned reports these; the launcher adds nothing.
        (
            &["--memory", "lots"],
            USAGE,
            &["vcpu-runner", "--memory", "lots"],
        ),
        (
            &["--net", "isolated,mac=zz"],
            USAGE,
            &["device-net", "--mac", "zz"],
        ),
        (
            &["--disk", "path=missing.img"],
            FAILURE,
            &["outrigger: disk0: missing.img: No such file"],
        ),
        (
            &["--disk", "path=/"],
            FAILURE,
            &["outrigger: disk0: /: neither a regular file"],
        ),
        (
            &["--net", "tap,name=no-such-tap"],
            FAILURE,
            &["net0: tap no-such-tap: No such device"],
        ),
        (
            &["--console", "file,path=/none/a"],
            FAILURE,
            &["outrigger: console0: /none/a: No such file"],
        ),
        (
            &["--serial", "file,path=/none/a"],
            FAILURE,
            &["outrigger: platform: /none/a: No such file"],
        ),
        (
            &["--console", &long],
            USAGE,
            &["outrigger: console0: /tmp/xxx", "107 bytes"],
        ),
        (
            &["--console", "unix,path=/none/a"],
            FAILURE,
            &["outrigger: console0: /none/a: its directory does not exist"],
        ),
        (
            &["--control", "/none/a"],
            FAILURE,
            &["outrigger: --control /none/a: its directory does not exist"],
        ),
        (
            &["--control", &path],
            USAGE,
            &["outrigger: the control socket: /tmp/xxx", "107 bytes"],
        ),
        (
            &["--restart", "sometimes"],
            USAGE,
            &["--restart", "sometimes"],
        ),
        (
            &["--on-loss", "cry"],
            USAGE,
            &["vcpu-runner", "--on-loss", "cry"],
        ),
    ] {
        let arguments = [&["run", "--quiet"], &kernel[..], arguments].concat();
        expect(Launcher::start(&arguments), code, parts, Vec::new());
    }
    for (arguments, parts) in [
        (&["ctl"][..], &["a command is missing"][..]),
        (&["ctl", "vm"], &["'outrigger ctl' requires a subcommand"]),
        (&["ctl", "vm", "swap", "disk0"], &["KEY=VALUE"]),
        (&["ctl", "vm", "expolde"], &["'expolde'"]),
        (&[], &["a command is missing"]),
        (&["rnu"], &["subcommand 'rnu'"]),
        (&["run"], &["--kernel"]),
    ] {
        expect(Launcher::start(arguments), USAGE, parts, Vec::new());
    }
}

/// The launcher alone in a directory, with an empty PATH.
#[test]
fn a_missing_program_is_named() {
    let programs = programs();
    for (file, parts) in [
        (
            None,
            "outrigger: disk0: device-disk is neither beside outrigger nor in PATH",
        ),
        (Some(0o644), "bin/device-disk: Permission denied"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let bin = directory.path().join("bin");
        fs::create_dir(&bin).unwrap();
        fs::copy(programs.join("outrigger"), bin.join("outrigger")).unwrap();
        fs::write(bin.join("disk"), "").unwrap();
        if let Some(mode) = file {
            let program = bin.join("device-disk");
            fs::write(&program, "").unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
        }
        let mut command = Command::new(bin.join("outrigger"));
        command
            .args(["run", "--quiet", "--kernel", "k", "--disk", "path=bin/disk"])
            .env("PATH", directory.path());
        let launcher = Launcher::spawn(directory, command, Stdio::null());
        expect(launcher, FAILURE, &[parts], vec!["bin".into()]);
    }
}

#[test]
fn a_disk_that_is_locked_by_another_machine_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let other = Launch::new("device-disk")
        .args(["--blk-file".as_ref(), image.as_os_str()])
        .listening();
    let arguments = ["run", "--quiet", "--kernel", "k", "--disk", "path=disk.img"];
    let launcher = Launcher::start_in(directory, &arguments);
    let parts = ["device-disk: ", "disk.img", "lock"];
    expect(launcher, FAILURE, &parts, vec!["disk.img".into()]);
    assert!(other.is_running());
}

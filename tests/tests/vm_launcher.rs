//! The launcher starts the processes of a machine together and ends them together.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use outrigger_tests::launcher::{self, Launcher, terminal};
use outrigger_tests::machine::{embedded_guest, skip_kvm};
use rustix::process::{Signal, kill_process};

fn run_arguments<'a>(guest: &'a str, cmdline: &'a str, disk: &'a str) -> Vec<&'a str> {
    vec![
        "run",
        "--kernel",
        guest,
        "--cmdline",
        cmdline,
        "--memory",
        "64M",
        "--disk",
        disk,
        "--net",
        "isolated",
        "--console",
        "file,path=console",
        "--serial",
        "file,path=serial",
    ]
}

fn launch(cmdline: &str, more: &[&str]) -> Launcher {
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk.img");
    File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let disk = format!("path={}", disk.display());
    let guest = embedded_guest().display().to_string();
    let mut arguments = run_arguments(&guest, cmdline, &disk);
    arguments.extend(more);
    Launcher::start_in(directory, &arguments)
}

#[test]
fn the_demo_passes() {
    if skip_kvm() {
        return;
    }
    let mut launcher = Launcher::start(&["demo"]);
    let code = launcher.wait();
    let (stdout, stderr) = (launcher.read("stdout"), launcher.read("stderr"));
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stdout.contains("guest: pass"), "{stdout}{stderr}");
    assert!(stderr.contains("demo passed"), "{stderr}");
    launcher.expect_no_process_left();
}

#[test]
fn run_lists_each_process_unless_quiet() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=main need=block,net,console", &[]);
    assert_eq!(launcher.wait(), 0, "{}", launcher.read("stderr"));
    let shown = launcher.read("stderr");
    for name in ["disk0", "net0", "console0", "platform", "runner"] {
        let lines = shown.lines().filter(|line| line.starts_with(name));
        assert_eq!(lines.count(), 1, "{name}: {shown}");
    }
    assert!(launcher.read("console").contains("guest: pass"));

    let mut quiet = launch("job=main", &["--quiet"]);
    assert_eq!(quiet.wait(), 0);
    assert_eq!(quiet.read("stderr"), "");
}

#[test]
fn up_runs_a_vm_file() {
    if skip_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    File::create(directory.path().join("disk.img"))
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let file = format!(
        "kernel = {:?}\ncmdline = \"job=main need=block\"\nmemory = \"64M\"\n\
         [[disk]]\npath = \"disk.img\"\n[serial]\ntype = \"file\"\npath = \"serial\"\n",
        embedded_guest()
    );
    std::fs::write(directory.path().join("vm.toml"), file).unwrap();
    let mut launcher = Launcher::start_in(directory, &["up", "vm.toml"]);
    assert_eq!(launcher.wait(), 0, "{}", launcher.read("stderr"));
    assert!(launcher.read("serial").contains("guest: pass"));
}

#[test]
fn the_exit_code_is_that_of_the_runner() {
    if skip_kvm() {
        return;
    }
    assert_eq!(launch("job=fail code=3", &[]).wait(), 4);
    let mut reset = launch("job=reset how=cf9", &["--on-reset", "exit"]);
    assert_eq!(reset.wait(), 3);
    reset.expect_no_process_left();
}

#[test]
fn all_processes_end_whichever_dies_first() {
    if skip_kvm() {
        return;
    }
    for (victim, code) in [
        ("device-disk", 5),
        ("device-net", 5),
        ("device-console", 5),
        ("device-platform", 5),
        ("vcpu-runner", 1),
        ("outrigger", -1),
    ] {
        let more = ["--restart", "never", "--on-loss", "stop"];
        let mut launcher = launch("job=idle", &more);
        launcher.wait_file("serial", "idle");
        let pid = launcher.pid_of(victim);
        kill_process(pid, Signal::KILL).unwrap();
        let got = launcher.wait();
        assert_eq!(got, code, "{victim}: {}", launcher.read("stderr"));
        launcher.expect_no_process_left();
        if victim.starts_with("device") {
            assert!(launcher.read("stderr").contains(victim), "{victim}");
        }
    }
}

#[test]
fn a_signal_ends_the_machine_and_all_processes() {
    if skip_kvm() {
        return;
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut launcher = launch("job=idle", &[]);
        launcher.wait_file("serial", "idle");
        kill_process(launcher.pid(), signal).unwrap();
        assert_eq!(
            launcher.wait(),
            0,
            "{signal:?}: {}",
            launcher.read("stderr")
        );
        launcher.expect_no_process_left();
    }
}

/// Types on the terminal of the launcher.
#[test]
fn ctrl_a_x_on_a_stdio_console_ends_the_machine() {
    use std::io::Write;
    if skip_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (mut terminal, slave) = terminal();
    let before = rustix::termios::tcgetattr(&slave).unwrap();
    let guest = embedded_guest().display().to_string();
    let arguments = [
        "run",
        "--kernel",
        &guest,
        "--cmdline",
        "job=echo",
        "--memory",
        "64M",
        "--console",
        "stdio",
    ];
    let mut launcher =
        Launcher::start_with(directory, &arguments, slave.try_clone().unwrap().into());
    // The guest's driver is active once it has printed its size.
    launcher.wait_file("stdout", "size ");
    let raw = rustix::termios::tcgetattr(&slave).unwrap();
    assert!(
        !raw.local_modes
            .contains(rustix::termios::LocalModes::ICANON)
    );
    terminal.write_all(b"typed\r").unwrap();
    launcher.wait_file("stdout", "typed");
    terminal.write_all(b"\x01x").unwrap();
    assert_eq!(launcher.wait(), 0, "{}", launcher.read("stderr"));
    let after = rustix::termios::tcgetattr(&slave).unwrap();
    assert_eq!(
        after.local_modes, before.local_modes,
        "the terminal's mode is restored"
    );
    launcher.expect_no_process_left();
}

#[test]
fn a_device_that_does_not_start_is_named() {
    if skip_kvm() {
        return;
    }
    let guest = embedded_guest().display().to_string();
    let mut launcher = Launcher::start(&run_arguments(&guest, "", "path=/nonexistent.img"));
    assert_eq!(launcher.wait(), 1);
    let printed = launcher.read("stderr");
    assert!(
        printed.contains("/nonexistent.img") && printed.contains("disk0"),
        "{printed}"
    );
    launcher.expect_no_process_left();
}

#[test]
fn launch_sh_runs_the_same_machine() {
    if skip_kvm() {
        return;
    }
    // The programs are those of the test's own build.
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk.img");
    File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let programs = launcher::programs();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/launch.sh");
    let output = Command::new("bash")
        .arg(script)
        .args([embedded_guest(), disk.as_path()])
        .args([
            "--memory",
            "64M",
            "--cmdline",
            "job=main need=block,net,console",
        ])
        .env("OUTRIGGER_BIN", &programs)
        .env("TMPDIR", directory.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("guest: pass"), "{text}");
    let left = std::fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(left, 1, "only the disk image is left");
}

/// Prints the script of a machine and runs it in another directory, with temporary files in
/// `tmp` there.
fn launch_script(shell: &str, cmdline: &str, disk: Option<&str>) -> Launcher {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("tmp")).unwrap();
    let image = directory.path().join("disk.img");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let disk = format!("path={}", disk.unwrap_or(image.to_str().unwrap()));
    let guest = embedded_guest().display().to_string();
    let mut arguments = run_arguments(&guest, cmdline, &disk);
    arguments.push("--print-script");
    let mut printing = Launcher::start(&arguments);
    assert_eq!(printing.wait(), 0, "{}", printing.read("stderr"));
    let script = directory.path().join("script");
    std::fs::write(&script, printing.read("stdout")).unwrap();
    let checked = Command::new(shell).arg("-n").arg(&script).status().unwrap();
    assert!(checked.success());
    let mut command = Command::new(shell);
    command
        .arg(&script)
        .env("TMPDIR", directory.path().join("tmp"));
    Launcher::spawn(directory, command, Stdio::null())
}

fn expect_nothing_left(script: &Launcher) {
    script.expect_no_process_left();
    let left = std::fs::read_dir(script.directory().join("tmp")).unwrap();
    assert_eq!(left.count(), 0);
}

#[test]
fn the_printed_script_runs_the_machine_in_sh_and_bash() {
    if skip_kvm() {
        return;
    }
    for shell in ["sh", "bash"] {
        let mut script = launch_script(shell, "job=main need=block,net,console", None);
        let code = script.wait();
        assert_eq!(code, 0, "{shell}: {}", script.read("stderr"));
        assert_eq!(script.read("stderr"), "", "{shell}");
        assert!(script.read("console").contains("guest: pass"), "{shell}");
        expect_nothing_left(&script);

        let mut failing = launch_script(shell, "job=fail code=3", None);
        assert_eq!(failing.wait(), 4, "{shell}: {}", failing.read("stderr"));
        expect_nothing_left(&failing);
    }
}

/// A VM file leads to the same script as the equivalent options.
#[test]
fn up_and_run_print_the_same_script() {
    let options = [
        "run",
        "--print-script",
        "--kernel",
        "k",
        "--disk",
        "path=a b",
    ];
    let mut run = Launcher::start(&options);
    let directory = tempfile::tempdir().unwrap();
    let file = "kernel = 'k'\n[[disk]]\npath = 'a b'\n";
    std::fs::write(directory.path().join("vm.toml"), file).unwrap();
    let mut up = Launcher::start_in(directory, &["up", "--print-script", "vm.toml"]);
    assert_eq!((run.wait(), up.wait()), (0, 0));
    assert!(run.read("stdout").contains("--blk-file 'a b'"));
    assert_eq!(run.read("stdout"), up.read("stdout"));
}

/// Input reaches the console process although it runs in the background, and Ctrl-A x ends the
/// machine with exit code 0.
#[test]
fn ctrl_a_x_ends_the_machine_of_the_printed_script() {
    use std::io::Write;
    if skip_kvm() {
        return;
    }
    let guest = embedded_guest().display().to_string();
    let mut printing = Launcher::start(&[
        "run",
        "--print-script",
        "--kernel",
        &guest,
        "--cmdline",
        "job=echo",
        "--memory",
        "64M",
        "--console",
        "stdio",
    ]);
    assert_eq!(printing.wait(), 0);
    for shell in ["sh", "bash"] {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(shell);
        command.arg(printing.directory().join("stdout"));
        let (mut writer, reader) = terminal();
        let mut script = Launcher::spawn(directory, command, reader.into());
        script.wait_file("stdout", "size ");
        writer.write_all(b"typed\r").unwrap();
        script.wait_file("stdout", "typed");
        writer.write_all(b"\x01x").unwrap();
        let code = script.wait();
        assert_eq!(code, 0, "{shell}: {}", script.read("stderr"));
        script.expect_no_process_left();
    }
}

#[test]
fn the_printed_script_cleans_up_after_failures_and_signals() {
    if skip_kvm() {
        return;
    }
    for shell in ["sh", "bash"] {
        let mut missing = launch_script(shell, "", Some("/nonexistent.img"));
        assert_eq!(missing.wait(), 1);
        let printed = missing.read("stderr");
        assert_eq!(printed.lines().count(), 1, "{shell}: {printed}");
        assert!(printed.contains("/nonexistent.img"), "{shell}: {printed}");
        expect_nothing_left(&missing);

        for (victim, code) in [("device-disk", 5), ("vcpu-runner", 137)] {
            let mut script = launch_script(shell, "job=idle", None);
            script.wait_file("serial", "idle");
            kill_process(script.pid_of(victim), Signal::KILL).unwrap();
            let got = script.wait();
            assert_eq!(got, code, "{shell}, {victim}: {}", script.read("stderr"));
            expect_nothing_left(&script);
        }
        for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
            let mut script = launch_script(shell, "job=idle", None);
            script.wait_file("serial", "idle");
            kill_process(script.pid(), signal).unwrap();
            let code = script.wait();
            let printed = script.read("stderr");
            assert_eq!(code, 0, "{shell}, {signal:?}: {printed}");
            expect_nothing_left(&script);
        }
    }
}

/// As an ordinary user, in a mount namespace where every user can open /dev/kvm and
/// /dev/net/tun, as on a desktop.
#[test]
fn the_demo_runs_without_root() {
    if skip_kvm() || !rustix::process::geteuid().is_root() {
        return;
    }
    let programs = launcher::programs();
    // A directory that an ordinary user can search.
    let directory = tempfile::tempdir().unwrap();
    let bin = directory.path().join("bin");
    let script = format!(
        "set -e; mount -t tmpfs -o mode=755 none {dir}; mkdir {bin}; cp {from}/{{outrigger,vcpu-runner,device-*}} {bin} 2>/dev/null || true\n\
         mknod {dir}/kvm c 10 232; mknod {dir}/tun c 10 200; chmod 666 {dir}/kvm {dir}/tun\n\
         mount --bind {dir}/kvm /dev/kvm; mount --bind {dir}/tun /dev/net/tun\n\
         exec setpriv --reuid 65534 --regid 65534 --clear-groups {bin}/outrigger demo",
        dir = directory.path().display(),
        bin = bin.display(),
        from = programs.display(),
    );
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "bash", "-c", &script])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("guest: pass"), "{text}");
}

#[test]
fn mistakes_that_the_runner_detects_are_one_line() {
    if skip_kvm() {
        return;
    }
    let guest = embedded_guest().display().to_string();
    for (kernel, more, code, parts) in [
        ("missing", &[][..], 1, &["missing", "No such file"][..]),
        ("/", &[], 1, &["/"]),
        (
            &guest,
            &["--initrd", "missing"],
            1,
            &["missing", "No such file"],
        ),
    ] {
        let arguments = [&["run", "--quiet", "--kernel", kernel], more].concat();
        let mut launcher = Launcher::start(&arguments);
        assert_eq!(launcher.wait(), code);
        let printed = launcher.read("stderr");
        assert_eq!(printed.lines().count(), 1, "{printed}");
        assert!(printed.starts_with("vcpu-runner: "), "{printed}");
        for part in parts {
            assert!(printed.contains(part), "no {part:?} in: {printed}");
        }
        launcher.expect_no_process_left();
    }
}

//! The launcher: processes that come and go together.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outrigger_tests::machine::{embedded_guest, skip_kvm};
use outrigger_tests::{binaries, wait_until};
use rustix::process::{Pid, Signal, kill_process};

/// The launcher, running, in a session of its own by which its processes are
/// found; whatever is left of it is killed at the end.
struct Launcher {
    child: Child,
    directory: tempfile::TempDir,
}

impl Launcher {
    fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self::start_in(directory, arguments)
    }

    fn start_in(directory: tempfile::TempDir, arguments: &[&str]) -> Self {
        Self::start_with(directory, arguments, Stdio::null())
    }

    fn start_with(directory: tempfile::TempDir, arguments: &[&str], stdin: Stdio) -> Self {
        for name in [
            "vcpu-runner",
            "device-disk",
            "device-net",
            "device-console",
            "device-platform",
        ] {
            binaries::binary(name);
        }
        let output = |name: &str| File::create(directory.path().join(name)).unwrap();
        let mut command = Command::new(binaries::binary("outrigger"));
        command
            .args(arguments)
            .current_dir(directory.path())
            .stdin(stdin)
            .stdout(output("stdout"))
            .stderr(output("stderr"));
        // SAFETY: setsid(2) is async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                Ok(())
            })
        };
        let child = command.spawn().unwrap();
        Launcher { child, directory }
    }

    fn read(&self, name: &str) -> String {
        let bytes = std::fs::read(self.directory.path().join(name)).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Process ids of a session, with the programs' names.
    fn processes(&self) -> Vec<(i32, String)> {
        let session = self.child.id().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap() {
            let path = entry.unwrap().path();
            let Ok(stat) = std::fs::read_to_string(path.join("stat")) else {
                continue;
            };
            let Some((head, tail)) = stat.rsplit_once(')') else {
                continue;
            };
            let fields: Vec<&str> = tail.split_whitespace().collect();
            // State and session (proc_pid_stat(5) numbers 3 and 6).
            if fields[3] == session && fields[0] != "Z" {
                let (pid, name) = head.split_once(" (").unwrap();
                found.push((pid.parse().unwrap(), name.to_owned()));
            }
        }
        found
    }

    fn pid_of(&self, name: &str) -> Pid {
        let mut pid = None;
        wait_until(&format!("{name} runs"), || {
            // The kernel keeps 15 bytes of a name.
            pid = self
                .processes()
                .into_iter()
                .find(|p| name.starts_with(&p.1) && p.1.len() >= 9)
                .and_then(|p| Pid::from_raw(p.0));
            pid.is_some()
        });
        pid.unwrap()
    }

    fn wait(&mut self) -> i32 {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(60) {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the launcher did not end: {}", self.read("stderr"));
    }

    fn expect_nobody_left(&self) {
        wait_until("nobody is left", || self.processes().is_empty());
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for (pid, _) in self.processes() {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

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

fn wait_file(launcher: &Launcher, name: &str, text: &str) {
    wait_until(&format!("{name} says {text:?}"), || {
        std::fs::read_to_string(launcher.directory.path().join(name))
            .is_ok_and(|content| content.contains(text))
    });
}

#[test]
fn the_demo_passes_and_says_so() {
    if skip_kvm() {
        return;
    }
    let mut launcher = Launcher::start(&["demo"]);
    let code = launcher.wait();
    let (stdout, stderr) = (launcher.read("stdout"), launcher.read("stderr"));
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stdout.contains("guest: pass"), "{stdout}{stderr}");
    assert!(stderr.contains("demo passed"), "{stderr}");
    launcher.expect_nobody_left();
}

#[test]
fn run_shows_one_line_a_process_and_quiet_shows_none() {
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
fn up_runs_what_a_file_describes() {
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
fn the_exit_code_is_the_runners() {
    if skip_kvm() {
        return;
    }
    assert_eq!(launch("job=fail code=3", &[]).wait(), 4);
    let mut reset = launch("job=reset how=cf9", &["--on-reset", "exit"]);
    assert_eq!(reset.wait(), 3);
    reset.expect_nobody_left();
}

#[test]
fn nobody_is_left_whoever_dies_first() {
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
        let mut launcher = launch("job=idle", &[]);
        wait_file(&launcher, "serial", "idle");
        let pid = launcher.pid_of(victim);
        kill_process(pid, Signal::KILL).unwrap();
        let got = launcher.wait();
        assert_eq!(got, code, "{victim}: {}", launcher.read("stderr"));
        launcher.expect_nobody_left();
        if victim.starts_with("device") {
            assert!(launcher.read("stderr").contains(victim), "{victim}");
        }
    }
}

#[test]
fn signals_end_all_of_it() {
    if skip_kvm() {
        return;
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut launcher = launch("job=idle", &[]);
        wait_file(&launcher, "serial", "idle");
        kill_process(Pid::from_child(&launcher.child), signal).unwrap();
        assert_eq!(
            launcher.wait(),
            0,
            "{signal:?}: {}",
            launcher.read("stderr")
        );
        launcher.expect_nobody_left();
    }
}

/// Types on a terminal that the launcher runs in.
#[test]
fn ctrl_a_x_on_a_stdio_console_ends_the_machine() {
    use std::io::Write;
    if skip_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY;
    let terminal = rustix::pty::openpt(flags).unwrap();
    rustix::pty::unlockpt(&terminal).unwrap();
    let name = rustix::pty::ptsname(&terminal, Vec::new()).unwrap();
    let slave = File::options()
        .read(true)
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
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
    // The guest's driver is at work once it has said its size.
    wait_file(&launcher, "stdout", "size ");
    let raw = rustix::termios::tcgetattr(&slave).unwrap();
    assert!(
        !raw.local_modes
            .contains(rustix::termios::LocalModes::ICANON)
    );
    let mut terminal = File::from(terminal);
    terminal.write_all(b"typed\r").unwrap();
    wait_file(&launcher, "stdout", "typed");
    terminal.write_all(b"\x01x").unwrap();
    assert_eq!(launcher.wait(), 0, "{}", launcher.read("stderr"));
    let after = rustix::termios::tcgetattr(&slave).unwrap();
    assert_eq!(
        after.local_modes, before.local_modes,
        "the terminal is as it was"
    );
    launcher.expect_nobody_left();
}

#[test]
fn a_device_that_does_not_start_is_named() {
    if skip_kvm() {
        return;
    }
    let guest = embedded_guest().display().to_string();
    let mut launcher = Launcher::start(&run_arguments(&guest, "", "path=/nonexistent.img"));
    assert_eq!(launcher.wait(), 1);
    let said = launcher.read("stderr");
    assert!(
        said.contains("/nonexistent.img") && said.contains("disk0"),
        "{said}"
    );
    launcher.expect_nobody_left();
}

#[test]
fn a_plain_shell_script_does_the_same() {
    if skip_kvm() {
        return;
    }
    // The binaries are those of the test's own build.
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk.img");
    File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let runner = binaries::binary("vcpu-runner");
    for name in [
        "device-disk",
        "device-net",
        "device-console",
        "device-platform",
    ] {
        binaries::binary(name);
    }
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
        .env("OUTRIGGER_BIN", runner.parent().unwrap())
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

/// As an ordinary user, in a mount namespace whose /dev/kvm and /dev/net/tun are
/// open to everybody, as a desktop's are.
#[test]
fn the_demo_runs_without_root() {
    if skip_kvm() || !rustix::process::geteuid().is_root() {
        return;
    }
    for name in [
        "vcpu-runner",
        "device-disk",
        "device-net",
        "device-console",
        "device-platform",
    ] {
        binaries::binary(name);
    }
    let outrigger = binaries::binary("outrigger");
    // Somewhere that an ordinary user may look into.
    let directory = tempfile::tempdir().unwrap();
    let bin = directory.path().join("bin");
    let script = format!(
        "set -e; mount -t tmpfs -o mode=755 none {dir}; mkdir {bin}; cp {from}/{{outrigger,vcpu-runner,device-*}} {bin} 2>/dev/null || true\n\
         mknod {dir}/kvm c 10 232; mknod {dir}/tun c 10 200; chmod 666 {dir}/kvm {dir}/tun\n\
         mount --bind {dir}/kvm /dev/kvm; mount --bind {dir}/tun /dev/net/tun\n\
         exec setpriv --reuid 65534 --regid 65534 --clear-groups {bin}/outrigger demo",
        dir = directory.path().display(),
        bin = bin.display(),
        from = outrigger.parent().unwrap().display(),
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

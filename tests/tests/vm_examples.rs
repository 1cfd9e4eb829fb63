//! Runs the examples unchanged: the systemd units, and one guest on three disk back ends.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use outrigger_tests::launcher::{Launcher, programs};
use outrigger_tests::machine::{embedded_guest, skip_kvm};
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::{DEADLINE, binaries, wait_until};

/// The id of an unprivileged user.
const USER: u32 = 65534;
const MACHINE: &str = "demo";
const DEVICES: [&str; 4] = ["disk", "net", "console", "platform"];

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

/// Checks that a program of Debian's package `package` is installed.
fn expect_installed(program: &str, package: &str) {
    let found = std::env::split_paths(&std::env::var_os("PATH").unwrap())
        .any(|directory| directory.join(program).is_file());
    assert!(
        found,
        "{program} is missing: install Debian's package {package}"
    );
}

#[test]
fn systemd_analyze_accepts_the_units() {
    expect_installed("systemd-analyze", "systemd");
    let directory = tempfile::tempdir().unwrap();
    let programs = format!("ExecStart={}/", programs().display());
    let mut units = Vec::new();
    for entry in fs::read_dir(examples().join("systemd")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "env") {
            continue;
        }
        // The programs are not at the paths of an installed package.
        let text = fs::read_to_string(&path).unwrap();
        let unit = directory.path().join(path.file_name().unwrap());
        fs::write(&unit, text.replace("ExecStart=/usr/bin/", &programs)).unwrap();
        units.push(unit);
    }
    assert_eq!(units.len(), 9);
    let verify = |units: &[PathBuf]| {
        let output = Command::new("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=yes"])
            .args(units)
            .output()
            .unwrap();
        let printed = String::from_utf8(output.stderr).unwrap();
        (output.status.success(), printed)
    };
    assert_eq!(verify(&units), (true, String::new()));
    // systemd-analyze prints a line for each mistake.
    let text = fs::read_to_string(&units[0]).unwrap();
    fs::write(&units[0], text.replace("Description=", "Descripton=")).unwrap();
    assert!(verify(&units).1.contains("Descripton"));
}

/// Returns the value of `key` in the unit `name` for [`MACHINE`], with continued lines joined.
fn value(name: &str, key: &str) -> String {
    let path = examples().join("systemd").join(name);
    let text = fs::read_to_string(&path).unwrap().replace("\\\n", " ");
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let line = line.unwrap_or_else(|| panic!("{name}: no {key}"));
    line.trim_start_matches('=').replace("%i", MACHINE)
}

/// The commands of the units and the environment file, with paths in `directory` instead of
/// the host's, for a shell. As systemd does, `$NAME` expands to several words.
struct Units {
    directory: PathBuf,
    environment: Vec<(String, String)>,
}

impl Units {
    fn new(directory: &Path) -> Self {
        let text = fs::read_to_string(examples().join("systemd/example.env")).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let environment = lines.filter_map(|line| line.split_once('='));
        Units {
            directory: directory.to_owned(),
            environment: environment
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        }
    }

    fn here(&self, text: &str) -> String {
        let directory = self.directory.display();
        text.replace("/usr/bin", &format!("{directory}/bin"))
            .replace("/run/outrigger", &format!("{directory}/run"))
            .replace("/var/lib/outrigger", &format!("{directory}/lib"))
            // The job of the embedded guest.
            .replace(
                "console=hvc0 root=/dev/vda",
                "job=main need=block,net,console",
            )
    }

    fn command(&self, unit: &str) -> String {
        let mut command = value(unit, "ExecStart");
        for (name, value) in &self.environment {
            command = command.replace(&format!("${name}"), value);
        }
        self.here(&command)
    }

    /// Starts `command` like the user of the units: an ordinary user without capabilities that
    /// can open /dev/kvm and /dev/net/tun.
    fn start(&self, command: &str) -> Process {
        let script = format!(
            "set -e; cd {}; mount --bind {} bin; mount -t tmpfs -o mode=755 none dev\n\
             mknod dev/kvm c 10 232; mknod dev/tun c 10 200; chmod 666 dev/*\n\
             mount --bind dev/kvm /dev/kvm; mount --bind dev/tun /dev/net/tun\n\
             exec setpriv --reuid {USER} --regid {USER} --clear-groups --no-new-privs \
             --inh-caps=-all --bounding-set=-all {command}",
            self.directory.display(),
            programs().display(),
        );
        Launch::program(Path::new("unshare"))
            .args(["--mount", "--propagation", "private", "sh", "-c", &script])
            .spawn()
    }

    /// Starts the device's unit as systemd does: another process listens and starts the program
    /// when a client connects.
    fn activate(&self, device: &str) -> (Process, UnixDatagram) {
        let notify = self.directory.join(format!("notify-{device}"));
        let notified = UnixDatagram::bind(&notify).unwrap();
        notified.set_read_timeout(Some(DEADLINE)).unwrap();
        chown(&notify, Some(USER), None).unwrap();
        let socket = self.here(&value(&format!("device-{device}@.socket"), "ListenStream"));
        let process = self.start(&format!(
            "systemd-socket-activate --listen={socket} --setenv=NOTIFY_SOCKET={} {}",
            notify.display(),
            self.command(&format!("device-{device}@.service")),
        ));
        wait_until("it listens", || Path::new(&socket).exists());
        (process, notified)
    }
}

#[test]
fn a_guest_runs_on_socket_activated_devices() {
    if skip_kvm() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can become the units' user");
        return;
    }
    expect_installed("systemd-socket-activate", "systemd");
    let directory = tempfile::tempdir().unwrap();
    for name in ["bin", "dev", "lib", "run", "run/demo", "run/demo/console.d"] {
        fs::create_dir(directory.path().join(name)).unwrap();
    }
    let image = fs::File::create(directory.path().join("lib/disk.img")).unwrap();
    image.set_len(64 << 20).unwrap();
    fs::copy(embedded_guest(), directory.path().join("lib/vmlinux")).unwrap();
    for name in [
        "",
        "lib",
        "lib/disk.img",
        "run",
        "run/demo",
        "run/demo/console.d",
    ] {
        chown(directory.path().join(name), Some(USER), None).unwrap();
    }
    let units = Units::new(directory.path());
    let devices = DEVICES.map(|device| units.activate(device));
    // No device process runs before a client connects.
    for (process, _) in &devices {
        let running = fs::read_to_string(process.proc("comm")).unwrap();
        assert!(running.starts_with("systemd-"), "{running}");
    }

    let runner = units.start(&units.command("vm@.service"));
    let code = runner.wait().code();
    let log: Vec<String> = devices.iter().map(|device| device.0.log()).collect();
    assert_eq!(code, Some(0), "{}\n{}", runner.log(), log.join("\n"));
    for ((process, notified), name) in devices.iter().zip(DEVICES) {
        let mut message = [0; 64];
        let length = notified.recv(&mut message).unwrap();
        assert_eq!(&message[..length], b"READY=1\n", "{name}");
        let running = fs::read_to_string(process.proc("comm")).unwrap();
        assert!(running.starts_with("device-"), "{running}");
        assert!(process.is_running(), "{name}: {}", process.log());
    }
    let image = fs::read(directory.path().join("lib/disk.img")).unwrap();
    assert!(image[..4096].iter().any(|&byte| byte != 0));
}

#[test]
fn the_same_guest_runs_on_three_disk_back_ends() {
    if skip_kvm() {
        return;
    }
    expect_installed("qemu-storage-daemon", "qemu-system-common");
    binaries::binary("template-device");
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("tmp")).unwrap();
    embedded_guest();
    let mut command = Command::new(examples().join("swap-backend.sh"));
    command
        .env("OUTRIGGER_BIN", programs())
        .env("CARGO_TARGET_DIR", binaries::target_directory())
        .env("TMPDIR", directory.path().join("tmp"));
    let mut script = Launcher::spawn(directory, command, Stdio::null());
    let code = script.wait();
    let (printed, errors) = (script.read("stdout"), script.read("stderr"));
    assert_eq!(code, 0, "{printed}{errors}");
    assert_eq!(errors, "");
    assert_eq!(printed.matches("guest: pass").count(), 3, "{printed}");
    assert_eq!(
        printed.matches("4096 KiB written and verified").count(),
        3,
        "{printed}"
    );
    for (number, line) in printed
        .lines()
        .filter(|line| line.starts_with("== "))
        .enumerate()
    {
        let names = ["device-disk", "qemu-storage-daemon", "template-device"];
        assert_eq!(line, format!("== {}", names[number]));
    }
    script.expect_no_process_left();
    let left = fs::read_dir(script.directory().join("tmp")).unwrap();
    assert_eq!(left.count(), 0);
}

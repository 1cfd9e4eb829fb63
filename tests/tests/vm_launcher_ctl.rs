//! `outrigger ctl`: its output, and its effect on a running machine.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use outrigger_protocol::control::{DeviceState, MachineEvent, MachineState};
use outrigger_tests::launcher::{Launcher, programs, terminal};
use outrigger_tests::machine::{embedded_guest, skip_kvm};
use outrigger_tests::process::Launch;
use outrigger_tests::wait_until;
use rustix::process::Signal;

fn launch(cmdline: &str, more: &[&str]) -> Launcher {
    launch_with(cmdline, more, Stdio::null())
}

fn launch_with(cmdline: &str, more: &[&str], stdin: Stdio) -> Launcher {
    let directory = tempfile::tempdir().unwrap();
    for name in ["disk.img", "other.img"] {
        let image = File::create(directory.path().join(name)).unwrap();
        image.set_len(64 << 20).unwrap();
    }
    let guest = embedded_guest().display().to_string();
    let mut arguments = vec!["run", "--kernel", &guest, "--cmdline", cmdline];
    arguments.extend(["--memory", "64M", "--disk", "path=disk.img,queues=4"]);
    arguments.extend(["--serial", "file,path=serial", "--control", "control"]);
    arguments.extend(more);
    Launcher::start_with(directory, &arguments, stdin)
}

fn expect_end(launcher: &mut Launcher, code: i32) {
    let got = launcher.wait();
    assert_eq!(got, code, "{}", launcher.read("stderr"));
    launcher.expect_no_process_left();
    let mut left = std::fs::read_dir(launcher.directory()).unwrap();
    let stale = left.any(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        name == "control" || name.starts_with("outrigger.")
    });
    assert!(!stale);
}

/// Checks that a command is refused with one line, and that nothing has changed.
fn expect_refused(launcher: &Launcher, arguments: &[&str], parts: &[&str]) {
    let (code, printed, error) = launcher.ctl(arguments);
    assert_eq!((code, printed.as_str()), (1, ""), "{arguments:?}: {error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    for part in parts {
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
    wait_until("only one process is left", || {
        let processes = launcher.processes();
        processes.iter().filter(|it| it.1 == "device-disk").count() == 1
    });
    assert_eq!(launcher.state("disk0"), DeviceState::Running);
}

#[test]
fn status_pause_resume_reset_and_stop_work() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=disk-chaos count=0", &["--net", "isolated"]);
    launcher.wait_file("serial", "disk-chaos: ready");
    let table = launcher.do_ctl(&["status"]);
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert!(
        table.starts_with("running, 1 vCPU, 64 MiB, 0 resets\n"),
        "{table}"
    );
    assert_eq!(lines[2][..4], ["disk0", "block", "running", "yes"]);
    assert_eq!(lines[3][..4], ["net0", "net", "running", "no"]);
    assert_eq!(lines[4], ["platform", "running"]);
    launcher.do_ctl(&["pause"]);
    assert_eq!(launcher.status().state, MachineState::Paused);
    launcher.do_ctl(&["resume"]);
    launcher.do_ctl(&["reset"]);
    wait_until("the machine was reset", || launcher.status().resets == 1);
    launcher.do_ctl(&["stop"]);
    expect_end(&mut launcher, 0);
    let (code, _, error) = launcher.ctl(&["status"]);
    assert_eq!(code, 1);
    assert!(
        error.starts_with("outrigger: control: No such file"),
        "{error}"
    );
    assert_eq!(error.lines().count(), 1);
}

#[test]
fn watch_shows_events_until_the_machine_ends() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=disk-chaos count=0", &[]);
    launcher.wait_file("serial", "disk-chaos: ready");
    let watch = |arguments: &[&str]| {
        Command::new(programs().join("outrigger"))
            .args(["ctl", "control"])
            .args(arguments)
            .current_dir(launcher.directory())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let (json, text) = (watch(&["watch", "--json"]), watch(&["status", "--watch"]));
    // Give both time to subscribe.
    std::thread::sleep(Duration::from_millis(300));
    let old = launcher.signal("device-disk", Signal::KILL);
    launcher.wait_successor("device-disk", old);
    wait_until("the device runs", || {
        let disk = &launcher.status().devices[0];
        disk.losses == 1 && disk.state == DeviceState::Running
    });
    launcher.do_ctl(&["restart", "disk0"]);
    launcher.do_ctl(&["stop"]);
    expect_end(&mut launcher, 0);
    let (json, text) = (
        json.wait_with_output().unwrap(),
        text.wait_with_output().unwrap(),
    );
    assert!(json.status.success() && text.status.success());
    let json = String::from_utf8(json.stdout).unwrap();
    let events: Vec<MachineEvent> = json
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let has = |wanted: fn(&MachineEvent) -> bool| assert!(events.iter().any(wanted), "{events:?}");
    has(|it| matches!(it, MachineEvent::DeviceLost { tracked: true, .. }));
    has(|it| matches!(it, MachineEvent::DeviceRunning { .. }));
    has(|it| matches!(it, MachineEvent::DeviceSwapped { .. }));
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.starts_with("running, 1 vCPU"), "{text}");
    assert!(
        text.lines()
            .any(|line| line.starts_with("device-swapped") && line.contains("disk0"))
    );
}

#[test]
fn disk_and_platform_are_restarted_under_load() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=disk-chaos seconds=3 count=0", &[]);
    launcher.wait_file("serial", "disk-chaos: ready");
    for (id, name) in [("disk0", "device-disk"), ("platform", "device-platform")].repeat(5) {
        let old = launcher.pid_of(name);
        launcher.do_ctl(&["restart", id]);
        assert_ne!(launcher.wait_successor(name, old), old);
    }
    assert_eq!(launcher.status().devices[0].swaps, 5);
    assert_eq!(launcher.status().devices[0].losses, 0);
    // The new process is restarted like any other when it is killed.
    let old = launcher.signal("device-disk", Signal::KILL);
    launcher.wait_successor("device-disk", old);
    expect_end(&mut launcher, 0);
    assert!(launcher.read("serial").contains("guest: pass"));
}

#[test]
fn a_refused_swap_changes_nothing() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=disk-chaos count=0", &[]);
    launcher.wait_file("serial", "disk-chaos: ready");
    let small = File::create(launcher.directory().join("small.img")).unwrap();
    small.set_len(1 << 20).unwrap();
    for (with, parts) in [
        (
            "path=missing.img",
            &["disk0: ", "missing.img: No such file"][..],
        ),
        ("path=small.img,queues=4", &["disk0", "capacity"]),
        ("path=other.img", &["disk0", "queues"]),
        ("path=other.img,queues=4,readonly=on", &["disk0"]),
        ("path=other.img,queues=many", &["disk0", "queues=many"]),
        ("pth=other.img", &["disk0", "`pth`", "`path`"]),
        (
            "path=other.img,serial=much-longer-than-twenty-bytes",
            &["device-disk", "--serial"],
        ),
        ("socket=missing.sock", &["disk0", "missing.sock"]),
    ] {
        expect_refused(&launcher, &["swap", "disk0", with], parts);
    }
    expect_refused(
        &launcher,
        &["swap", "disk7", "path=other.img"],
        &["disk7", "use one of disk0"],
    );
    expect_refused(
        &launcher,
        &["swap", "platform", "null"],
        &["platform", "cannot be swapped"],
    );
    assert_eq!(launcher.status().devices[0].swaps, 0);
    launcher.do_ctl(&["stop"]);
    expect_end(&mut launcher, 0);
}

/// Swaps to another image, which a process that is started after a kill also uses.
#[test]
fn after_a_swap_the_new_description_is_used_for_restarts() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=disk-io count=1000000000", &[]);
    launcher.wait_file("serial", "disk-io: ready");
    let directory = launcher.directory().to_owned();
    launcher.do_ctl(&["swap", "disk0", "path=other.img,queues=4"]);
    let old = launcher.signal("device-disk", Signal::KILL);
    let new = launcher.wait_successor("device-disk", old);
    let files = format!("/proc/{}/fd", new.as_raw_nonzero());
    let open: Vec<_> = std::fs::read_dir(files)
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .collect();
    let holds = |name: &str| open.contains(&directory.join(name));
    assert!(holds("other.img") && !holds("disk.img"), "{open:?}");
    // The old image is no longer locked, so a swap back succeeds. The next swap uses the same
    // image, which both processes share.
    launcher.do_ctl(&["swap", "disk0", "path=disk.img,queues=4"]);
    launcher.do_ctl(&["swap", "disk0", "path=disk.img,queues=8"]);
    launcher.do_ctl(&["stop"]);
    expect_end(&mut launcher, 0);
}

#[test]
fn a_restart_replaces_a_stopped_process() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=disk-chaos seconds=3 count=0", &[]);
    launcher.wait_file("serial", "disk-chaos: ready");
    let old = launcher.signal("device-disk", Signal::STOP);
    let start = Instant::now();
    // The first attempt may only detect that the process does not answer.
    let _ = launcher.ctl(&["restart", "disk0"]);
    launcher.wait_successor("device-disk", old);
    wait_until("the device runs", || {
        launcher.state("disk0") == DeviceState::Running
    });
    assert!(start.elapsed() < Duration::from_secs(25));
    expect_end(&mut launcher, 0);
    assert!(launcher.read("serial").contains("guest: pass"));
}

/// Swaps to a process that the launcher did not start, and back.
#[test]
fn a_disk_is_swapped_to_qemu_storage_daemon_and_back() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=disk-chaos seconds=4 count=0 lengths=any", &[]);
    launcher.wait_file("serial", "disk-chaos: ready");
    let socket = launcher.directory().join("qsd");
    let image = launcher.directory().join("disk.img");
    let blockdev = format!(
        "driver=file,node-name=i,locking=off,filename={}",
        image.display()
    );
    let export = format!(
        "type=vhost-user-blk,id=d,node-name=i,writable=on,num-queues=4,addr.type=unix,addr.path={}",
        socket.display()
    );
    let _daemon = Launch::program(Path::new("qemu-storage-daemon"))
        .args(["--blockdev", &blockdev, "--export", &export])
        .spawn();
    wait_until("it listens", || socket.exists());
    launcher.do_ctl(&["swap", "disk0", "socket=qsd"]);
    wait_until("device-disk is gone", || {
        launcher.processes().iter().all(|it| it.1 != "device-disk")
    });
    let (code, _, error) = launcher.ctl(&["restart", "disk0"]);
    assert_eq!(code, 1);
    assert!(
        error.contains("the launcher did not start its process"),
        "{error}"
    );
    std::thread::sleep(Duration::from_millis(300));
    launcher.do_ctl(&["swap", "disk0", "path=disk.img,queues=4"]);
    expect_end(&mut launcher, 0);
    assert!(launcher.read("serial").contains("guest: pass"));
}

/// The mode of the user's terminal is restored whenever no console uses it.
#[test]
fn the_terminal_mode_is_restored_when_a_console_leaves_it() {
    if skip_kvm() {
        return;
    }
    let (mut keyboard, slave) = terminal();
    let canonical = || {
        let mode = rustix::termios::tcgetattr(&slave).unwrap();
        mode.local_modes
            .contains(rustix::termios::LocalModes::ICANON)
    };
    assert!(canonical());
    let stdin = slave.try_clone().unwrap().into();
    let mut launcher = launch_with("job=echo", &["--console", "stdio"], stdin);
    launcher.wait_file("stdout", "size ");
    assert!(!canonical());
    // A successor sets raw mode again.
    kill_and_type(&launcher, &mut keyboard, "first");
    assert!(!canonical());
    launcher.do_ctl(&["restart", "console0"]);
    wait_until("the terminal is in raw mode again", || !canonical());
    keyboard.write_all(b"second\r").unwrap();
    launcher.wait_file("stdout", "second");
    expect_error(&launcher, "stdio", "uses stdio already");

    launcher.do_ctl(&["swap", "console0", "pty,path=link"]);
    wait_until("the terminal's mode is restored", canonical);
    let link = launcher.directory().join("link");
    let mut options = File::options();
    let mut pty = options.read(true).write(true).open(link).unwrap();
    pty.write_all(b"quit\n").unwrap();
    expect_end(&mut launcher, 0);
    assert!(canonical());

    // Also when a console is killed and not restarted.
    let stdin = slave.try_clone().unwrap().into();
    let more = ["--console", "stdio", "--restart", "never"];
    let mut launcher = launch_with("job=echo", &more, stdin);
    launcher.wait_file("stdout", "size ");
    assert!(!canonical());
    launcher.signal("device-console", Signal::KILL);
    wait_until("the terminal's mode is restored", canonical);
    launcher.do_ctl(&["stop"]);
    expect_end(&mut launcher, 0);
}

fn expect_error(launcher: &Launcher, with: &str, part: &str) {
    let (code, _, error) = launcher.ctl(&["swap", "console0", with]);
    assert!(code == 1 && error.contains(part), "{code}: {error}");
}

fn kill_and_type(launcher: &Launcher, keyboard: &mut File, word: &str) {
    let old = launcher.signal("device-console", Signal::KILL);
    launcher.wait_successor("device-console", old);
    wait_until("the device runs", || {
        let console = &launcher.status().devices[1];
        console.losses == 1 && console.state == DeviceState::Running
    });
    write!(keyboard, "{word}\r").unwrap();
    launcher.wait_file("stdout", word);
}

#[test]
fn silent_and_non_reading_clients_do_not_block_others() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=idle", &[]);
    launcher.wait_file("serial", "idle");
    let connect = || UnixStream::connect(launcher.directory().join("control")).unwrap();
    let mut silent: Vec<UnixStream> = (0..30).map(|_| connect()).collect();
    silent.last_mut().unwrap().write_all(b"{\"comm").unwrap();
    // Sends commands and reads no replies.
    let mut non_reading = connect();
    non_reading
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let commands = b"{\"command\":\"status\"}\n".repeat(100_000);
    let _ = non_reading.write_all(&commands);
    for _ in 0..3 {
        assert_eq!(launcher.status().state, MachineState::Running);
    }
    let mut long = connect();
    long.set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let _ = long.write_all(&b"x".repeat(100_000));
    let mut printed = String::new();
    let _ = long.read_to_string(&mut printed);
    assert!(printed.contains("longer than 65536 bytes"), "{printed}");
    launcher.do_ctl(&["stop"]);
    expect_end(&mut launcher, 0);
}

//! Device processes that are killed or stopped while the launcher runs a machine: the launcher
//! restarts them, and the guest does not notice.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use outrigger_protocol::control::DeviceState;
use outrigger_tests::launcher::{Launcher, programs};
use outrigger_tests::machine::{embedded_guest, skip_kvm};
use outrigger_tests::wait_until;
use rustix::process::{Signal, kill_process};

const DEVICES: [&str; 4] = [
    "device-disk",
    "device-net",
    "device-console",
    "device-platform",
];

fn launch(cmdline: &str, more: &[&str]) -> Launcher {
    let directory = tempfile::tempdir().unwrap();
    let image = File::create(directory.path().join("disk.img")).unwrap();
    image.set_len(64 << 20).unwrap();
    let guest = embedded_guest().display().to_string();
    let mut arguments = vec!["run", "--kernel", &guest, "--cmdline", cmdline];
    arguments.extend(["--memory", "64M", "--disk", "path=disk.img,queues=4"]);
    arguments.extend(["--net", "isolated", "--serial", "file,path=serial"]);
    arguments.extend(["--control", "control"]);
    if !more.contains(&"--console") {
        arguments.extend(["--console", "file,path=console"]);
    }
    arguments.extend(more);
    Launcher::start_in(directory, &arguments)
}

/// Waits for the end, and checks that only files of the test are left.
fn expect_end(launcher: &mut Launcher, code: i32) {
    let got = launcher.wait();
    assert_eq!(got, code, "{}", launcher.read("stderr"));
    launcher.expect_no_process_left();
    let mut left: Vec<_> = std::fs::read_dir(launcher.directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    let known = ["console", "disk.img", "serial", "stderr", "stdout"];
    assert!(
        left.iter().all(|it| known.contains(&it.as_str())),
        "{left:?}"
    );
}

fn deaths(launcher: &Launcher, id: &str) -> usize {
    let printed = launcher.read("stderr");
    let line = format!("outrigger: {id}: ");
    printed.lines().filter(|it| it.starts_with(&line)).count()
}

/// Kills `name` and waits for its successor, `times` times.
fn kill(launcher: &Launcher, name: &str, times: usize, pause: Duration) {
    for _ in 0..times {
        std::thread::sleep(pause);
        let old = launcher.signal(name, Signal::KILL);
        launcher.wait_successor(name, old);
    }
}

#[test]
fn killing_the_disk_process_loses_no_data() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=disk-chaos seconds=4 count=0", &[]);
    launcher.wait_file("serial", "disk-chaos: ready");
    kill(&launcher, "device-disk", 5, Duration::from_millis(150));
    assert!(launcher.status().devices[0].losses >= 1);
    expect_end(&mut launcher, 0);
    assert!(launcher.read("serial").contains("guest: pass"));
    assert_eq!(deaths(&launcher, "disk0"), 5, "{}", launcher.read("stderr"));
}

#[test]
fn killing_the_platform_process_repeats_no_line() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=serial lines=3000", &[]);
    launcher.wait_file("serial", "line 000010");
    kill(&launcher, "device-platform", 5, Duration::from_millis(30));
    expect_end(&mut launcher, 0);
    let serial = launcher.read("serial");
    let lines = serial.lines().filter(|line| line.starts_with("line "));
    let numbers: Vec<usize> = lines
        .map(|line| line[5..].trim().parse().unwrap())
        .collect();
    assert_eq!(numbers, (1..=3000).collect::<Vec<_>>());
    assert_eq!(deaths(&launcher, "platform"), 5);
}

/// The launcher owns the pseudo-terminal, so a client that has it open can keep it.
#[test]
fn killing_the_console_process_keeps_the_pseudo_terminal() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=echo", &["--console", "pty,path=link"]);
    let link = launcher.directory().join("link");
    let mut options = File::options();
    wait_until("the terminal is there", || link.exists());
    let mut terminal = options.read(true).write(true).open(&link).unwrap();
    let mut seen = String::new();
    for round in 0..6 {
        let word = format!("round{round}");
        writeln!(terminal, "{word}").unwrap();
        let mut buffer = [0; 256];
        // The guest echoes; the terminal itself does not.
        while !seen.contains(&word) {
            let count = terminal.read(&mut buffer).unwrap();
            seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
        kill(&launcher, "device-console", 1, Duration::ZERO);
    }
    for round in 0..6 {
        // Twice if the process died after writing it and before completing the request.
        let count = seen.matches(&format!("round{round}")).count();
        assert!((1..=2).contains(&count), "{seen}");
    }
    writeln!(terminal, "quit").unwrap();
    expect_end(&mut launcher, 0);
    assert!(std::fs::symlink_metadata(link).is_err());
}

#[test]
fn any_device_process_can_be_killed_at_any_time() {
    if skip_kvm() {
        return;
    }
    for (round, name) in DEVICES.into_iter().cycle().take(12).enumerate() {
        // A frame may be lost, and this guest does not retransmit.
        let job = match name {
            "device-net" => "job=idle",
            _ => "job=main need=block,net,console end=idle",
        };
        let mut launcher = launch(job, &[]);
        // From the first vhost-user set-up to the end of the guest's job. A process that dies
        // before keeps the machine from starting, as any error does.
        wait_until("the machine has started", || {
            launcher.ctl(&["status"]).0 == 0
        });
        std::thread::sleep(Duration::from_millis(15 * round as u64));
        let old = launcher.signal(name, Signal::KILL);
        launcher.wait_successor(name, old);
        launcher.wait_file("serial", "idle");
        launcher.do_ctl(&["stop"]);
        expect_end(&mut launcher, 0);
    }
}

#[test]
fn repeated_deaths_delay_the_restart_and_a_restart_command_resets_the_delay() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=idle", &[]);
    launcher.wait_file("serial", "idle");
    // The first restart has no delay, the others have growing delays.
    kill(&launcher, "device-disk", 4, Duration::ZERO);
    let printed = launcher.read("stderr");
    assert!(
        printed.contains("disk0: device-disk died: signal 9; started again as"),
        "{printed}"
    );
    for wait in [100, 200, 400] {
        let text = format!("to be started again in {wait} ms");
        assert!(printed.contains(&text), "{printed}");
    }
    // A restart command has no delay and resets the history.
    launcher.do_ctl(&["restart", "disk0"]);
    kill(&launcher, "device-disk", 1, Duration::ZERO);
    // The launcher reports the restart just after it has started the process.
    wait_until("it is restarted without a delay", || {
        launcher.read("stderr").matches("started again as").count() == 2
    });
    wait_until("the device runs", || {
        launcher.state("disk0") == DeviceState::Running
    });
    launcher.do_ctl(&["stop"]);
    expect_end(&mut launcher, 0);
}

#[test]
fn restart_never_leaves_the_device_lost_and_on_loss_decides() {
    if skip_kvm() {
        return;
    }
    let mut waits = launch("job=idle", &["--restart", "never"]);
    waits.wait_file("serial", "idle");
    waits.signal("device-disk", Signal::KILL);
    wait_until("the device is lost", || {
        waits.state("disk0") == DeviceState::Lost
    });
    assert!(waits.read("stderr").contains("not started again"));
    waits.do_ctl(&["restart", "disk0"]);
    assert_eq!(waits.state("disk0"), DeviceState::Running);
    waits.do_ctl(&["stop"]);
    expect_end(&mut waits, 0);

    let more = ["--restart", "never", "--on-loss", "stop:1"];
    let mut stops = launch("job=idle", &more);
    stops.wait_file("serial", "idle");
    stops.signal("device-net", Signal::KILL);
    expect_end(&mut stops, 5);
}

/// Exit code 0 is not a failure.
#[test]
fn after_a_clean_exit_only_restart_always_restarts() {
    if skip_kvm() {
        return;
    }
    for (policy, comes) in [("on-failure", false), ("always", true)] {
        let mut launcher = launch("job=idle", &["--restart", policy]);
        launcher.wait_file("serial", "idle");
        let old = launcher.signal("device-disk", Signal::TERM);
        if comes {
            launcher.wait_successor("device-disk", old);
        } else {
            launcher.wait_file(
                "stderr",
                "disk0: device-disk died: exit code 0; not started",
            );
        }
        launcher.do_ctl(&["stop"]);
        expect_end(&mut launcher, 0);
    }
}

/// Commands complete in time whichever process is stopped: the runner reports it as lost, the
/// launcher kills it, and its successor serves.
#[test]
fn commands_complete_in_time_with_a_stopped_process() {
    if skip_kvm() {
        return;
    }
    for name in DEVICES {
        let mut launcher = launch("job=main need=block end=idle", &[]);
        launcher.wait_file("serial", "idle");
        let old = launcher.signal(name, Signal::STOP);
        for command in ["pause", "resume", "reset"] {
            let start = Instant::now();
            launcher.do_ctl(&[command]);
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "{name}: {command}"
            );
        }
        if name != "device-platform" {
            launcher.wait_successor(name, old);
        }
        launcher.do_ctl(&["stop"]);
        expect_end(&mut launcher, 0);

        let mut launcher = launch("job=main need=block end=idle", &[]);
        launcher.wait_file("serial", "idle");
        launcher.signal(name, Signal::STOP);
        let start = Instant::now();
        launcher.do_ctl(&["stop"]);
        expect_end(&mut launcher, 0);
        assert!(start.elapsed() < Duration::from_secs(20), "{name}: stop");
    }
}

/// Without the launcher, with a loop around each device program.
#[test]
fn launch_sh_restarts_device_processes() {
    if skip_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/launch.sh");
    let mut command = Command::new("bash");
    command
        .arg(script)
        .args([embedded_guest(), image.as_path()])
        .args(["--memory", "64M", "--cmdline"])
        .arg("job=disk-chaos seconds=3 count=0")
        .args(["--control", "control"])
        .env("OUTRIGGER_BIN", programs())
        .env("TMPDIR", directory.path());
    let mut launcher = Launcher::spawn(directory, command, Stdio::null());
    let runner_started = || launcher.directory().join("control").exists();
    wait_until("the runner has started", runner_started);
    let driving = || launcher.status().devices[0].driver_ok;
    wait_until("the guest uses its disk", driving);
    kill(&launcher, "device-disk", 2, Duration::from_millis(100));
    launcher.signal("device-platform", Signal::KILL);
    wait_until("the device runs", || {
        launcher.status().devices[0].losses == 2
    });
    expect_end(&mut launcher, 0);
}

#[test]
fn killing_the_runner_ends_the_machine() {
    if skip_kvm() {
        return;
    }
    let mut launcher = launch("job=idle", &[]);
    launcher.wait_file("serial", "idle");
    kill_process(launcher.pid_of("vcpu-runner"), Signal::KILL).unwrap();
    expect_end(&mut launcher, 1);
}

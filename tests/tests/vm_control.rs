//! The control socket, the event stream and the exit codes of the runner.

use std::time::Duration;

use outrigger_protocol::control::{DeviceState, MachineEvent, MachineState};
use outrigger_tests::machine::{Machine, skip_kvm};
use outrigger_tests::wait_until;
use rustix::process::Signal;

#[test]
fn status_shows_the_machine_and_its_devices() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=idle").disk(1 << 20).start();
    machine.wait_serial("idle");
    let status = machine.control("status").status.unwrap();
    assert_eq!(status.state, MachineState::Running);
    assert_eq!(
        (status.vcpus, status.memory, status.resets),
        (1, 512 << 20, 0)
    );
    assert_eq!(status.devices.len(), 1);
    assert_eq!(status.devices[0].id, "disk0");
    assert_eq!(status.devices[0].state, DeviceState::Running);
    assert!(!status.devices[0].driver_ok);
}

#[test]
fn a_paused_machine_uses_no_cpu_and_resumes() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=spin").disk(1 << 20).start();
    machine.wait_serial(".");
    for _ in 0..3 {
        assert!(machine.control("pause").ok);
        assert!(machine.control("pause").ok, "pausing twice is no error");
        let status = machine.control("status").status.unwrap();
        assert_eq!(status.state, MachineState::Paused);
        assert_eq!(status.devices[0].state, DeviceState::Paused);
        let before = machine.runner.ticks();
        std::thread::sleep(Duration::from_millis(300));
        assert!(machine.runner.ticks() <= before + 1, "it uses no CPU");
        assert!(machine.control("resume").ok);
        let dots = machine.serial().len();
        wait_until("the guest runs again", || machine.serial().len() > dots);
    }
    assert!(machine.control("stop").ok);
    machine.expect(0);
    let events = machine.events();
    let paused = events
        .iter()
        .filter(|e| **e == MachineEvent::Paused)
        .count();
    let resumed = events
        .iter()
        .filter(|e| **e == MachineEvent::Resumed)
        .count();
    assert_eq!((paused, resumed), (3, 3));
}

#[test]
fn io_continues_after_each_pause() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=disk-irq count=3000 qdepth=4")
        .args(["--memory", "64M"])
        .disk(64 << 20)
        .start();
    machine.wait_event("driver-ok", |e| matches!(e, MachineEvent::DriverOk { .. }));
    let mut pauses = 0;
    while machine.runner.is_running() && pauses < 20 {
        if !machine.try_control("pause") || !machine.try_control("resume") {
            break;
        }
        pauses += 1;
    }
    machine.passes();
    assert!(pauses > 0);
}

#[test]
fn a_reset_command_reboots_a_running_or_paused_machine() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=idle").disk(1 << 20).start();
    machine.wait_serial("idle");
    for round in 2..6 {
        if round % 2 == 0 {
            assert!(machine.control("pause").ok);
        }
        assert!(machine.control("reset").ok);
        wait_until("the guest has booted again", || {
            machine.serial().matches("idle").count() == round
        });
        let status = machine.control("status").status.unwrap();
        assert_eq!(status.state, MachineState::Running);
        assert_eq!(status.devices[0].state, DeviceState::Running);
    }
    assert_eq!(machine.control("status").status.unwrap().resets, 4);
}

#[test]
fn commands_in_quick_succession_lose_no_reset() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=idle").start();
    for command in [
        "pause", "resume", "reset", "pause", "resume", "reset", "reset", "pause", "resume",
    ] {
        assert!(machine.control(command).ok, "{command}");
    }
    let boots = || machine.serial().matches("idle").count();
    wait_until("the guest has booted", || boots() > 0);
    assert!(machine.control("stop").ok);
    machine.expect(0);
}

#[test]
fn a_stale_control_socket_is_replaced() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=idle");
    let path = machine.directory().join("control");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let machine = machine.start();
    machine.wait_serial("idle");
    assert!(machine.control("status").ok);
}

#[test]
fn an_invalid_command_gets_an_error_and_changes_nothing() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=idle").start();
    machine.wait_serial("idle");
    for line in ["", "{}", "pause", "{\"command\":\"explode\"}", "[1,2]"] {
        let reply = machine.control_line(line);
        assert!(!reply.ok && reply.error.is_some(), "{line:?}: {reply:?}");
    }
    assert_eq!(
        machine.control("status").status.unwrap().state,
        MachineState::Running
    );
}

#[test]
fn sigterm_stops_the_machine_with_exit_code_0() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=idle").disk(1 << 20).start();
    machine.wait_serial("idle");
    machine.runner.signal(Signal::TERM);
    machine.expect(0);
    machine.wait_event("stopped", |e| {
        matches!(e, MachineEvent::Stopped { code: 0, .. })
    });
}

#[test]
fn on_loss_stop_ends_the_machine_and_names_the_device() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=idle")
        .args(["--on-loss", "stop"])
        .disk(1 << 20)
        .start();
    machine.wait_serial("idle");
    machine.process("disk0").signal(Signal::KILL);
    machine.expect(5);
    assert!(
        machine.runner.log().contains("disk0"),
        "{}",
        machine.runner.log()
    );
    machine.wait_event(
        "device-lost",
        |e| matches!(e, MachineEvent::DeviceLost { id, .. } if id == "disk0"),
    );
}

#[test]
fn a_stopped_device_process_does_not_block_pause_and_stop() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=disk-irq count=1000000")
        .args(["--memory", "64M", "--on-loss", "stop"])
        .disk(64 << 20)
        .start();
    machine.wait_event("driver-ok", |e| matches!(e, MachineEvent::DriverOk { .. }));
    machine.process("disk0").signal(Signal::STOP);
    // The back end misses its deadline, and its loss ends the machine.
    machine.try_control("pause");
    machine.expect(5);
    assert!(
        machine.runner.log().contains("no complete answer"),
        "{}",
        machine.runner.log()
    );
}

#[test]
fn the_runner_runs_under_seccomp() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=idle").start();
    machine.wait_serial("idle");
    assert_eq!(machine.runner.status("", "Seccomp"), "2");
    assert_eq!(machine.runner.status("", "NoNewPrivs"), "1");
}

#[test]
fn invalid_options_are_usage_errors() {
    if skip_kvm() {
        return;
    }
    for (arguments, word) in [
        (["--cpus", "0"], "0"),
        (["--memory", "1M"], "8 MiB"),
        (["--device", "disk0,type=block"], "socket="),
        (["--platform", "nowhere"], "socket=PATH"),
    ] {
        let machine = Machine::embedded("")
            .without_platform()
            .args(arguments)
            .start();
        machine.expect(2);
        assert!(
            machine.runner.log().contains(word),
            "{}",
            machine.runner.log()
        );
    }
}

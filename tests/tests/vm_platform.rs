//! The trap channel under a running guest.

use std::time::Duration;

use outrigger_protocol::control::MachineEvent;
use outrigger_tests::machine::{Machine, skip_kvm};
use outrigger_tests::wait_until;
use rustix::process::Signal;

#[test]
fn the_serial_output_is_complete_over_kills_of_the_platform() {
    if skip_kvm() {
        return;
    }
    let lines = 400;
    let mut machine = Machine::embedded(&format!("job=serial lines={lines}")).start();
    let mut kills = 0;
    for next in (20..lines).step_by(40) {
        wait_until("the guest has printed so many lines", || {
            !machine.runner.is_running() || machine.serial().contains(&format!("line {next:06}"))
        });
        if !machine.runner.is_running() {
            break;
        }
        machine.replace_platform();
        kills += 1;
    }
    machine.expect(0);
    assert!(kills >= 5, "only {kills} kills");
    let serial = machine.serial();
    let got: Vec<&str> = serial.lines().filter(|l| l.starts_with("line ")).collect();
    let expected: Vec<String> = (1..=lines).map(|n| format!("line {n:06}")).collect();
    assert_eq!(got, expected);
    let lost = machine
        .events()
        .iter()
        .filter(|e| matches!(e, MachineEvent::DeviceLost { id, .. } if id == "platform"))
        .count();
    assert_eq!(lost, kills);
}

#[test]
fn a_trap_waits_for_a_stopped_platform_and_can_be_paused() {
    if skip_kvm() {
        return;
    }
    let mut machine = Machine::embedded("job=serial lines=100000").start();
    machine.wait_serial("line 000010");
    machine.process("platform").signal(Signal::STOP);
    std::thread::sleep(Duration::from_millis(50));
    assert!(machine.control("pause").ok, "in the middle of a trap");
    assert!(machine.control("resume").ok);
    let seen = machine.serial().len();
    machine.replace_platform();
    wait_until("the guest prints again", || {
        machine.serial().len() > seen + 100
    });
    assert!(machine.control("stop").ok);
    machine.expect(0);
}

#[test]
fn an_idle_machine_uses_no_cpu() {
    if skip_kvm() {
        return;
    }
    let machine = Machine::embedded("job=idle").disk(1 << 20).start();
    machine.wait_serial("idle");
    std::thread::sleep(Duration::from_millis(100));
    let ticks = || {
        machine.runner.ticks()
            + machine.process("disk0").ticks()
            + machine.process("platform").ticks()
    };
    let before = ticks();
    std::thread::sleep(Duration::from_secs(1));
    assert!(
        ticks() <= before + 1,
        "{} ticks in a second",
        ticks() - before
    );
}

#[test]
fn the_serial_interrupt_arrives() {
    if skip_kvm() {
        return;
    }
    // Receiving needs input: see the console tests of the platform. This checks that the
    // interrupt line reaches the guest's I/O APIC.
    let machine = Machine::embedded("job=serial-irq").start();
    machine.wait_serial("serial-irq: ready");
    assert!(machine.control("stop").ok);
    machine.expect(0);
}

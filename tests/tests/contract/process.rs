//! The process itself: sandbox, signals, exit codes.

use std::os::unix::process::CommandExt;
use std::thread::sleep;
use std::time::Duration;

use outrigger_tests::guest::{EVENT_IDX, Guest};
use outrigger_tests::wait_until;
use rustix::process::Signal;

use crate::subject::{Device, Subject};

pub fn is_sandboxed<S: Subject>() {
    let device = Device::<S>::listening();
    let process = &device.process;
    let threads = std::fs::read_dir(process.proc("task")).unwrap();
    let mut count = 0;
    for thread in threads {
        let thread = format!("task/{}/", thread.unwrap().file_name().display());
        for (field, value) in [
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"), // a filter
            ("CapPrm", "0000000000000000"),
            ("CapEff", "0000000000000000"),
            ("CapBnd", "0000000000000000"),
        ] {
            assert_eq!(process.status(&thread, field), value, "{thread}: {field}");
        }
        assert_ne!(process.status(&thread, "Uid").split('\t').next(), Some("0"));
        count += 1;
    }
    assert!(count >= 2, "the main thread and a worker at least");
}

pub fn ends_at_once_on_sigterm<S: Subject>() {
    let device = Device::<S>::listening();
    device.process.signal(Signal::TERM);
    assert_eq!(
        device.process.wait().code(),
        Some(0),
        "{:?}",
        device.process.wait()
    );
}

pub fn ends_on_sigterm_under_load<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    device.round_trip(&mut guest);
    let request = S::request(&guest.ram);
    let queue = &mut guest.queues[S::REQUESTS];
    while queue.room() >= request.len() {
        queue.add(&request);
    }
    queue.kick();
    device.process.signal(Signal::TERM);
    assert_eq!(
        device.process.wait().code(),
        Some(0),
        "{:?}",
        device.process.wait()
    );
    // No request is half done: the used index counts completed requests only.
    while queue.take().is_some() {}
    assert_eq!(queue.used_index, queue.device_used_index());
}

pub fn leaves_sigint_to_a_launcher_that_ignores_it<S: Subject>() {
    let (mut launch, subject) = S::prepare();
    let ignore = || {
        // SAFETY: SIG_IGN is not a handler.
        unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
        Ok(())
    };
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { launch.command().pre_exec(ignore) };
    let process = launch.listening();
    let mut device = Device { process, subject };
    device.process.signal(Signal::INT);
    device.must_serve();

    let device = Device::<S>::listening();
    device.process.signal(Signal::INT);
    assert_eq!(
        device.process.wait().code(),
        Some(0),
        "{:?}",
        device.process.wait()
    );
}

pub fn ends_with_the_front_end_of_a_connected_socket<S: Subject>() {
    let (launch, subject) = S::prepare();
    let (process, stream) = launch.connected();
    let mut device = Device { process, subject };
    let mut guest = Guest::boot(stream, EVENT_IDX, S::QUEUES);
    device.round_trip(&mut guest);
    drop(guest);
    assert_eq!(
        device.process.wait().code(),
        Some(0),
        "{:?}",
        device.process.wait()
    );
}

pub fn sleeps_when_there_is_nothing_to_do<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX | S::FEATURES);
    device.round_trip(&mut guest);
    // Waits for a second in which the process uses no CPU tick.
    wait_until("it sleeps", || {
        let before = device.process.ticks();
        sleep(Duration::from_secs(1));
        device.process.ticks() == before
    });
    device.round_trip(&mut guest);
}

pub fn prints_its_capabilities<S: Subject>() {
    let output = std::process::Command::new(outrigger_tests::binaries::binary(S::NAME))
        .arg("--print-capabilities")
        .output()
        .unwrap();
    assert!(output.status.success());
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["type"], S::TYPE);
    assert!(value["features"].is_array());
}

pub fn refuses_contradictory_options<S: Subject>() {
    let (launch, _subject) = S::prepare();
    let process = launch.args(["--socket-path", "/x", "--fd", "3"]).spawn();
    assert_eq!(process.wait().code(), Some(2), "{}", process.log());

    // Without a socket, and with a path that has none: one line each.
    let cases = [
        (2, &[][..]),
        (1, &["--fd", "1000"]),
        (1, &["--socket-path", "/proc/x"]),
    ];
    for (code, args) in cases {
        let (launch, _subject) = S::prepare();
        let process = launch.args(args).spawn();
        assert_eq!(process.wait().code(), Some(code), "{args:?}");
        let log = process.log();
        assert!(log.starts_with(S::NAME), "{log}");
        assert_eq!(log.lines().count(), 1, "{log}");
    }
}

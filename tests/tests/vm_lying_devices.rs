//! Device processes that violate the protocol, stay silent or leave: the runner ends with
//! one line that names the device and the message. It never hangs or panics.

use std::sync::mpsc::channel;
use std::time::Duration;

use outrigger_tests::machine::{Machine, Running, skip_kvm};
use outrigger_tests::scripted::{self, Answer, answer, header, request::*};

/// A runner whose device `x` is served by `script`; `keys` are appended to its option.
fn start(keys: &str, script: impl Fn(u32) -> Answer + Send + 'static) -> Running {
    let machine = Machine::embedded("job=disk-io").without_platform();
    let socket = machine.directory().join("liar");
    scripted::serve(&socket, script);
    let device = format!("x,type=block,socket={}{keys}", socket.display());
    machine
        .args(["--on-loss", "stop", "--device", &device])
        .start()
}

/// The runner ends with `code` and one line that contains all of `words`.
fn expect(machine: &Running, code: i32, words: &[&str]) {
    machine.expect(code);
    let log = machine.runner.log();
    let errors: Vec<&str> = log
        .lines()
        .filter(|l| l.starts_with("vcpu-runner: "))
        .collect();
    assert_eq!(errors.len(), 1, "{log}");
    eprintln!("  {}", errors[0]);
    for word in words {
        assert!(errors[0].contains(word), "{word:?} is not in {log}");
    }
    assert!(!log.contains("panicked"), "{log}");
}

/// Like [`start`], but the reply to `message` is `lie`.
fn lie_at(message: u32, lie: impl Fn() -> Answer + Send + 'static) -> Running {
    start("", move |request| {
        if request == message {
            lie()
        } else {
            Answer::Proper
        }
    })
}

#[test]
fn protocol_violations_in_the_handshake_are_named() {
    if skip_kvm() {
        return;
    }
    type Lie = fn() -> Answer;
    let cases: &[(&str, u32, &str, Lie)] = &[
        ("nonsense", GET_FEATURES, "GET_FEATURES", || {
            Answer::Bytes(vec![0xa5; 64], 0)
        }),
        ("another protocol", GET_FEATURES, "GET_FEATURES", || {
            Answer::Bytes(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), 0)
        }),
        ("gone at once", GET_FEATURES, "GET_FEATURES", || {
            Answer::Close
        }),
        ("4 bytes", GET_FEATURES, "GET_FEATURES", || {
            Answer::Payload(vec![0; 4])
        }),
        ("4 GiB", GET_FEATURES, "GET_FEATURES", || {
            Answer::Bytes(header(GET_FEATURES, 5, u32::MAX), 0)
        }),
        ("another answer", GET_FEATURES, "GET_FEATURES", || {
            Answer::Bytes(answer(GET_QUEUE_NUM, &[1; 8]), 0)
        }),
        (
            "a request instead of a reply",
            GET_FEATURES,
            "GET_FEATURES",
            || Answer::Bytes([header(GET_FEATURES, 1, 8), vec![0; 8]].concat(), 0),
        ),
        ("virtio 0.9", GET_FEATURES, "VIRTIO_F_VERSION_1", || {
            Answer::Payload((1u64 << 30).to_ne_bytes().into())
        }),
        ("a descriptor", GET_FEATURES, "GET_FEATURES", || {
            Answer::Bytes(answer(GET_FEATURES, &[0; 8]), 1)
        }),
        ("too many descriptors", GET_FEATURES, "GET_FEATURES", || {
            Answer::Bytes(answer(GET_FEATURES, &[0; 8]), 200)
        }),
        (
            "7 bytes",
            GET_PROTOCOL_FEATURES,
            "GET_PROTOCOL_FEATURES",
            || Answer::Payload(vec![0xff; 7]),
        ),
        ("no queues", GET_QUEUE_NUM, "GET_QUEUE_NUM", || {
            Answer::Payload(vec![0; 8])
        }),
        ("too many queues", GET_QUEUE_NUM, "GET_QUEUE_NUM", || {
            Answer::Payload(vec![0xff; 8])
        }),
        ("no configuration", GET_CONFIG, "GET_CONFIG", || {
            Answer::Payload(vec![])
        }),
        ("an absurd configuration", GET_CONFIG, "GET_CONFIG", || {
            Answer::Bytes(header(GET_CONFIG, 5, u32::MAX), 0)
        }),
        ("half a configuration", GET_CONFIG, "GET_CONFIG", || {
            Answer::Payload(vec![0; 30])
        }),
        ("gone", GET_CONFIG, "GET_CONFIG", || Answer::Close),
    ];
    for (what, message, word, lie) in cases {
        eprintln!("{what}");
        expect(&lie_at(*message, lie), 1, &["device x", word]);
    }
    expect(
        &start(",queues=4", |_| Answer::Proper),
        1,
        &["device x", "queues=4", "more than the 1"],
    );
}

#[test]
fn silence_in_the_handshake_has_a_deadline() {
    if skip_kvm() {
        return;
    }
    // At the same time: each of them waits for the whole deadline.
    let cases = [
        (GET_FEATURES, "GET_FEATURES"),
        (GET_CONFIG, "GET_CONFIG"),
        (SET_BACKEND_REQ_FD, "SET_BACKEND_REQ_FD"),
    ];
    let machines = cases.map(|(message, _)| lie_at(message, || Answer::Silence));
    let half = lie_at(GET_FEATURES, || {
        Answer::Bytes(header(GET_FEATURES, 5, 8)[..6].to_vec(), 0)
    });
    for (machine, (_, name)) in machines.iter().zip(cases) {
        expect(machine, 1, &["device x", name, "no complete answer"]);
    }
    expect(
        &half,
        1,
        &["device x", "GET_FEATURES", "no complete answer"],
    );
}

#[test]
fn protocol_violations_after_the_handshake_end_the_machine() {
    if skip_kvm() {
        return;
    }
    type Lie = fn() -> Answer;
    let cases: &[(&str, u32, &[&str], Lie)] = &[
        ("gone", SET_MEM_TABLE, &["SET_MEM_TABLE"], || Answer::Close),
        (
            "silent",
            SET_VRING_ENABLE,
            &["queue 0", "SET_VRING_ENABLE", "no complete answer"],
            || Answer::Silence,
        ),
        (
            "nonsense",
            SET_VRING_NUM,
            &["queue 0", "SET_VRING_NUM"],
            || Answer::Bytes(vec![0xff; 40], 3),
        ),
        (
            "data without a request",
            SET_VRING_ENABLE,
            &["without a request"],
            || Answer::Bytes([answer(SET_VRING_ENABLE, &[0; 8]), vec![1; 20]].concat(), 0),
        ),
        (
            "nonsense on the channel",
            SET_VRING_ENABLE,
            &["back-end channel"],
            || Answer::Channel(vec![0xff; 40]),
        ),
        (
            "an endless message on the channel",
            SET_VRING_ENABLE,
            &["back-end channel"],
            || Answer::Channel(header(2, 1, u32::MAX)),
        ),
    ];
    let machines: Vec<_> = cases
        .iter()
        .map(|(_, message, _, lie)| lie_at(*message, lie))
        .collect();
    for (machine, (what, _, words, _)) in machines.iter().zip(cases) {
        eprintln!("{what}");
        expect(machine, 5, &[&["device x is lost"], *words].concat());
    }
}

/// Some back ends poll a doorbell as soon as they have it, and drop the events of a vring
/// that is not enabled yet.
#[test]
fn a_vring_is_enabled_before_it_gets_its_doorbell() {
    if skip_kvm() {
        return;
    }
    let (sender, messages) = channel();
    // MQ and CONFIG, but no REPLY_ACK: the runner does not wait for the back end.
    let protocol = (1u64 | 1 << 9).to_ne_bytes();
    let machine = start("", move |request| {
        if matches!(request, SET_VRING_ENABLE | SET_VRING_KICK) {
            sender.send(request).unwrap();
        }
        match request {
            GET_PROTOCOL_FEATURES => Answer::Payload(protocol.to_vec()),
            _ => Answer::Proper,
        }
    });
    for expected in [SET_VRING_ENABLE, SET_VRING_KICK] {
        let message = messages.recv_timeout(Duration::from_secs(60));
        assert_eq!(message, Ok(expected), "{}", machine.runner.log());
    }
}

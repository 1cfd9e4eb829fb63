//! Device processes that lie, stay silent or leave: the runner ends with one line
//! that names the device and the message, and never hangs or panics.

use std::sync::mpsc::channel;
use std::time::Duration;

use outrigger_tests::machine::{Machine, Running, skip_kvm};
use outrigger_tests::scripted::{self, Answer, answer, header, request::*};

/// A runner with the device `x` served by `script`, and further keys for it.
fn start(keys: &str, script: impl Fn(u32) -> Answer + Send + 'static) -> Running {
    let machine = Machine::embedded("job=disk-io").without_platform();
    let socket = machine.directory().join("liar");
    scripted::serve(&socket, script);
    let device = format!("x,type=block,socket={}{keys}", socket.display());
    machine
        .args(["--on-loss", "stop", "--device", &device])
        .start()
}

/// The runner ends with `code` and one line, which has all of `words`.
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

/// Like [`start`], with one message answered by `lie`.
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
fn lies_in_the_handshake_are_named() {
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
            "no answer but a question",
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
        (
            "absurdly many queues",
            GET_QUEUE_NUM,
            "GET_QUEUE_NUM",
            || Answer::Payload(vec![0xff; 8]),
        ),
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
    // Side by side: each of them waits for the whole deadline.
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
fn lies_after_the_handshake_end_the_machine() {
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
        ("unasked", SET_VRING_ENABLE, &["without a request"], || {
            Answer::Bytes([answer(SET_VRING_ENABLE, &[0; 8]), vec![1; 20]].concat(), 0)
        }),
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

/// Some processes listen to a doorbell as soon as they have it, and forget what they hear
/// of a ring that is not enabled yet.
#[test]
fn a_ring_is_enabled_before_its_doorbell_can_be_heard() {
    if skip_kvm() {
        return;
    }
    let (teller, told) = channel();
    // MQ and CONFIG, but no REPLY_ACK: nobody waits for anybody.
    let protocol = (1u64 | 1 << 9).to_ne_bytes();
    let machine = start("", move |request| {
        if matches!(request, SET_VRING_ENABLE | SET_VRING_KICK) {
            teller.send(request).unwrap();
        }
        match request {
            GET_PROTOCOL_FEATURES => Answer::Payload(protocol.to_vec()),
            _ => Answer::Proper,
        }
    });
    for expected in [SET_VRING_ENABLE, SET_VRING_KICK] {
        let message = told.recv_timeout(Duration::from_secs(60));
        assert_eq!(message, Ok(expected), "{}", machine.runner.log());
    }
}

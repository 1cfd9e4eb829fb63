//! The server against real clients on real sockets.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc;

use serde::Deserialize;

use super::*;
use crate::{ControlClient, STALL_LIMIT};

const TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
enum TestCommand {
    Ping {},
    /// Answered when the test says so.
    Wait {},
    Watch {},
    /// Dropped without an answer.
    Drop {},
}

#[derive(Debug, Deserialize)]
struct TestReply {
    ok: bool,
    code: Option<ErrorCode>,
}

struct TestServer {
    dir: tempfile::TempDir,
    server: ControlServer,
    waiting: mpsc::Receiver<Responder>,
}

fn ok() -> serde_json::Value {
    serde_json::json!({"ok": true})
}

impl TestServer {
    fn start(reply_limit: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let (sender, waiting) = mpsc::channel();
        let server = start(
            listener,
            Some(reply_limit),
            move |command, responder| match command {
                TestCommand::Ping {} => responder.reply(&ok()),
                TestCommand::Watch {} => responder.reply_and_watch(&ok()),
                TestCommand::Wait {} => drop(sender.send(responder)),
                TestCommand::Drop {} => drop(responder),
            },
        );
        TestServer {
            dir,
            server: server.unwrap(),
            waiting,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn client(&self) -> ControlClient {
        ControlClient::connect(&self.path(), None).unwrap()
    }

    fn stream(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream
    }
}

fn request(client: &mut ControlClient, command: &TestCommand) -> TestReply {
    client.request(command, TIMEOUT).unwrap()
}

#[test]
fn commands_are_answered_in_order_and_a_slow_one_holds_up_only_its_client() {
    let server = TestServer::start(TIMEOUT);
    let mut slow = server.stream();
    slow.write_all(b"{\"command\":\"wait\"}\n{\"command\":\"drop\"}\n")
        .unwrap();
    let responder = server.waiting.recv_timeout(TIMEOUT).unwrap();
    assert!(request(&mut server.client(), &TestCommand::Ping {}).ok);
    responder.reply(&ok());
    let mut slow = ControlClient::new(slow).unwrap();
    let replies: Vec<String> = (0..2)
        .map(|_| slow.next_line(Some(Instant::now() + TIMEOUT)).unwrap())
        .map(|line| String::from_utf8(line.unwrap()).unwrap())
        .collect();
    assert_eq!(replies[0], r#"{"ok":true}"#);
    assert!(replies[1].contains(r#""code":"failed""#), "{replies:?}");
}

#[test]
fn a_line_that_is_no_command_is_refused_and_the_client_stays() {
    let server = TestServer::start(TIMEOUT);
    let mut stream = server.stream();
    stream.write_all(b"no json\n").unwrap();
    let mut client = ControlClient::new(stream).unwrap();
    let line = client.next_line(Some(Instant::now() + TIMEOUT)).unwrap();
    let reply: TestReply = serde_json::from_slice(&line.unwrap()).unwrap();
    assert!(!reply.ok);
    assert_eq!(reply.code, Some(ErrorCode::InvalidCommand));
    assert!(request(&mut client, &TestCommand::Ping {}).ok);
}

#[test]
fn a_line_that_is_too_long_ends_the_connection_with_an_error() {
    let server = TestServer::start(TIMEOUT);
    let mut stream = server.stream();
    // Exactly as much as the server reads, so that no unread byte resets the connection.
    stream.write_all(&[b'x'; MAX_LINE]).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(r#""code":"line-too-long""#), "{answer}");
}

#[test]
fn a_command_without_an_answer_ends_in_an_error() {
    let server = TestServer::start(Duration::from_millis(50));
    let mut client = server.client();
    let reply = request(&mut client, &TestCommand::Wait {});
    assert_eq!(reply.code, Some(ErrorCode::Timeout));
    // The late reply reaches no later command, not even one that waits.
    let late = server.waiting.recv_timeout(TIMEOUT).unwrap();
    let waiting = std::thread::spawn(move || request(&mut client, &TestCommand::Wait {}).code);
    let _second = server.waiting.recv_timeout(TIMEOUT).unwrap();
    late.reply(&ok());
    assert_eq!(waiting.join().unwrap(), Some(ErrorCode::Timeout));
}

#[test]
fn a_client_that_watches_gets_events_until_they_end() {
    let server = TestServer::start(TIMEOUT);
    let mut client = server.client();
    assert!(request(&mut client, &TestCommand::Watch {}).ok);
    server.server.broadcast(&serde_json::json!({"event": "a"}));
    server.server.broadcast(&serde_json::json!({"event": "b"}));
    server.server.end_events();
    let mut lines = Vec::new();
    while let Some(line) = client.next_line(Some(Instant::now() + TIMEOUT)).unwrap() {
        lines.push(String::from_utf8(line).unwrap());
    }
    assert_eq!(lines, [r#"{"event":"a"}"#, r#"{"event":"b"}"#]);
    // One that comes later gets its reply and the end.
    let mut late = server.client();
    assert!(request(&mut late, &TestCommand::Watch {}).ok);
    let end = late.next_line(Some(Instant::now() + TIMEOUT)).unwrap();
    assert_eq!(end, None);
}

#[test]
fn one_client_too_many_replaces_the_one_that_has_been_idle_longest() {
    let server = TestServer::start(TIMEOUT);
    let mut watcher = server.client();
    assert!(request(&mut watcher, &TestCommand::Watch {}).ok);
    let mut clients: Vec<ControlClient> = Vec::new();
    for _ in 1..MAX_CLIENTS {
        clients.push(server.client());
        assert!(request(clients.last_mut().unwrap(), &TestCommand::Ping {}).ok);
    }
    assert!(request(&mut server.client(), &TestCommand::Ping {}).ok);
    let end = clients[0].next_line(Some(Instant::now() + TIMEOUT));
    assert!(!matches!(end, Ok(Some(_))));
    server.server.broadcast(&serde_json::json!({"event": "a"}));
    let event = watcher.next_line(Some(Instant::now() + TIMEOUT)).unwrap();
    assert!(event.is_some());
}

#[test]
fn one_client_too_many_is_turned_away_when_all_others_wait() {
    let server = TestServer::start(TIMEOUT);
    let waiting: Vec<(UnixStream, Responder)> = (0..MAX_CLIENTS)
        .map(|_| {
            let mut stream = server.stream();
            stream.write_all(b"{\"command\":\"wait\"}\n").unwrap();
            (stream, server.waiting.recv_timeout(TIMEOUT).unwrap())
        })
        .collect();
    let mut answer = String::new();
    server.stream().read_to_string(&mut answer).unwrap();
    assert!(answer.contains(r#""code":"too-many-clients""#), "{answer}");
    drop(waiting);
}

#[test]
fn a_client_that_does_not_read_is_disconnected_and_no_other_notices() {
    let server = TestServer::start(TIMEOUT);
    let mut stalled = server.client();
    assert!(request(&mut stalled, &TestCommand::Watch {}).ok);
    let event = serde_json::json!({"event": "x".repeat(4000)});
    let mut client = server.client();
    let start = Instant::now();
    // More than its socket holds; then nothing more until the limit.
    for _ in 0..128 {
        server.server.broadcast(&event);
        assert!(request(&mut client, &TestCommand::Ping {}).ok);
    }
    while start.elapsed() < STALL_LIMIT + Duration::from_secs(1) {
        assert!(request(&mut client, &TestCommand::Ping {}).ok);
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut events = 0;
    // The end of the stream, or a reset.
    while let Ok(Some(_)) = stalled.next_line(Some(Instant::now() + TIMEOUT)) {
        events += 1;
    }
    assert!(events < 128, "it was disconnected before it got all events");
}

#[test]
fn finish_waits_for_answers_and_has_a_limit() {
    let server = TestServer::start(TIMEOUT);
    let mut stream = server.stream();
    stream.write_all(b"{\"command\":\"wait\"}\n").unwrap();
    let responder = server.waiting.recv_timeout(TIMEOUT).unwrap();
    let start = Instant::now();
    server.server.finish(Duration::from_millis(50));
    assert!(start.elapsed() >= Duration::from_millis(50));
    let answering = std::thread::spawn(move || responder.reply(&ok()));
    server.server.finish(TIMEOUT);
    answering.join().unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut answer = [0; 64];
    assert!(stream.read(&mut answer).unwrap() > 0, "it was sent");
}

#[test]
fn a_client_that_leaves_before_its_answer_is_dropped_at_once() {
    let server = TestServer::start(TIMEOUT);
    let mut responders = Vec::new();
    // Each takes a place until the server notices that it has left.
    for _ in 0..3 * MAX_CLIENTS {
        let mut stream = server.stream();
        stream.write_all(b"{\"command\":\"wait\"}\n").unwrap();
        responders.push(server.waiting.recv_timeout(TIMEOUT).unwrap());
        drop(stream);
        assert!(request(&mut server.client(), &TestCommand::Ping {}).ok);
    }
    // One that only stops sending still gets its answer.
    let mut stream = server.stream();
    stream.write_all(b"{\"command\":\"wait\"}\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let responder = server.waiting.recv_timeout(TIMEOUT).unwrap();
    responder.reply(&ok());
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "{\"ok\":true}\n");
}

#[test]
fn finish_does_not_wait_for_a_client_that_does_not_read() {
    let server = TestServer::start(TIMEOUT);
    let mut stalled = server.client();
    assert!(request(&mut stalled, &TestCommand::Watch {}).ok);
    let event = serde_json::json!({"event": "x".repeat(4000)});
    for _ in 0..128 {
        server.server.broadcast(&event);
    }
    let start = Instant::now();
    server.server.finish(TIMEOUT);
    assert!(start.elapsed() < STALL_LIMIT, "it waited for the client");
}

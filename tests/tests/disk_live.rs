//! The control socket of device-disk, while it serves a guest.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use outrigger_control_socket::MAX_LINE;
use outrigger_protocol::device::{DeviceReply, QueueStats};
use outrigger_tests::binaries::binary;
use outrigger_tests::disk::{Request, SECTOR, pattern_of};
use outrigger_tests::driver::Driver;
use outrigger_tests::guest::{EVENT_IDX, Guest};
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::queue::Buffer;
use outrigger_tests::{DEADLINE, wait_until};
use virtio_bindings::virtio_blk::*;

const SIZE: usize = 1 << 20;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

/// A client of the control socket.
struct Client(BufReader<UnixStream>);

impl Client {
    fn new(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Client(BufReader::new(stream))
    }

    fn ask(&mut self, line: &str) -> DeviceReply {
        writeln!(self.0.get_mut(), "{line}").unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{line}: {answer:?}: {e}"))
    }

    fn stats(&mut self) -> Vec<QueueStats> {
        let reply = self.ask(r#"{"command":"stats"}"#);
        assert!(reply.ok, "{reply:?}");
        reply.stats.unwrap().queues
    }

    fn resize(&mut self, size: u64) -> DeviceReply {
        self.ask(&format!(r#"{{"command":"resize","size":{size}}}"#))
    }

    /// The error of a command that fails.
    fn refused(&mut self, line: &str) -> String {
        let reply = self.ask(line);
        assert!(!reply.ok && reply.capacity.is_none(), "{line}: {reply:?}");
        reply.error.unwrap()
    }
}

fn start(options: &[&str]) -> (Process, Client) {
    let launch = Launch::new("device-disk");
    let directory = launch.directory().to_owned();
    let image = directory.join("image");
    std::fs::write(&image, pattern_of(0, SIZE)).unwrap();
    let control = directory.join("control");
    let process = launch
        .args([
            Path::new("--blk-file"),
            &image,
            Path::new("--control"),
            &control,
        ])
        .args(options)
        .listening();
    (process, Client::new(&control))
}

fn send(guest: &mut Guest, kind: u32, sector: u64, data: &[Buffer]) -> u32 {
    let request = Request::new(&guest.ram, kind, sector, data);
    request.run(&guest.ram, &mut guest.queues[0])
}

#[test]
fn statistics_match_the_requests() {
    let (process, mut client) = start(&[]);
    assert_eq!(client.stats()[0].latency.samples, 0);
    let mut guest = Guest::boot(process.connect(), FLUSH | EVENT_IDX, 1);
    let at = guest.ram.put(&vec![0; 8192]);
    let (into, from) = (Buffer::writable(at, 8192), Buffer::readable(at, 512));
    for _ in 0..3 {
        assert_eq!(
            send(&mut guest, VIRTIO_BLK_T_IN, 0, &[into]),
            VIRTIO_BLK_S_OK
        );
    }
    for _ in 0..2 {
        assert_eq!(
            send(&mut guest, VIRTIO_BLK_T_OUT, 9, &[from]),
            VIRTIO_BLK_S_OK
        );
    }
    assert_eq!(
        send(&mut guest, VIRTIO_BLK_T_FLUSH, 0, &[]),
        VIRTIO_BLK_S_OK
    );
    let beyond = (SIZE / SECTOR) as u64;
    assert_eq!(
        send(&mut guest, VIRTIO_BLK_T_IN, beyond, &[into]),
        VIRTIO_BLK_S_IOERR
    );
    assert_eq!(send(&mut guest, 77, 0, &[]), VIRTIO_BLK_S_UNSUPP);
    let queue = client.stats().remove(0);
    let requests = &queue.requests;
    assert_eq!((requests.write.count, requests.write.bytes), (2, 1024));
    assert_eq!((requests.flush.count, requests.flush.errors), (1, 0));
    let kinds = requests.by_type();
    let count: u64 = kinds.iter().map(|(_, it)| it.count).sum();
    let errors: u64 = kinds.iter().map(|(_, it)| it.errors).sum();
    let bytes: u64 = kinds.iter().map(|(_, it)| it.bytes).sum();
    assert_eq!((count, errors, bytes), (8, 2, 3 * 8192 + 1024));
    let latency = &queue.latency;
    assert_eq!(latency.samples, 8);
    assert!(latency.p50_us > 0.0 && latency.p50_us <= latency.p99_us);
    assert!(latency.p99_us <= latency.p999_us && latency.p999_us <= latency.max_us);
    assert_eq!((queue.in_flight, queue.in_flight_max), (0, 1));
    assert!(queue.cpu_us.is_some());
}

#[test]
fn each_queue_counts_its_requests_and_those_in_flight() {
    let (process, mut client) = start(&["--queues", "2"]);
    let socket = process.directory().join("socket");
    let mut driver = Driver::connect(&socket, 2, 32, 4096);
    for (queue, rounds) in [(0, 10), (1, 20)] {
        let queue = &mut driver.queues[queue];
        for _ in 0..rounds {
            for buffer in 0..32 {
                queue.read(buffer, buffer as u64 * 4096);
            }
            queue.kick();
            let mut done = 0;
            while done < 32 {
                done += queue.wait().len();
            }
        }
    }
    let queues = client.stats();
    assert_eq!(queues.len(), 2);
    let counts: Vec<_> = queues.iter().map(|it| it.requests.read.count).collect();
    assert_eq!(counts, [320, 640]);
    for queue in queues {
        assert_eq!(queue.in_flight, 0);
        assert!((1..=32).contains(&queue.in_flight_max));
    }
}

#[test]
fn a_disk_grows_while_it_is_written_to() {
    let (process, mut client) = start(&[]);
    let (socket, image) = (
        process.directory().join("socket"),
        process.directory().join("image"),
    );
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut driver = Driver::connect(&socket, 1, 8, 4096);
            let queue = &mut driver.queues[0];
            for buffer in 0..8 {
                queue.fill(buffer, &[buffer as u8; 4096]);
            }
            let mut rounds = 0u64;
            while !stop.load(Ordering::Relaxed) {
                for buffer in 0..8 {
                    queue.write(buffer, buffer as u64 * 4096);
                }
                queue.kick();
                let mut done = 0;
                while done < 8 {
                    for (_, result) in queue.wait() {
                        assert_eq!(result, 0);
                        done += 1;
                    }
                }
                rounds += 1;
            }
            // The driver reads the new size and uses the new part.
            let capacity = driver.capacity();
            let queue = &mut driver.queues[0];
            queue.write(3, capacity - 4096);
            assert_eq!(queue.run(), 0);
            (rounds, capacity)
        });
        for size in [2, 3, 5].map(|mib| mib << 20) {
            let reply = client.resize(size);
            assert_eq!((reply.ok, reply.capacity), (true, Some(size)), "{reply:?}");
        }
        let before = client.stats()[0].requests.write.count;
        wait_until("it is written to", || {
            client.stats()[0].requests.write.count > before
        });
        stop.store(true, Ordering::Relaxed);
        let (rounds, capacity) = load.join().unwrap();
        assert_eq!(capacity, 5 << 20);
        assert_eq!(client.stats()[0].requests.write.count, rounds * 8 + 1);
    });
    let bytes = std::fs::read(&image).unwrap();
    assert_eq!(bytes.len(), 5 << 20);
    assert!(
        bytes[SIZE..bytes.len() - 4096]
            .iter()
            .all(|&byte| byte == 0)
    );
    assert!(bytes[bytes.len() - 4096..].iter().all(|&byte| byte == 3));
    // The size that the guest sees never shrinks.
    let why = client.refused(r#"{"command":"resize","size":1048576}"#);
    assert!(!why.is_empty());
    for size in [0, 512, (6 << 20) + 1, u64::MAX, u64::MAX - 511] {
        client.refused(&format!(r#"{{"command":"resize","size":{size}}}"#));
    }
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 5 << 20);
    // Another process makes the file longer.
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    file.set_len(8 << 20).unwrap();
    assert_eq!(
        client.ask(r#"{"command":"resize"}"#).capacity,
        Some(8 << 20)
    );
    assert!(client.ask(r#"{"command":"flush"}"#).ok);
}

fn qemu_img(arguments: &[&str], image: &Path) -> String {
    let mut command = Command::new("qemu-img");
    let output = command.args(arguments).arg(image).output();
    let output = output.expect("./test.sh installs qemu-utils");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// qemu-img checks the image afterwards.
#[test]
fn a_qcow2_image_grows_and_stays_valid() {
    let launch = Launch::new("device-disk");
    let directory = launch.directory().to_owned();
    let (image, control) = (directory.join("image"), directory.join("control"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "size=1M"], &image);
    let process = launch
        .args(["--format", "qcow2"])
        .args([
            Path::new("--blk-file"),
            &image,
            Path::new("--control"),
            &control,
        ])
        .listening();
    let mut client = Client::new(&control);
    let mut guest = Guest::boot(process.connect(), FLUSH | EVENT_IDX, 1);
    let data = guest.ram.put(&pattern_of(0, 4096));
    let back = guest.ram.put(&[0; 4096]);
    let (from, into) = (Buffer::readable(data, 4096), Buffer::writable(back, 4096));
    assert_eq!(
        send(&mut guest, VIRTIO_BLK_T_OUT, 0, &[from]),
        VIRTIO_BLK_S_OK
    );
    assert_eq!(client.resize(3 << 20).capacity, Some(3 << 20));
    client.refused(r#"{"command":"resize","size":1048576}"#);
    assert_eq!(guest.config(0, 8), (3u64 << 11).to_le_bytes());
    let last = (3 << 11) - 8;
    assert_eq!(
        send(&mut guest, VIRTIO_BLK_T_OUT, last, &[from]),
        VIRTIO_BLK_S_OK
    );
    assert!(client.ask(r#"{"command":"flush"}"#).ok);
    for sector in [0, last] {
        assert_eq!(
            send(&mut guest, VIRTIO_BLK_T_IN, sector, &[into]),
            VIRTIO_BLK_S_OK
        );
        assert!(guest.ram.get(back, 4096) == pattern_of(0, 4096));
    }
    process.signal(rustix::process::Signal::TERM);
    assert_eq!(process.wait().code(), Some(0), "{}", process.log());
    qemu_img(&["check", "-q"], &image);
    let info = qemu_img(&["info", "--output=json"], &image);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], 3 << 20, "{info}");
}

#[test]
fn invalid_commands_are_answered_and_delay_no_client() {
    let (process, mut client) = start(&["--read-only"]);
    let control = process.directory().join("control");
    let mut silent: Vec<_> = (0..20).map(|_| Client::new(&control)).collect();
    let mut long = Client::new(&control);
    let _ = long.0.get_mut().write_all(&vec![b'{'; 4 * MAX_LINE]);
    // Its connection may have been closed to make room for another client.
    let mut client_again = Client::new(&control);
    for line in [
        "",
        "{",
        "null",
        r#"{"command":"status"}"#,
        r#"{"command":"resize","size":"1G"}"#,
        r#"{"command":"resize","size":-512}"#,
        r#"{"command":"resize","size":2097152}"#,
    ] {
        client_again.refused(line);
    }
    assert_eq!(client_again.stats().len(), 1);
    silent.clear();
    let _ = client.0.get_mut().write(b"\n");
    let mut guest = Guest::boot(process.connect(), FLUSH | EVENT_IDX, 1);
    let at = guest.ram.put(&[0; 512]);
    let buffer = Buffer::writable(at, 512);
    assert_eq!(
        send(&mut guest, VIRTIO_BLK_T_IN, 0, &[buffer]),
        VIRTIO_BLK_S_OK
    );
    assert!(process.is_running());
}

#[test]
fn an_inherited_control_socket_is_served() {
    let launch = Launch::new("device-disk");
    let image = launch.directory().join("image");
    std::fs::write(&image, pattern_of(0, SIZE)).unwrap();
    let path = launch.directory().join("others");
    let listener = UnixListener::bind(&path).unwrap();
    // A client that connects early waits.
    let mut early = Client::new(&path);
    let _process = launch
        .args([Path::new("--blk-file"), &image])
        .pass("--control-fd", listener.into())
        .listening();
    assert_eq!(early.stats().len(), 1);
}

#[test]
fn a_control_socket_that_cannot_be_used_is_reported() {
    let said = |program: &str, arguments: &[&str]| {
        let output = Command::new(binary(program))
            .args(arguments)
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        let error = error.lines().filter(|line| !line.starts_with(" INFO"));
        let error: Vec<&str> = error.collect();
        assert_eq!(error.len(), 1, "{error:?}");
        let error = error[0].to_owned();
        (output.status.code(), error)
    };
    for program in ["device-net", "device-console", "device-platform"] {
        let (code, error) = said(program, &["--control", "x", "--fd", "9"]);
        assert_eq!(code, Some(2), "{error}");
        assert!(error.contains("--control"), "{error}");
    }
    let both = ["--blk-file", "x", "--control", "x", "--control-fd", "9"];
    let (code, error) = said("device-disk", &both);
    assert!(code == Some(2) && error.contains("--control-fd"), "{error}");
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    std::fs::write(&image, [0; 512]).unwrap();
    let image = image.to_str().unwrap();
    let socket = directory.path().join("socket");
    let socket = socket.to_str().unwrap();
    for control in [["--control", "/none/x"], ["--control-fd", "99"]] {
        let mut arguments = vec!["--blk-file", image, "--socket-path", socket];
        arguments.extend(control);
        let (code, error) = said("device-disk", &arguments);
        assert_eq!(code, Some(1), "{error}");
        assert!(error.contains(&control.join(" ")), "{error}");
    }
    // A failed start leaves no files behind.
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

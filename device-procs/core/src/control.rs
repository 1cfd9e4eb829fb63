//! The control socket of a device process: a JSON object a line each way
//! (`outrigger_protocol::device`). One thread, which carries out one command after the
//! other and waits for no client: neither for one that says nothing nor for one that
//! does not read.

use std::io::{self, ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use outrigger_cli::socket::{self, BoundSocket};
use outrigger_protocol::ErrorCode;
use outrigger_protocol::device::{DeviceCommand, DeviceReply, DeviceStats, MAX_LINE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::fd::set_nonblocking;
use crate::listen;

/// Clients at a time. One more takes the place of the one that has been silent longest.
const MAX_CLIENTS: usize = 8;
/// How long a client may leave its answers unread.
const ROOM: Duration = Duration::from_secs(5);
/// After a failure of accept(2), for lack of descriptors for example.
const PAUSE: Duration = Duration::from_millis(100);

/// Options of a device program that has a control socket.
#[derive(Args, Clone, Debug)]
pub struct ControlOptions {
    /// Unix socket to create for control commands: statistics, flush, resize
    #[arg(long, value_name = "PATH", conflicts_with = "control_fd",
          value_parser = socket::path_parser())]
    pub control: Option<PathBuf>,

    /// Inherited socket that listens for control commands
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    pub control_fd: Option<RawFd>,
}

/// What a device lets others do with it while it serves. Called by one thread, between
/// whose calls the workers go on.
pub trait Control: Send + Sync {
    /// Makes the medium `size` bytes large, or looks whether it has grown, and tells the
    /// driver; returns the size that it sees now.
    ///
    /// # Errors
    /// Why not.
    fn resize(&self, size: Option<u64>) -> Result<u64, String>;

    /// Puts all that was written onto the medium.
    ///
    /// # Errors
    /// Why not.
    fn flush(&self) -> Result<(), String>;

    /// What the queues have done; `cpu` is the processor time of each worker.
    fn stats(&self, cpu: &[Option<Duration>]) -> DeviceStats;
}

/// The control socket, bound, and the device that it is for.
pub struct Server {
    listener: UnixListener,
    /// Its path, if this program made it, until it is served.
    unserved: Option<BoundSocket>,
    device: Arc<dyn Control>,
}

impl Server {
    /// The socket that the options name, if they do.
    ///
    /// # Errors
    /// One line that names the option and what is wrong with it.
    pub fn new(options: &ControlOptions, device: Arc<dyn Control>) -> anyhow::Result<Option<Self>> {
        let (listener, unserved) = if let Some(path) = &options.control {
            let (listener, bound) = socket::bind(path)
                .map_err(|e| anyhow::anyhow!("--control {}: {e}", path.display()))?;
            (listener, Some(bound))
        } else if let Some(fd) = options.control_fd {
            let listener = inherited(fd).map_err(|e| anyhow::anyhow!("--control-fd {fd}: {e}"))?;
            (listener, None)
        } else {
            return Ok(None);
        };
        set_nonblocking(&listener).context("the control socket")?;
        Ok(Some(Server {
            listener,
            unserved,
            device,
        }))
    }

    /// Starts the thread, before the sandbox forbids it. The socket is left behind at the
    /// end once what this returns is kept.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(self, clocks: Clocks) -> anyhow::Result<Option<BoundSocket>> {
        let Server {
            listener,
            unserved,
            device,
        } = self;
        let mut serving = Serving {
            listener,
            device,
            clocks,
            clients: Vec::new(),
        };
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                loop {
                    if let Err(error) = serving.turn() {
                        tracing::error!("control socket: poll: {error}");
                        return;
                    }
                }
            })
            .context("starting the control thread")?;
        Ok(unserved)
    }
}

fn inherited(fd: RawFd) -> io::Result<UnixListener> {
    match listen::inherit(fd)? {
        (fd, true) => Ok(fd.into()),
        (_, false) => Err(io::Error::other("not a socket that listens")),
    }
}

/// The processor clock of each worker thread, once it has started.
#[derive(Clone, Default)]
pub struct Clocks(Arc<[OnceLock<libc::clockid_t>]>);

impl Clocks {
    /// For as many workers.
    pub fn new(workers: usize) -> Self {
        Clocks((0..workers).map(|_| OnceLock::new()).collect())
    }

    /// The calling thread is this worker, until the process ends.
    pub fn register(&self, worker: usize) {
        let mut clock = 0;
        // SAFETY: of the calling thread, and `clock` is there to be written to.
        let result = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) };
        if result == 0
            && let Some(place) = self.0.get(worker)
        {
            // Each worker registers once.
            let _ = place.set(clock);
        }
    }

    /// The time that each has worked.
    pub fn read(&self) -> Vec<Option<Duration>> {
        self.0.iter().map(|clock| time(*clock.get()?)).collect()
    }
}

fn time(clock: libc::clockid_t) -> Option<Duration> {
    let mut time = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: the clock of a thread that lives as long as the process; on success `time`
    // is initialised.
    let time = unsafe {
        if libc::clock_gettime(clock, time.as_mut_ptr()) != 0 {
            return None;
        }
        time.assume_init()
    };
    let seconds = u64::try_from(time.tv_sec).ok()?;
    Some(Duration::new(seconds, u32::try_from(time.tv_nsec).ok()?))
}

/// What the thread has.
struct Serving {
    listener: UnixListener,
    device: Arc<dyn Control>,
    clocks: Clocks,
    clients: Vec<Client>,
}

struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// When it last said something whole; of one with answers to read: when it last read.
    heard: Instant,
    /// It gets what is in `output`, and no more.
    leaving: bool,
}

impl Serving {
    /// Waits until something happens, and does what that takes.
    fn turn(&mut self) -> rustix::io::Result<()> {
        let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN)];
        fds.extend(self.clients.iter().map(Client::watched));
        let now = Instant::now();
        let deadlines = self.clients.iter().filter_map(Client::deadline).min();
        let timeout = deadlines.map(|at| timespec(at.saturating_duration_since(now)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        for index in (0..self.clients.len()).rev() {
            let client = &mut self.clients[index];
            if !client.serve(ready[index + 1], &*self.device, &self.clocks) {
                self.clients.swap_remove(index);
            }
        }
        if ready[0] {
            self.accept();
        }
        Ok(())
    }

    fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Another process may share the socket, and have been faster.
                if error.kind() != ErrorKind::WouldBlock {
                    tracing::debug!("control socket: accept: {error}");
                    std::thread::sleep(PAUSE);
                }
                return;
            }
        };
        if set_nonblocking(&stream).is_err() {
            return;
        }
        if self.clients.len() >= MAX_CLIENTS {
            let silent = self.clients.iter().enumerate().min_by_key(|it| it.1.heard);
            if let Some((index, _)) = silent {
                self.clients.swap_remove(index);
            }
        }
        self.clients.push(Client {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            heard: Instant::now(),
            leaving: false,
        });
    }
}

impl Client {
    fn watched(&self) -> PollFd<'_> {
        // One that has something to read is not asked for more.
        let flags = match self.output.is_empty() {
            true => PollFlags::IN,
            false => PollFlags::OUT,
        };
        PollFd::new(&self.stream, flags)
    }

    fn deadline(&self) -> Option<Instant> {
        (!self.output.is_empty()).then(|| self.heard + ROOM)
    }

    /// Serves it; false when it is done with.
    fn serve(&mut self, ready: bool, device: &dyn Control, clocks: &Clocks) -> bool {
        if ready && self.output.is_empty() && !self.receive() {
            return false;
        }
        loop {
            if !self.send() {
                return false;
            }
            if !self.output.is_empty() {
                return self.heard.elapsed() < ROOM;
            }
            if self.leaving {
                return false;
            }
            let end = self.input.iter().position(|&byte| byte == b'\n');
            let reply = match end {
                Some(end) if end < MAX_LINE => {
                    let line: Vec<u8> = self.input.drain(..=end).collect();
                    carry_out(&line, device, clocks)
                }
                None if self.input.len() < MAX_LINE => return true,
                _ => {
                    self.leaving = true;
                    DeviceReply::error(
                        ErrorCode::LineTooLong,
                        format!("a line is longer than {MAX_LINE} bytes"),
                    )
                }
            };
            self.heard = Instant::now();
            match serde_json::to_vec(&reply) {
                Ok(line) => self.output = line,
                Err(_) => return false,
            }
            self.output.push(b'\n');
        }
    }

    /// Takes what has arrived; false when there will be no more.
    fn receive(&mut self) -> bool {
        let mut buffer = [0; MAX_LINE];
        match self.stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(count) => {
                self.input.extend_from_slice(&buffer[..count]);
                true
            }
            Err(e) => matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }

    /// Sends what fits; false when the client is gone.
    fn send(&mut self) -> bool {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) => {
                    self.output.drain(..count);
                    self.heard = Instant::now();
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return e.kind() == ErrorKind::WouldBlock,
            }
        }
        true
    }
}

fn carry_out(line: &[u8], device: &dyn Control, clocks: &Clocks) -> DeviceReply {
    let command = match serde_json::from_slice(line) {
        Ok(command) => command,
        Err(error) => return DeviceReply::error(ErrorCode::InvalidCommand, error.to_string()),
    };
    let done = match command {
        DeviceCommand::Stats {} => Ok(DeviceReply {
            stats: Some(device.stats(&clocks.read())),
            ..DeviceReply::ok()
        }),
        DeviceCommand::Flush {} => device.flush().map(|()| DeviceReply::ok()),
        DeviceCommand::Resize { size } => device.resize(size).map(|capacity| DeviceReply {
            capacity: Some(capacity),
            ..DeviceReply::ok()
        }),
    };
    done.unwrap_or_else(|why| DeviceReply::error(ErrorCode::Failed, why))
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::path::Path;

    use outrigger_protocol::device::QueueStats;

    use super::*;

    struct Medium;

    impl Control for Medium {
        fn resize(&self, size: Option<u64>) -> Result<u64, String> {
            match size {
                Some(size) if size < 1000 => Err("smaller than it is".into()),
                size => Ok(size.unwrap_or(1000)),
            }
        }

        fn flush(&self) -> Result<(), String> {
            Err("no space left".into())
        }

        fn stats(&self, cpu: &[Option<Duration>]) -> DeviceStats {
            let cpu_us = |time: &Option<Duration>| time.map(|it| it.as_micros() as u64);
            let queues = cpu.iter().map(|time| QueueStats {
                cpu_us: cpu_us(time),
                ..QueueStats::default()
            });
            DeviceStats {
                queues: queues.collect(),
            }
        }
    }

    fn serve(path: &Path, clocks: Clocks) -> Option<BoundSocket> {
        let options = ControlOptions {
            control: Some(path.to_owned()),
            control_fd: None,
        };
        let server = Server::new(&options, Arc::new(Medium)).unwrap();
        server.unwrap().start(clocks).unwrap()
    }

    fn connect(path: &Path) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(path).unwrap();
        let time = Some(Duration::from_secs(30));
        stream.set_read_timeout(time).unwrap();
        stream.set_write_timeout(time).unwrap();
        BufReader::new(stream)
    }

    fn answer(client: &mut BufReader<UnixStream>) -> String {
        let mut line = String::new();
        client.read_line(&mut line).unwrap();
        line
    }

    fn ask(client: &mut BufReader<UnixStream>, line: &str) -> String {
        let text = format!("{line}\n");
        client.get_mut().write_all(text.as_bytes()).unwrap();
        answer(client)
    }

    #[test]
    fn commands_are_answered_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let clocks = Clocks::new(2);
        clocks.register(0);
        let bound = serve(&path, clocks);
        let mut client = connect(&path);
        for (line, said) in [
            (
                r#"{"command":"resize","size":2000}"#,
                r#"{"ok":true,"capacity":2000}"#,
            ),
            (r#"{"command":"resize"}"#, r#"{"ok":true,"capacity":1000}"#),
            (
                r#"{"command":"resize","size":1}"#,
                r#"{"ok":false,"error":"smaller than it is"}"#,
            ),
            (
                r#"{"command":"flush"}"#,
                r#"{"ok":false,"error":"no space left"}"#,
            ),
        ] {
            assert_eq!(ask(&mut client, line).trim_end(), said);
        }
        for nonsense in ["", "{", "[]", r#"{"command":"halt"}"#, "\u{0}"] {
            let said = ask(&mut client, nonsense);
            let reply: DeviceReply = serde_json::from_str(&said).unwrap();
            assert!(!reply.ok && reply.error.is_some(), "{said}");
        }
        let stats = ask(&mut client, r#"{"command":"stats"}"#);
        let reply: DeviceReply = serde_json::from_str(&stats).unwrap();
        let queues = reply.stats.unwrap().queues;
        assert!(queues[0].cpu_us.is_some() && queues[1].cpu_us.is_none());
        drop(bound);
        assert!(!path.exists());
    }

    #[test]
    fn several_commands_at_once_are_all_answered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let _bound = serve(&path, Clocks::default());
        let mut client = connect(&path);
        let lines = "{\"command\":\"resize\"}\n".repeat(500);
        client.get_mut().write_all(lines.as_bytes()).unwrap();
        for _ in 0..500 {
            assert_eq!(answer(&mut client), "{\"ok\":true,\"capacity\":1000}\n");
        }
    }

    #[test]
    fn a_client_that_is_silent_or_does_not_read_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let _bound = serve(&path, Clocks::default());
        let mut deaf = connect(&path);
        deaf.get_ref().set_nonblocking(true).unwrap();
        // Until nothing fits any more: it has not read one answer.
        while deaf.get_mut().write(&b"x\n".repeat(1000)).is_ok() {}
        let silent: Vec<_> = (0..3 * MAX_CLIENTS).map(|_| connect(&path)).collect();
        let mut client = connect(&path);
        let said = ask(&mut client, r#"{"command":"resize"}"#);
        assert_eq!(said, "{\"ok\":true,\"capacity\":1000}\n");
        drop(silent);
    }

    #[test]
    fn a_line_without_end_ends_the_connection() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let _bound = serve(&path, Clocks::default());
        let mut client = connect(&path);
        // It may leave before all is written.
        let _ = client.get_mut().write_all(&vec![b' '; 3 * MAX_LINE]);
        let mut said = String::new();
        let _ = client.read_line(&mut said);
        assert!(
            said.is_empty() || said.contains("longer than 4096"),
            "{said}"
        );
        let mut other = connect(&path);
        assert!(ask(&mut other, r#"{"command":"resize"}"#).contains("true"));
    }

    #[test]
    fn what_does_not_listen_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let missing = ControlOptions {
            control: Some(dir.path().join("none/control")),
            control_fd: None,
        };
        let error = Server::new(&missing, Arc::new(Medium)).err().unwrap();
        assert!(error.to_string().starts_with("--control "), "{error}");
        use std::os::fd::IntoRawFd;
        let (one, _two) = UnixStream::pair().unwrap();
        let connected = ControlOptions {
            control: None,
            control_fd: Some(one.into_raw_fd()),
        };
        let error = Server::new(&connected, Arc::new(Medium)).err().unwrap();
        assert!(error.to_string().contains("listens"), "{error}");
        let nothing = ControlOptions {
            control: None,
            control_fd: None,
        };
        assert!(Server::new(&nothing, Arc::new(Medium)).unwrap().is_none());
    }
}

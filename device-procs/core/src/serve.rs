//! The life of a device program: options, files, sandbox, workers, front ends.

use std::io;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use outrigger_cli::options::{USAGE, Usage};
use outrigger_cli::socket::BoundSocket;
use outrigger_sandbox::{BASE, Check, LISTENER, Policy, Rule, SOCKET, SandboxMode, VHOST_USER};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use crate::cli::CommonOptions;
use crate::control::{self, Clocks};
use crate::enable::{self, SET_VRING_ENABLE};
use crate::fault::{self, FaultPoint};
use crate::listen::Listener;
use crate::session::VhostUserSession;
use crate::worker::Worker;
use crate::{Device, DeviceProperties, signals};

// Requests (vhost-user, "Front-end message types").
const SET_LOG_BASE: u32 = 6;
const GET_VRING_BASE: u32 = 11;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_INFLIGHT_FD: u32 = 31;
/// need_reply in the header's flags.
const NEED_REPLY: u32 = 1 << 3;
/// Open files at a time: the device's own, two for each queue, and one for each
/// memory region.
const MAX_FILES: u64 = 2048;

/// What the serve loop needs beyond the tables of the sandbox.
const SERVE: &[Rule] = &[
    // `signals` waits with it.
    Rule::any(libc::SYS_rt_sigtimedwait),
    // Crate vhost asks whether the back-end channel is a unix stream socket.
    Rule::when(
        libc::SYS_getsockopt,
        &[
            Check::OneOf(1, &[libc::SOL_SOCKET as u32]),
            Check::OneOf(2, &[libc::SO_DOMAIN as u32, libc::SO_TYPE as u32]),
        ],
    ),
];

/// What a device program is made of, once its files are open.
pub struct DeviceProgram {
    /// What the device is.
    pub properties: DeviceProperties,
    /// One device per worker thread, in the order that
    /// [`DeviceProperties::queues`] refers to.
    pub workers: Vec<Box<dyn Device>>,
    /// System calls that the device needs beyond those of the serve loop.
    pub syscalls: &'static [Rule],
    /// Stay in the network namespace that the program is in.
    pub keep_network: bool,
    /// Puts right what the program changed outside itself (a terminal's mode)
    /// when it ends.
    pub restore: Option<Box<dyn FnOnce() + Send>>,
    /// A socket of the device's own, which is removed if the start fails.
    pub unserved: Option<BoundSocket>,
    /// The device's control socket.
    pub control: Option<control::Server>,
}

/// Runs a device program to its end.
///
/// `capabilities` is what `--print-capabilities` prints; `build` opens the
/// device's files. Returns 0 when the front end of a connected socket left or
/// SIGTERM came, 2 when the command line makes no sense, and 1 on another error; each
/// is printed as one line.
pub fn run(
    name: &'static str,
    common: &CommonOptions,
    capabilities: &serde_json::Value,
    build: impl FnOnce() -> anyhow::Result<DeviceProgram>,
) -> ExitCode {
    run_with(name, common, capabilities, || serve(common, build))
}

/// [`run`] for a program with a serve loop of its own: prints the capabilities
/// or starts the log and serves. Returns 0 when `serve` has come to its end, 2 on an
/// error that is a [`Usage`], and 1 on another; each is printed as one line.
pub fn run_with(
    name: &'static str,
    common: &CommonOptions,
    capabilities: &serde_json::Value,
    serve: impl FnOnce() -> anyhow::Result<()>,
) -> ExitCode {
    if common.print_capabilities {
        println!("{capabilities}");
        return ExitCode::SUCCESS;
    }
    let started = outrigger_cli::logging::init(common.log_format, &common.log_level)
        .map_err(|why| Usage(why).into());
    match started.and_then(|()| serve()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            outrigger_cli::report_error(name, &error);
            ExitCode::from(if error.is::<Usage>() { USAGE } else { 1 })
        }
    }
}

fn serve(
    common: &CommonOptions,
    build: impl FnOnce() -> anyhow::Result<DeviceProgram>,
) -> anyhow::Result<()> {
    let mut listener = Listener::new(common)?;
    let ready = ReadyNotifier::new(common)?;
    let DeviceProgram {
        properties,
        workers: devices,
        syscalls,
        keep_network,
        restore,
        unserved,
        control,
    } = build()?;

    let mut layers = vec![BASE, SOCKET, VHOST_USER, SERVE, syscalls];
    // A device may listen, too, and a call has one rule.
    let accepts = |rule: &Rule| rule.syscall == libc::SYS_accept4;
    if (listener.is_listening() || control.is_some()) && !syscalls.iter().any(accepts) {
        layers.push(LISTENER);
    }
    let policy = Policy {
        process: properties.name,
        syscalls: layers.leak(), // lives as long as the process
        keep_network,
        max_files: MAX_FILES,
    };
    confine(&policy, common.sandbox)?;
    let properties = Arc::new(properties);
    let ending = signals::block();
    let clocks = Clocks::new(devices.len());
    let workers = start_workers(&properties, devices, &clocks)?;
    signals::exit_on_signal(ending, Arc::clone(&workers), restore)?;
    let control = control.map(|server| server.start(clocks)).transpose()?;
    outrigger_sandbox::seal(&policy, common.sandbox)?;
    listener.keep();
    for unserved in unserved.into_iter().chain(control.flatten()) {
        unserved.keep();
    }
    ready.announce();

    while let Some(stream) = listener.accept().context("accepting a front end")? {
        let session = VhostUserSession::new(Arc::clone(&properties), Arc::clone(&workers));
        session.frontend_connected(stream.as_fd());
        let session = Arc::new(Mutex::new(session));
        let front_end = stream.try_clone().context("duplicating a socket")?;
        match serve_one(stream, &session, &properties) {
            Ok(()) => tracing::debug!("the front end left"),
            Err(error) => tracing::warn!("front end dropped: {error}"),
        }
        session
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .close();
        // Only now: a front end takes an open socket for a sign that somebody may still
        // write to its memory. Whoever else has it open, such as the kernel, which lets go
        // of it when it likes, does not any more.
        let _ = front_end.shutdown(Shutdown::Both);
    }
    signals::finish();
    Ok(())
}

/// Everything of the sandbox that must come before the first thread.
///
/// # Errors
/// When the process is not isolated as well as this host allows.
pub fn confine(policy: &Policy, mode: SandboxMode) -> anyhow::Result<()> {
    let isolation = outrigger_sandbox::isolate(policy, mode)?;
    if mode == SandboxMode::Off || isolation.refused.is_some() {
        tracing::warn!("{isolation}");
    } else {
        tracing::debug!("{isolation}");
    }
    Ok(())
}

fn start_workers(
    properties: &DeviceProperties,
    devices: Vec<Box<dyn Device>>,
    clocks: &Clocks,
) -> anyhow::Result<Arc<[Worker]>> {
    let (total, poll) = (properties.queues.len(), properties.poll);
    let mut workers = Vec::with_capacity(devices.len());
    for (number, device) in devices.into_iter().enumerate() {
        let own: Vec<usize> = (0..total)
            .filter(|&queue| properties.queues[queue] == number)
            .collect();
        workers.push(Worker::new(device, &own, total, properties.queue_size)?);
    }
    let workers: Arc<[Worker]> = workers.into();
    for number in 0..workers.len() {
        let (workers, clocks) = (Arc::clone(&workers), clocks.clone());
        std::thread::Builder::new()
            .name(format!("worker-{number}"))
            .spawn(move || {
                clocks.register(number);
                if let Err(error) = workers[number].run(poll) {
                    tracing::error!("worker {number}: epoll_wait: {error}");
                    std::process::exit(1);
                }
            })
            .context("starting a worker thread")?;
    }
    Ok(workers)
}

/// Serves one front end until it leaves. A request that fails is answered with
/// its failure where the front end asked for answers; elsewhere it ends the
/// connection, for the front end would not learn of it.
fn serve_one(
    stream: UnixStream,
    session: &Arc<Mutex<VhostUserSession>>,
    properties: &DeviceProperties,
) -> Result<(), VhostError> {
    let peeker = stream.try_clone().map_err(VhostError::SocketError)?;
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(session));
    loop {
        let Some(mut next) = peek(&peeker).map_err(VhostError::SocketError)? else {
            return Ok(());
        };
        fault::hit(FaultPoint::Message(next.request));
        if next.request == SET_BACKEND_REQ_FD {
            properties
                .config
                .set_channel(next.fd.take().map(UnixStream::from));
        }
        if next.request == SET_VRING_ENABLE {
            let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
            if session.is_early() {
                enable::take(&peeker, &mut session).map_err(VhostError::SocketError)?;
                continue;
            }
        }
        match handler.handle_request() {
            Ok(()) => {}
            Err(VhostError::Disconnected) => return Ok(()),
            Err(error @ VhostError::ReqHandlerError(_)) if next.is_acknowledged() => {
                tracing::warn!("{error}");
            }
            Err(error) => return Err(error),
        }
    }
}

struct NextRequest {
    request: u32,
    flags: u32,
    fd: Option<OwnedFd>,
}

impl NextRequest {
    /// Whether the front end is told of a failure. A request that has an answer
    /// of its own has none for that.
    fn is_acknowledged(&self) -> bool {
        let answered = [SET_LOG_BASE, GET_VRING_BASE, GET_INFLIGHT_FD];
        self.flags & NEED_REPLY != 0 && !answered.contains(&self.request)
    }
}

/// Looks at the header of the next request without taking it; `None` when the
/// front end has left.
///
/// Crate vhost 0.18 cannot send the configuration change message and keeps the
/// channel for it private; peeking duplicates the descriptor (unix(7)), which is
/// how [`crate::ConfigSpace`] gets its own.
fn peek(stream: &UnixStream) -> io::Result<Option<NextRequest>> {
    let mut header = [0u8; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    loop {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            stream,
            &mut [io::IoSliceMut::new(&mut header)],
            &mut ancillary,
            RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC,
        );
        match received {
            Ok(message) if message.bytes == 0 => return Ok(None),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let fd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        // A header that has not arrived whole reads as zeros, which is no
        // request of interest; crate vhost then waits for the rest.
        return Ok(Some(NextRequest {
            request: word(0),
            flags: word(4),
            fd,
        }));
    }
}

/// Who wants to know that the program serves.
pub struct ReadyNotifier {
    fd: Option<OwnedFd>,
    systemd: Option<UnixDatagram>,
}

impl ReadyNotifier {
    /// Opens what must be open before the sandbox closes.
    ///
    /// # Errors
    /// One line that names what cannot be opened.
    pub fn new(common: &CommonOptions) -> anyhow::Result<Self> {
        let fd = common
            .ready_fd
            .map(|fd| crate::fd::inherit(fd).map_err(|e| anyhow::anyhow!("--ready-fd {fd}: {e}")))
            .transpose()?;
        Ok(ReadyNotifier {
            fd,
            systemd: notify_socket()?,
        })
    }

    /// Says that the program serves.
    pub fn announce(self) {
        // Nobody left to tell is no reason to stop serving.
        if let Some(fd) = self.fd {
            let _ = rustix::io::write(&fd, b"ready\n");
        }
        if let Some(socket) = self.systemd {
            let _ = rustix::io::write(&socket, b"READY=1\n");
        }
    }
}

/// The socket of sd_notify(3), connected now because the sandbox will not let
/// us later.
fn notify_socket() -> anyhow::Result<Option<UnixDatagram>> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::SocketAddr;

    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(None);
    };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let connect = || {
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address?)?;
        io::Result::Ok(socket)
    };
    Ok(Some(connect().context("NOTIFY_SOCKET")?))
}

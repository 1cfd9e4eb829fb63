//! A vhost-user device program from its command line to its end.

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use device_core::process::{self, confine, spawn_thread};
use device_core::signals::{self, Restore};
use device_core::{CommonOptions, Listener, ReadyNotifier};
use outrigger_cli::socket::BoundSocket;
use outrigger_sandbox::{BASE, Check, LISTENER, Policy, Rule, SOCKET, VHOST_USER};

use crate::connection::serve_front_end;
use crate::session::VhostUserSession;
use crate::worker::Worker;
use crate::{Device, DeviceProperties, WorkerClocks};

/// The most open files: the device's own, two for each queue, one for each memory region.
const MAX_FILES: u64 = 2048;

/// System calls of this crate beyond the tables of the sandbox.
const SYSCALLS: &[Rule] = &[
    // The signal thread waits with it.
    Rule::any(libc::SYS_rt_sigtimedwait),
    // Crate vhost checks that the back-end channel is a unix stream socket.
    Rule::when(
        libc::SYS_getsockopt,
        &[
            Check::OneOf(1, &[libc::SOL_SOCKET as u32]),
            Check::OneOf(2, &[libc::SO_DOMAIN as u32, libc::SO_TYPE as u32]),
        ],
    ),
];

/// A device program whose files are open.
pub struct DeviceProgram {
    /// What the device offers.
    pub properties: DeviceProperties,
    /// One device per worker thread, in the order of [`DeviceProperties::queues`].
    pub workers: Vec<Box<dyn Device>>,
    /// System calls of the device beyond those of this crate.
    pub syscalls: Vec<&'static [Rule]>,
    /// Whether the process stays in its network namespace.
    pub keep_network: bool,
    /// Restores what the program changed outside itself, such as a terminal's mode.
    pub restore: Option<Restore>,
    /// Sockets that the device made; their paths are removed if the start fails.
    pub bound: Vec<BoundSocket>,
    /// Starts the device's own threads.
    pub start_threads: Option<Box<dyn FnOnce() -> anyhow::Result<()>>>,
    /// Where the workers register their CPU clocks.
    pub clocks: WorkerClocks,
}

impl DeviceProgram {
    /// A program that needs nothing besides its workers.
    pub fn new(properties: DeviceProperties, workers: Vec<Box<dyn Device>>) -> Self {
        DeviceProgram {
            properties,
            workers,
            syscalls: Vec::new(),
            keep_network: false,
            restore: None,
            bound: Vec::new(),
            start_threads: None,
            clocks: WorkerClocks::default(),
        }
    }
}

/// Runs a device program until the front end of a connected socket leaves or a signal ends
/// it. `build` opens the device's files. For `capabilities` and the exit code see
/// [`process::run`].
pub fn run(
    program: &'static str,
    common: &CommonOptions,
    capabilities: &serde_json::Value,
    build: impl FnOnce() -> anyhow::Result<DeviceProgram>,
) -> ExitCode {
    process::run(program, common, capabilities, || serve(common, build))
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
        bound,
        start_threads,
        clocks,
    } = build()?;

    let mut layers = vec![BASE, SOCKET, VHOST_USER, SYSCALLS];
    // The device may listen, too, and a system call must have one rule.
    let accepts = |rule: &Rule| rule.syscall == libc::SYS_accept4;
    if listener.is_listening() && !syscalls.iter().copied().flatten().any(accepts) {
        layers.push(LISTENER);
    }
    layers.extend(syscalls);
    let policy = Policy {
        process: properties.name,
        syscalls: layers.leak(), // lives as long as the process
        keep_network,
        max_files: MAX_FILES,
    };
    confine(&policy, common.sandbox)?;
    let properties = Arc::new(properties);
    let signal_set = signals::block();
    let workers = start_workers(&properties, devices, clocks)?;
    signals::exit_on_signal(signal_set, restore, {
        let workers = Arc::clone(&workers);
        move || stop_workers_and_exit(&workers)
    })?;
    start_threads.map_or(Ok(()), |start| start())?;
    outrigger_sandbox::seal(&policy, common.sandbox)?;
    listener.keep();
    bound.into_iter().for_each(BoundSocket::keep);
    ready.notify();

    while let Some(stream) = listener.accept().context("accepting a front end")? {
        let session = VhostUserSession::new(Arc::clone(&properties), Arc::clone(&workers));
        session.frontend_connected(stream.as_fd());
        let session = Arc::new(Mutex::new(session));
        let duplicate = stream.try_clone().context("duplicating a socket")?;
        match serve_front_end(stream, &session, &properties) {
            Ok(()) => tracing::debug!("the front end disconnected"),
            Err(error) => tracing::warn!("front end dropped: {error}"),
        }
        session
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .close();
        // Only now that nothing of the session runs any more: as long as the connection is
        // open, a front end assumes that its memory may be written to. The shutdown also
        // ends it if the kernel (an io_uring) still holds the socket open.
        let _ = duplicate.shutdown(Shutdown::Both);
    }
    signals::restore();
    Ok(())
}

fn start_workers(
    properties: &DeviceProperties,
    devices: Vec<Box<dyn Device>>,
    clocks: WorkerClocks,
) -> anyhow::Result<Arc<[Worker]>> {
    let (queues, poll_time) = (properties.queues.len(), properties.poll_time);
    let mut workers = Vec::with_capacity(devices.len());
    for (number, device) in devices.into_iter().enumerate() {
        let own: Vec<usize> = (0..queues)
            .filter(|&queue| properties.queues[queue] == number)
            .collect();
        workers.push(Worker::new(device, &own, queues, properties.queue_size)?);
    }
    let workers: Arc<[Worker]> = workers.into();
    for number in 0..workers.len() {
        let (workers, clocks) = (Arc::clone(&workers), clocks.clone());
        spawn_thread(&format!("worker-{number}"), move || {
            clocks.register(number);
            if let Err(error) = workers[number].run(poll_time) {
                tracing::error!(worker = number, %error, "epoll_wait failed");
                std::process::exit(1);
            }
        })?;
    }
    Ok(workers)
}

/// Completes all requests in flight and ends the process. The calls are nested, so that
/// every worker is locked and drained when the process ends.
fn stop_workers_and_exit(workers: &[Worker]) {
    match workers.split_first() {
        Some((first, rest)) => first.control(|state, poller| {
            state.drain_all(poller);
            stop_workers_and_exit(rest);
        }),
        None => signals::exit(),
    }
}

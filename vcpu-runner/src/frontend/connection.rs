//! One vhost-user connection to a back end: the handshake, the messages and their
//! deadlines.

use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use outrigger_protocol::memory::USER_ADDRESS_OFFSET;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{
    Error as VhostUserError, Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend,
    VhostUserFrontendReqHandler, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::{
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_NOTIF_CONFIG_DATA, VIRTIO_F_NOTIFICATION_DATA,
    VIRTIO_F_RING_PACKED, VIRTIO_F_RING_RESET, VIRTIO_F_SR_IOV, VIRTIO_F_VERSION_1,
};
use vmm_sys_util::eventfd::EventFd;

use super::inflight::InflightTableFile;
use super::spec::DeviceSpec;
use super::vhost_workarounds::watchdog::Watchdog;
use super::vhost_workarounds::{get_config, unsolicited};
use crate::Error;
use crate::pci::virtio::request::QueueSetup;
use crate::pci::virtio::{CONFIG_LENGTH, DeviceInfo, MAX_QUEUES};

/// How long a back end may take to answer one message.
pub const MESSAGE_DEADLINE: Duration = Duration::from_secs(5);

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Feature bits that the driver is never offered, whatever the back end offers: they
/// need support by the transport, which does not exist.
const WITHHELD_FEATURES: u64 = 1 << VIRTIO_F_RING_PACKED
    | 1 << VIRTIO_F_ACCESS_PLATFORM
    | 1 << VIRTIO_F_SR_IOV
    | 1 << VIRTIO_F_NOTIFICATION_DATA
    | 1 << VIRTIO_F_NOTIF_CONFIG_DATA
    | 1 << VIRTIO_F_ADMIN_VQ
    | 1 << VHOST_F_LOG_ALL
    | PROTOCOL_FEATURES;

/// Of virtio 1.3; crate virtio-bindings does not have it yet.
const VIRTIO_F_ADMIN_VQ: u32 = 41;
/// Between front end and back end only.
const VHOST_F_LOG_ALL: u32 = 26;

/// A vring to start.
pub struct VringStart<'a> {
    /// How the driver set it up.
    pub setup: QueueSetup,
    /// Largest size that the driver may choose.
    pub max_size: u16,
    /// Index in the available ring to continue from.
    pub base: u16,
    /// The eventfd of the doorbell.
    pub kick: &'a EventFd,
    /// The eventfd of the interrupt.
    pub call: &'a EventFd,
}

/// Notes that the back end announced a change of the configuration space.
#[derive(Default)]
struct ConfigChangeFlag(AtomicBool);

impl VhostUserFrontendReqHandler for ConfigChangeFlag {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.0.store(true, Ordering::Relaxed);
        Ok(0)
    }
}

/// Lets other threads end a connection. It is shut down for reading or for writing,
/// never for both: then poll(2) would report a hang-up at once, and the runner could not
/// see when the back end closes its end.
pub struct CancelHandle {
    socket: UnixStream,
    done: Mutex<bool>,
}

impl CancelHandle {
    fn shut_down(&self, how: Shutdown) {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut *done, true) {
            // An error means that the back end is gone already.
            let _ = self.socket.shutdown(how);
        }
    }

    /// Ends every wait for a reply.
    pub fn cancel(&self) {
        self.shut_down(Shutdown::Read);
    }
}

/// A vhost-user connection to a back end.
pub struct BackendConnection {
    id: String,
    frontend: Frontend,
    socket: UnixStream,
    cancel_handle: Arc<CancelHandle>,
    /// While set, all messages together have to be answered by then.
    overall_deadline: Option<Instant>,
    /// SET_MEM_TABLE was sent.
    has_memory: bool,
    watchdog: Arc<Watchdog>,
    protocol_features: VhostUserProtocolFeatures,
    /// The feature bits that the back end offers, as it sent them.
    offered_features: u64,
    /// Length of the configuration space, once it is known.
    config_length: Option<usize>,
    config_change: Arc<ConfigChangeFlag>,
    backend_channel: Option<BackendChannel>,
}

/// The back-end channel: requests that the back end sends.
struct BackendChannel {
    handler: FrontendReqHandler<ConfigChangeFlag>,
    /// The socket of `handler` once more, for poll(2) and the watchdog.
    socket: UnixStream,
}

impl BackendConnection {
    /// A connection on which nothing has been sent. Until
    /// [`BackendConnection::end_handshake`], all messages together have one deadline.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub fn new(
        spec: &DeviceSpec,
        socket: UnixStream,
        watchdog: &Arc<Watchdog>,
    ) -> Result<Self, Error> {
        let duplicate = || {
            socket
                .try_clone()
                .map_err(Error::io("duplicating a socket"))
        };
        let cancel_handle = CancelHandle {
            socket: duplicate()?,
            done: Mutex::default(),
        };
        Ok(BackendConnection {
            id: spec.id.clone(),
            frontend: Frontend::from_stream(duplicate()?, MAX_QUEUES as u64),
            socket,
            cancel_handle: Arc::new(cancel_handle),
            overall_deadline: Some(Instant::now() + MESSAGE_DEADLINE),
            has_memory: false,
            watchdog: Arc::clone(watchdog),
            protocol_features: VhostUserProtocolFeatures::empty(),
            offered_features: 0,
            config_length: None,
            config_change: Arc::default(),
            backend_channel: None,
        })
    }

    /// Performs the handshake; returns what the device is. `known_config_length`: the
    /// length of its configuration space, if an earlier back end had one.
    ///
    /// # Errors
    /// Names the message that failed, or what the back end lacks.
    pub fn handshake(
        &mut self,
        spec: &DeviceSpec,
        known_config_length: Option<usize>,
    ) -> Result<DeviceInfo, Error> {
        self.config_length = known_config_length;
        self.request("SET_OWNER", |f| f.set_owner())?;
        self.offered_features = self.request("GET_FEATURES", |f| f.get_features())?;
        if self.offered_features & (1 << VIRTIO_F_VERSION_1) == 0 {
            let why = "the back end does not offer VIRTIO_F_VERSION_1";
            return Err(self.error("GET_FEATURES", why));
        }
        if self.offered_features & PROTOCOL_FEATURES != 0 {
            self.negotiate_protocol_features()?;
        }
        Ok(DeviceInfo {
            id: spec.id.clone(),
            virtio_id: spec.virtio_id,
            features: (self.offered_features & !WITHHELD_FEATURES) | 1 << VIRTIO_F_RING_RESET,
            queues: self.queue_count(spec)?,
            queue_size: spec.queue_size,
            config: self.read_config()?,
        })
    }

    fn error(&self, operation: &str, why: impl ToString) -> Error {
        Error::device(&self.id, operation, why)
    }

    /// Calls `f`, which uses the connection, under a deadline.
    fn with_deadline<T, E>(
        &mut self,
        operation: &str,
        f: impl FnOnce(&mut Self) -> Result<T, E>,
    ) -> Result<Result<T, E>, Error> {
        if let Some(why) = unsolicited::connection_error(&self.socket) {
            return Err(self.error(operation, why));
        }
        let left = self.overall_deadline.map_or(MESSAGE_DEADLINE, |deadline| {
            deadline.saturating_duration_since(Instant::now())
        });
        let guard = self
            .watchdog
            .guard(&self.socket, left.min(MESSAGE_DEADLINE))?;
        let result = f(self);
        if guard.has_expired() {
            // The watchdog has shut the socket down for reading. No other thread may shut it
            // down for writing now: see `CancelHandle`.
            self.cancel_handle.cancel();
            if result.is_err() {
                let why = format!("no complete answer in {MESSAGE_DEADLINE:?}");
                return Err(self.error(operation, why));
            }
        }
        Ok(result)
    }

    /// Sends a request and waits for its reply, if it has one.
    fn request<T>(
        &mut self,
        operation: &str,
        f: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, Error> {
        self.with_deadline(operation, |connection| f(&mut connection.frontend))?
            .map_err(|e| match e {
                vhost::Error::VhostUserProtocol(VhostUserError::BackendInternalError) => {
                    Error::refused(&self.id, operation)
                }
                e => self.error(operation, e),
            })
    }

    /// Gives the back end up and lets it know. The returned socket hangs up (poll(2))
    /// when the back end closes its end. Until then the back end may write to guest
    /// memory: a process that is only stopped continues later.
    pub fn abandon(self) -> UnixStream {
        // A back end that owes a reply was cancelled, and its reply is not read. Any other
        // one reads end of file.
        self.cancel_handle.shut_down(Shutdown::Write);
        self.socket
    }

    /// Whether the back end was told where guest memory is.
    pub fn has_memory(&self) -> bool {
        self.has_memory
    }

    /// The handshake is over: from now on each message has its own deadline.
    pub fn end_handshake(&mut self) {
        self.overall_deadline = None;
    }

    /// All messages that follow have one deadline together, as in the handshake.
    pub fn set_overall_deadline(&mut self) {
        self.overall_deadline = Some(Instant::now() + MESSAGE_DEADLINE);
    }

    /// For other threads, as long as the connection exists.
    pub fn cancel_handle(&self) -> Weak<CancelHandle> {
        Arc::downgrade(&self.cancel_handle)
    }

    fn negotiate_protocol_features(&mut self) -> Result<(), Error> {
        let offered = self.request("GET_PROTOCOL_FEATURES", |f| f.get_protocol_features())?;
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        let features = offered & wanted;
        self.protocol_features = features;
        self.request("SET_PROTOCOL_FEATURES", |f| {
            f.set_protocol_features(features)
        })?;
        if features.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if features.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            self.open_backend_channel()?;
        }
        Ok(())
    }

    fn open_backend_channel(&mut self) -> Result<(), Error> {
        let mut handler = FrontendReqHandler::new(Arc::clone(&self.config_change))
            .map_err(|e| self.error("back-end channel", e))?;
        let reply_ack = VhostUserProtocolFeatures::REPLY_ACK;
        handler.set_reply_ack_flag(self.protocol_features.contains(reply_ack));
        let backend_end = handler.get_tx_raw_fd();
        self.request("SET_BACKEND_REQ_FD", |f| {
            f.set_backend_request_fd(&backend_end)
        })?;
        // SAFETY: `handler` keeps its descriptor open while it is borrowed here.
        let own_end = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
        let socket = own_end
            .try_clone_to_owned()
            .map_err(Error::io("duplicating a socket"))?
            .into();
        self.backend_channel = Some(BackendChannel { handler, socket });
        Ok(())
    }

    fn queue_count(&mut self, spec: &DeviceSpec) -> Result<usize, Error> {
        let mq = VhostUserProtocolFeatures::MQ;
        let available = if self.protocol_features.contains(mq) {
            let count = self.request("GET_QUEUE_NUM", |f| f.get_queue_num())?;
            usize::try_from(count).unwrap_or(usize::MAX)
        } else {
            spec.queues.unwrap_or(spec.default_queues())
        };
        if available == 0 {
            return Err(self.error("GET_QUEUE_NUM", "the back end has no queues"));
        }
        match spec.queues {
            Some(wanted) if wanted > available => {
                let why =
                    format!("queues={wanted} is more than the {available} that the back end has");
                Err(self.error("GET_QUEUE_NUM", why))
            }
            wanted => Ok(wanted.unwrap_or(available).min(MAX_QUEUES)),
        }
    }

    /// Reads the device's configuration space; empty when the back end has none.
    ///
    /// # Errors
    /// When the back end does not send a proper reply.
    pub fn read_config(&mut self) -> Result<Vec<u8>, Error> {
        let config = VhostUserProtocolFeatures::CONFIG;
        if !self.protocol_features.contains(config) {
            return Ok(Vec::new());
        }
        let bytes = self
            .with_deadline("GET_CONFIG", |connection| {
                get_config::read(&connection.socket, connection.config_length, CONFIG_LENGTH)
            })?
            .map_err(|e| self.error("GET_CONFIG", e))?;
        self.config_length = Some(bytes.len());
        Ok(bytes)
    }

    /// Passes on what the driver wrote to the configuration space.
    ///
    /// # Errors
    /// [`Error::Refused`] when the back end does not accept it.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), Error> {
        let config = VhostUserProtocolFeatures::CONFIG;
        if !self.protocol_features.contains(config) {
            return Ok(());
        }
        let flags = VhostUserConfigFlags::WRITABLE;
        self.request("SET_CONFIG", |f| f.set_config(offset as u32, flags, data))
    }

    /// Whether the back end tracks the requests that it has in flight.
    pub fn is_tracked(&self) -> bool {
        self.protocol_features
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }

    /// Sends the features that the driver accepted, the in-flight table and the memory
    /// table. Returns the in-flight table that the back end uses: `inflight` if there is one,
    /// else a new one for `queues` queues of `queue_size` entries; `None` if the back end
    /// does not track its requests.
    ///
    /// # Errors
    /// When the back end refuses a message or does not answer.
    pub fn send_features_and_memory(
        &mut self,
        features: u64,
        inflight: Option<InflightTableFile>,
        (queues, queue_size): (usize, u16),
        memory: &[VhostUserMemoryRegionInfo],
    ) -> Result<Option<InflightTableFile>, Error> {
        let offered = self.offered_features;
        let features = (features & offered) | (offered & PROTOCOL_FEATURES);
        self.request("SET_FEATURES", |f| f.set_features(features))?;
        let inflight = match inflight {
            _ if !self.is_tracked() => None,
            Some(kept) => Some(kept),
            None => Some(self.get_inflight(queues, queue_size)?),
        };
        if let Some(inflight) = &inflight {
            self.set_inflight(inflight)?;
        }
        self.has_memory = true;
        self.request("SET_MEM_TABLE", |f| f.set_mem_table(memory))?;
        Ok(inflight)
    }

    fn get_inflight(&mut self, queues: usize, queue_size: u16) -> Result<InflightTableFile, Error> {
        let wanted = VhostUserInflight {
            num_queues: queues as u16,
            queue_size,
            ..Default::default()
        };
        let (reply, file) = self.request("GET_INFLIGHT_FD", |f| f.get_inflight_fd(&wanted))?;
        // The runner reads the table. Reading a pipe or a device could block.
        rustix::fs::fcntl_get_seals(&file)
            .map_err(|_| self.error("GET_INFLIGHT_FD", "the descriptor is not a memfd"))?;
        Ok(InflightTableFile {
            layout: VhostUserInflight {
                num_queues: wanted.num_queues,
                queue_size: wanted.queue_size,
                ..reply
            },
            file,
        })
    }

    /// Makes the back end use `inflight`.
    ///
    /// # Errors
    /// When the back end refuses it.
    pub fn set_inflight(&mut self, inflight: &InflightTableFile) -> Result<(), Error> {
        let fd = inflight.file.as_raw_fd();
        self.request("SET_INFLIGHT_FD", |f| {
            f.set_inflight_fd(&inflight.layout, fd)
        })
    }

    /// Starts one vring.
    ///
    /// # Errors
    /// When the back end refuses a message or does not answer.
    pub fn start_vring(&mut self, start: &VringStart<'_>) -> Result<(), Error> {
        let QueueSetup { index, size, .. } = start.setup;
        let step = |message: &str| format!("queue {index}: {message}");
        let user_address = |address: u64| {
            address.checked_add(USER_ADDRESS_OFFSET).ok_or_else(|| {
                let why = format!("guest address {address:#x} is out of range");
                Error::device(&self.id, step("SET_VRING_ADDR"), why)
            })
        };
        let addresses = VringConfigData {
            queue_max_size: start.max_size,
            queue_size: size,
            flags: 0,
            desc_table_addr: user_address(start.setup.descriptors)?,
            used_ring_addr: user_address(start.setup.device)?,
            avail_ring_addr: user_address(start.setup.driver)?,
            log_addr: None,
        };
        self.request(&step("SET_VRING_NUM"), |f| f.set_vring_num(index, size))?;
        self.request(&step("SET_VRING_BASE"), |f| {
            f.set_vring_base(index, start.base)
        })?;
        self.request(&step("SET_VRING_ADDR"), |f| {
            f.set_vring_addr(index, &addresses)
        })?;
        self.request(&step("SET_VRING_CALL"), |f| {
            f.set_vring_call(index, start.call)
        })?;
        // A vring works once it is enabled and has its kick descriptor. The order matters:
        // some back ends poll the doorbell as soon as they have it and drop the events of a
        // vring that is not enabled (crate vhost-user-backend 0.10); QEMU's vhost-user-blk
        // reads no message while the driver keeps it busy.
        if self.offered_features & PROTOCOL_FEATURES != 0 {
            self.request(&step("SET_VRING_ENABLE"), |f| {
                f.set_vring_enable(index, true)
            })?;
        }
        self.request(&step("SET_VRING_KICK"), |f| {
            f.set_vring_kick(index, start.kick)
        })
    }

    /// Stops one vring; returns the index in the available ring to continue from.
    ///
    /// # Errors
    /// When the back end does not send a proper reply.
    pub fn stop_vring(&mut self, index: usize) -> Result<u16, Error> {
        let step = format!("queue {index}: GET_VRING_BASE");
        let base = self.request(&step, |f| f.get_vring_base(index))?;
        Ok(base as u16)
    }

    /// The socket, for poll(2). If it is readable between two requests, the back end has
    /// left or violates the protocol: see [`BackendConnection::connection_error`].
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Why the connection is readable between two requests.
    pub fn connection_error(&self) -> Option<Error> {
        let why = unsolicited::connection_error(&self.socket)?;
        Some(self.error("connection", why))
    }

    /// The back-end channel, for poll(2).
    pub fn backend_channel_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.backend_channel.as_ref()?.socket.as_fd())
    }

    /// Handles one message of the back-end channel; true when it announced a change of
    /// the configuration space.
    ///
    /// # Errors
    /// When the message is malformed or incomplete.
    pub fn handle_backend_channel(&mut self) -> Result<bool, Error> {
        if let Some(channel) = &mut self.backend_channel {
            let guard = self.watchdog.guard(&channel.socket, MESSAGE_DEADLINE)?;
            let result = channel.handler.handle_request();
            drop(guard);
            result.map_err(|e| self.error("back-end channel", e))?;
        }
        Ok(self.config_change.0.swap(false, Ordering::Relaxed))
    }
}

//! One connection to a device's process.

use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use outrigger_protocol::memory::USER_ADDRESS_OFFSET;
use rustix::io::Errno;
use rustix::net::RecvFlags;
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

use super::config_space;
use super::inflight::Inflight;
use super::spec::DeviceSpec;
use super::watchdog::Watchdog;
use crate::Error;
use crate::pci::virtio::backend::QueueSetup;
use crate::pci::virtio::{CONFIG_LENGTH, DeviceInfo, MAX_QUEUES};

/// How long a process may take to answer one message.
pub const DEADLINE: Duration = Duration::from_secs(5);
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Feature bits that need the transport's help and do not get it: whatever a
/// process offers, the guest does not see them.
const WITHHELD: u64 = 1 << VIRTIO_F_RING_PACKED
    | 1 << VIRTIO_F_ACCESS_PLATFORM
    | 1 << VIRTIO_F_SR_IOV
    | 1 << VIRTIO_F_NOTIFICATION_DATA
    | 1 << VIRTIO_F_NOTIF_CONFIG_DATA
    | 1 << ADMIN_VQ
    | 1 << LOG_ALL
    | PROTOCOL_FEATURES;

/// VIRTIO_F_ADMIN_VQ of virtio 1.3.
const ADMIN_VQ: u32 = 41;
/// VHOST_F_LOG_ALL, which is between front end and process.
const LOG_ALL: u32 = 26;

/// A queue to start.
pub struct QueueStart<'a> {
    /// How the driver set it up.
    pub setup: QueueSetup,
    /// Available index to go on from.
    pub base: u16,
    /// Its doorbell.
    pub kick: &'a EventFd,
    /// Its interrupt.
    pub call: &'a EventFd,
}

/// Notes that the process announced a new configuration.
#[derive(Default)]
struct ConfigChanges(AtomicBool);

impl VhostUserFrontendReqHandler for ConfigChanges {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.0.store(true, Ordering::Relaxed);
        Ok(0)
    }
}

/// A connection that others may end, in one of two ways. Never both: then our own end
/// would count as hung up (poll(2)), and nobody could tell when the process is gone.
pub struct Lifeline {
    socket: UnixStream,
    ended: Mutex<bool>,
}

impl Lifeline {
    fn end(&self, how: Shutdown) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut *ended, true) {
            // An error means that it is gone already.
            let _ = self.socket.shutdown(how);
        }
    }

    /// Ends every wait for an answer.
    pub fn cut_off(&self) {
        self.end(Shutdown::Read);
    }
}

/// A connection to a device's process.
pub struct Session {
    id: String,
    frontend: Frontend,
    socket: UnixStream,
    lifeline: Arc<Lifeline>,
    /// When all of the handshake must be over, until it is.
    until: Option<Instant>,
    /// The process was told where guest memory is.
    has_memory: bool,
    watchdog: Arc<Watchdog>,
    protocol: VhostUserProtocolFeatures,
    /// All that the process offered, in its own terms.
    offered: u64,
    /// Length of its configuration space; the most it can be until it is known.
    config_length: usize,
    queues: usize,
    queue_size: u16,
    changes: Arc<ConfigChanges>,
    channel: Option<Channel>,
}

/// The back-end channel, and a handle to cut it off by.
struct Channel {
    handler: FrontendReqHandler<ConfigChanges>,
    socket: UnixStream,
}

impl Session {
    /// A connection on which nothing was said yet. All that is said on it until
    /// [`Session::established`] has one deadline.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn new(
        spec: &DeviceSpec,
        socket: UnixStream,
        watchdog: &Arc<Watchdog>,
    ) -> Result<Self, Error> {
        let stream = socket
            .try_clone()
            .map_err(Error::io("duplicating a socket"))?;
        let lifeline = Lifeline {
            socket: socket
                .try_clone()
                .map_err(Error::io("duplicating a socket"))?,
            ended: Mutex::default(),
        };
        Ok(Session {
            id: spec.id.clone(),
            frontend: Frontend::from_stream(stream, MAX_QUEUES as u64),
            socket,
            lifeline: Arc::new(lifeline),
            until: Some(Instant::now() + DEADLINE),
            has_memory: false,
            watchdog: Arc::clone(watchdog),
            protocol: VhostUserProtocolFeatures::empty(),
            offered: 0,
            config_length: CONFIG_LENGTH,
            queues: 0,
            queue_size: spec.queue_size,
            changes: Arc::default(),
            channel: None,
        })
    }

    /// Shakes hands; returns what the device is.
    ///
    /// # Errors
    /// Names the step that failed, or what the process is not.
    pub fn shake_hands(&mut self, spec: &DeviceSpec) -> Result<DeviceInfo, Error> {
        self.call("SET_OWNER", |f| f.set_owner())?;
        self.offered = self.call("GET_FEATURES", |f| f.get_features())?;
        if self.offered & (1 << VIRTIO_F_VERSION_1) == 0 {
            return Err(self.error("GET_FEATURES", "not a virtio 1.0 device"));
        }
        if self.offered & PROTOCOL_FEATURES != 0 {
            self.negotiate_protocol()?;
        }
        self.queues = self.count_queues(spec)?;
        Ok(DeviceInfo {
            id: spec.id.clone(),
            virtio_id: spec.virtio_id,
            features: (self.offered & !WITHHELD) | 1 << VIRTIO_F_RING_RESET,
            queues: self.queues,
            queue_size: spec.queue_size,
            config: self.read_config()?,
        })
    }

    fn error(&self, operation: &str, why: impl ToString) -> Error {
        Error::device(&self.id, operation, why)
    }

    /// Does something with the connection under a deadline.
    fn timed<T, E>(
        &mut self,
        operation: &str,
        f: impl FnOnce(&mut Self) -> Result<T, E>,
    ) -> Result<Result<T, E>, Error> {
        if let Some(why) = self.trouble() {
            return Err(self.error(operation, why));
        }
        let left = self.until.map_or(DEADLINE, |until| {
            until.saturating_duration_since(Instant::now())
        });
        let guard = self.watchdog.guard(&self.socket, left.min(DEADLINE))?;
        let result = f(self);
        if guard.finish() {
            // The watchdog has done so, and nothing else may be done now.
            self.lifeline.cut_off();
            if result.is_err() {
                let why = format!("no complete answer in {DEADLINE:?}");
                return Err(self.error(operation, why));
            }
        }
        Ok(result)
    }

    /// Gives the process up and tells it so. What this returns hangs up (poll(2))
    /// when the process has closed its end, and that is when it can do no more harm:
    /// one that is only stopped would wake up and write to guest memory.
    pub fn abandon(self) -> UnixStream {
        // One that owes an answer finds that nobody reads it: it was cut off. Another one
        // finds that there is nothing more to read.
        self.lifeline.end(Shutdown::Write);
        self.socket
    }

    /// Whether the process could write to guest memory.
    pub fn has_memory(&self) -> bool {
        self.has_memory
    }

    /// The handshake is over: from now on each message has its own deadline.
    pub fn established(&mut self) {
        self.until = None;
    }

    /// What follows has one deadline together, as the handshake had.
    pub fn limit(&mut self) {
        self.until = Some(Instant::now() + DEADLINE);
    }

    /// For others to end it by, as long as it is there.
    pub fn lifeline(&self) -> Weak<Lifeline> {
        Arc::downgrade(&self.lifeline)
    }

    /// Sends a message.
    fn call<T>(
        &mut self,
        operation: &str,
        f: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, Error> {
        self.timed(operation, |session| f(&mut session.frontend))?
            .map_err(|e| match e {
                vhost::Error::VhostUserProtocol(VhostUserError::BackendInternalError) => {
                    Error::Refused {
                        id: self.id.clone(),
                        operation: operation.to_owned(),
                    }
                }
                e => self.error(operation, e),
            })
    }

    fn negotiate_protocol(&mut self) -> Result<(), Error> {
        let offered = self.call("GET_PROTOCOL_FEATURES", |f| f.get_protocol_features())?;
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        self.protocol = offered & wanted;
        let protocol = self.protocol;
        self.call("SET_PROTOCOL_FEATURES", |f| {
            f.set_protocol_features(protocol)
        })?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            let mut channel = FrontendReqHandler::new(Arc::clone(&self.changes))
                .map_err(|e| self.error("back-end channel", e))?;
            channel.set_reply_ack_flag(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
            let fd = channel.get_tx_raw_fd();
            self.call("SET_BACKEND_REQ_FD", |f| f.set_backend_request_fd(&fd))?;
            // SAFETY: the handler keeps its descriptor open meanwhile.
            let own = unsafe { BorrowedFd::borrow_raw(channel.as_raw_fd()) };
            let socket = own
                .try_clone_to_owned()
                .map_err(Error::io("duplicating a socket"))?
                .into();
            self.channel = Some(Channel {
                handler: channel,
                socket,
            });
        }
        Ok(())
    }

    fn count_queues(&mut self, spec: &DeviceSpec) -> Result<usize, Error> {
        let available = if self.protocol.contains(VhostUserProtocolFeatures::MQ) {
            let count = self.call("GET_QUEUE_NUM", |f| f.get_queue_num())?;
            usize::try_from(count).unwrap_or(usize::MAX)
        } else {
            spec.queues.unwrap_or(spec.default_queues())
        };
        if available == 0 {
            return Err(self.error("GET_QUEUE_NUM", "no queues"));
        }
        match spec.queues {
            Some(wanted) if wanted > available => {
                let why = format!("{wanted} queues wanted, the process has {available}");
                Err(self.error("GET_QUEUE_NUM", why))
            }
            wanted => Ok(wanted.unwrap_or(available).min(MAX_QUEUES)),
        }
    }

    /// The device's configuration space; empty when the process has none.
    ///
    /// # Errors
    /// When the process does not answer properly.
    pub fn read_config(&mut self) -> Result<Vec<u8>, Error> {
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Ok(Vec::new());
        }
        let bytes = self
            .timed("GET_CONFIG", |session| {
                config_space::read(&session.socket, session.config_length)
            })?
            .map_err(|e| self.error("GET_CONFIG", e))?;
        // From here on the length is known.
        self.config_length = bytes.len();
        Ok(bytes)
    }

    /// Passes a driver's write to the configuration space on.
    ///
    /// # Errors
    /// When the process refuses it.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), Error> {
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Ok(());
        }
        let flags = VhostUserConfigFlags::WRITABLE;
        self.call("SET_CONFIG", |f| f.set_config(offset as u32, flags, data))
    }

    /// Whether the process tracks what it has in work.
    pub fn is_tracked(&self) -> bool {
        self.protocol
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }

    /// Tells the process what the driver accepted, what its predecessor had in work
    /// and where guest memory is. Returns the table that the process tracks its own
    /// work in: `inflight` if there is one, else a fresh one; `None` if it tracks
    /// nothing.
    ///
    /// # Errors
    /// When the process refuses it.
    pub fn prepare(
        &mut self,
        features: u64,
        inflight: Option<Inflight>,
        memory: &[VhostUserMemoryRegionInfo],
    ) -> Result<Option<Inflight>, Error> {
        let features = (features & self.offered) | (self.offered & PROTOCOL_FEATURES);
        self.call("SET_FEATURES", |f| f.set_features(features))?;
        let inflight = match inflight {
            _ if !self.is_tracked() => None,
            Some(kept) => Some(kept),
            None => Some(self.fresh_inflight()?),
        };
        if let Some(inflight) = &inflight {
            self.set_inflight(inflight)?;
        }
        self.has_memory = true;
        self.call("SET_MEM_TABLE", |f| f.set_mem_table(memory))?;
        Ok(inflight)
    }

    fn fresh_inflight(&mut self) -> Result<Inflight, Error> {
        let wanted = VhostUserInflight {
            num_queues: self.queues as u16,
            queue_size: self.queue_size,
            ..Default::default()
        };
        let (shape, file) = self.call("GET_INFLIGHT_FD", |f| f.get_inflight_fd(&wanted))?;
        // Reading from anything but memory could take for ever.
        rustix::fs::fcntl_get_seals(&file)
            .map_err(|_| self.error("GET_INFLIGHT_FD", "what it sent is no memory (memfd)"))?;
        Ok(Inflight {
            shape: VhostUserInflight {
                num_queues: wanted.num_queues,
                queue_size: wanted.queue_size,
                ..shape
            },
            file,
        })
    }

    /// Gives the process the table of one that was lost.
    ///
    /// # Errors
    /// When the process refuses it.
    pub fn set_inflight(&mut self, inflight: &Inflight) -> Result<(), Error> {
        let fd = inflight.file.as_raw_fd();
        self.call("SET_INFLIGHT_FD", |f| {
            f.set_inflight_fd(&inflight.shape, fd)
        })
    }

    /// Starts one queue.
    ///
    /// # Errors
    /// When the process refuses it.
    pub fn start_queue(&mut self, start: &QueueStart<'_>) -> Result<(), Error> {
        let QueueSetup { index, size, .. } = start.setup;
        let step = |message: &str| format!("queue {index}: {message}");
        let user = |address: u64| {
            address.checked_add(USER_ADDRESS_OFFSET).ok_or_else(|| {
                Error::device(&self.id, step("SET_VRING_ADDR"), "no such guest address")
            })
        };
        let addresses = VringConfigData {
            queue_max_size: self.queue_size,
            queue_size: size,
            flags: 0,
            desc_table_addr: user(start.setup.descriptors)?,
            used_ring_addr: user(start.setup.device)?,
            avail_ring_addr: user(start.setup.driver)?,
            log_addr: None,
        };
        self.call(&step("SET_VRING_NUM"), |f| f.set_vring_num(index, size))?;
        self.call(&step("SET_VRING_BASE"), |f| {
            f.set_vring_base(index, start.base)
        })?;
        self.call(&step("SET_VRING_ADDR"), |f| {
            f.set_vring_addr(index, &addresses)
        })?;
        self.call(&step("SET_VRING_CALL"), |f| {
            f.set_vring_call(index, start.call)
        })?;
        // In this order: a ring works once it is both. Some processes listen to the doorbell
        // from the second message on and forget what they hear of a ring that is not enabled
        // (crate vhost-user-backend 0.10), or read no other message for as long as the driver
        // has work for them (QEMU's vhost-user-blk).
        if self.offered & PROTOCOL_FEATURES != 0 {
            self.call(&step("SET_VRING_ENABLE"), |f| {
                f.set_vring_enable(index, true)
            })?;
        }
        self.call(&step("SET_VRING_KICK"), |f| {
            f.set_vring_kick(index, start.kick)
        })
    }

    /// Stops one queue; returns the available index to go on from.
    ///
    /// # Errors
    /// When the process does not answer properly.
    pub fn stop_queue(&mut self, index: usize) -> Result<u16, Error> {
        let step = format!("queue {index}: GET_VRING_BASE");
        let base = self.call(&step, |f| f.get_vring_base(index))?;
        Ok(base as u16)
    }

    /// The connection, for polling: anything to read outside a request means
    /// that the process has left or misbehaves.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// What is wrong with the connection, if it is readable outside a request: the
    /// next one would take what lies there for its answer.
    pub fn unasked(&self) -> Option<Error> {
        let why = self.trouble()?;
        Some(self.error("connection", why))
    }

    fn trouble(&self) -> Option<String> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let why = match rustix::net::recv(&self.socket, &mut [0; 1][..], flags) {
            Ok((1.., _)) => "the process sent what nobody asked for".to_owned(),
            Ok((0, _)) | Err(Errno::CONNRESET) => "the process has left".to_owned(),
            Err(Errno::AGAIN) => return None,
            Err(error) => error.to_string(),
        };
        Some(why)
    }

    /// The back-end channel, for polling.
    pub fn channel(&self) -> Option<RawFd> {
        self.channel
            .as_ref()
            .map(|channel| channel.socket.as_raw_fd())
    }

    /// Handles one message of the back-end channel; true when it announced a new
    /// configuration.
    ///
    /// # Errors
    /// When the message makes no sense.
    pub fn handle_channel(&mut self) -> Result<bool, Error> {
        if let Some(channel) = &mut self.channel {
            let guard = self.watchdog.guard(&channel.socket, DEADLINE)?;
            let result = channel.handler.handle_request();
            drop(guard);
            result.map_err(|e| self.error("back-end channel", e))?;
        }
        Ok(self.changes.0.swap(false, Ordering::Relaxed))
    }
}

//! What the virtio transport asks of the front end.

/// A queue as the driver set it up; addresses are guest-physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    /// Queue index.
    pub index: usize,
    /// Queue size.
    pub size: u16,
    /// Descriptor area.
    pub descriptors: u64,
    /// Driver area (available ring).
    pub driver: u64,
    /// Device area (used ring).
    pub device: u64,
}

/// A request. The requests of one device are carried out in order, and vCPU threads do
/// not wait for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransportRequest {
    /// The driver has set DRIVER_OK: start the enabled queues.
    Activate {
        /// Feature bits that the driver accepted.
        features: u64,
        /// The enabled queues.
        queues: Vec<QueueSetup>,
    },
    /// The driver has enabled one more queue: start it.
    StartQueue(QueueSetup),
    /// The driver resets a queue: stop it, then call
    /// [`super::VirtioPci::complete_queue_reset`].
    StopQueue(usize),
    /// The driver resets the device: stop all queues, then call
    /// [`super::VirtioPci::complete_reset`].
    Reset,
    /// The driver has written to the device's configuration space.
    WriteConfig {
        /// Offset in bytes.
        offset: usize,
        /// The bytes.
        data: Vec<u8>,
    },
}

/// Takes the requests of one device.
pub trait TransportRequestHandler: Send + Sync {
    /// Queues `request` without blocking.
    fn submit(&self, request: TransportRequest);
}

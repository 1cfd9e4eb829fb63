//! What the transport asks of the front end that drives a device's process.

/// A queue as the driver set it up; addresses are guest-physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    /// Queue index.
    pub index: usize,
    /// Ring size.
    pub size: u16,
    /// Descriptor area.
    pub descriptors: u64,
    /// Driver area (available ring).
    pub driver: u64,
    /// Device area (used ring).
    pub device: u64,
}

/// What is to be done. Requests of one device are carried out in order; none of
/// them is waited for on a vCPU's thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// DRIVER_OK.
    Start {
        /// Feature bits that the driver accepted.
        features: u64,
        /// The queues to start.
        queues: Vec<QueueSetup>,
    },
    /// Start one more queue.
    StartQueue(QueueSetup),
    /// Stop a queue, then call [`super::VirtioPci::queue_stopped`].
    StopQueue(usize),
    /// Stop everything, then call [`super::VirtioPci::stopped`].
    Stop,
    /// The driver wrote to the device's configuration space.
    WriteConfig {
        /// Offset in bytes.
        offset: usize,
        /// The bytes.
        data: Vec<u8>,
    },
}

/// Takes requests; never blocks.
pub trait Backend: Send + Sync {
    /// Queues `request`.
    fn request(&self, request: Request);
}

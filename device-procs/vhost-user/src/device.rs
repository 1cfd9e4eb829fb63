//! What a device implements.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use device_core::Poller;

use crate::{ConfigSpace, Error, GuestMemory, Ring};

/// Largest ring size of every device: QEMU's virtio-mmio lets the driver use rings of this
/// size for any device.
pub const QUEUE_SIZE: u16 = 1024;

/// What a device offers to the front end.
pub struct DeviceProperties {
    /// The program's name, for the sandbox's messages.
    pub name: &'static str,
    /// The device's own feature bits; this crate adds those of the transport.
    pub features: u64,
    /// For each queue, the index of the worker thread that serves it.
    pub queues: Vec<usize>,
    /// Largest ring size, a power of two.
    pub queue_size: u16,
    /// The configuration space.
    pub config: ConfigSpace,
    /// Whether the device offers an in-flight table (INFLIGHT_SHMFD). With it, each request
    /// is completed exactly once even if the process dies. Without it, the next process
    /// resumes from the used index.
    pub inflight: bool,
    /// How long a worker polls for more work before it sleeps, if polling pays; zero turns
    /// polling off.
    pub poll_time: Duration,
}

/// The part of a device that one worker thread runs. A device with several workers
/// (multi-queue) has one `Device` for each; they share what they must.
///
/// All methods run under the worker's lock and must not block for long: the control thread
/// waits for the lock to stop a ring.
pub trait Device: Send {
    /// Registers the device's own descriptors (a tap, a terminal), once, before the first
    /// front end connects.
    ///
    /// # Errors
    /// An error ends the process.
    fn register_sources(&mut self, _poller: &Poller) -> std::io::Result<()> {
        Ok(())
    }

    /// The driver's feature bits; called before its rings start, and again after a reset.
    fn set_features(&mut self, _features: u64) {}

    /// A front end has connected on `socket`. Work that may continue after the death of
    /// this process must keep the socket open, for a front end assumes that all work has
    /// ended when the socket is closed.
    fn frontend_connected(&mut self, _socket: BorrowedFd<'_>) {}

    /// `queue` is about to start. While no queue of the device ran, another process may
    /// have used the same disk or descriptor.
    ///
    /// # Errors
    /// The queue does not start.
    fn start_queue(&mut self, _queue: usize) -> std::io::Result<()> {
        Ok(())
    }

    /// `queue` has stopped, or failed to start after [`Device::start_queue`].
    fn stop_queue(&mut self, _queue: usize) {}

    /// There may be new buffers in `queue`. Takes requests with [`Ring::pop`] until there
    /// are none, or until the device must wait for one of its own sources.
    fn process_queue(&mut self, queue: usize, cx: &mut DeviceContext<'_>);

    /// A registered source is ready. Sources are edge-triggered: the device uses the source
    /// until it would block.
    fn handle_event(&mut self, _token: u64, _cx: &mut DeviceContext<'_>) {}

    /// Completes finished requests, if possible without a system call; returns whether
    /// there were any. Called repeatedly while the worker polls.
    fn poll(&mut self, _cx: &mut DeviceContext<'_>) -> bool {
        false
    }

    /// Completes every request of `queue` that is in flight. Afterwards the device touches
    /// neither the ring nor the buffers of `queue` until the next
    /// [`Device::process_queue`]. A device that completes every request before
    /// [`Device::process_queue`] returns has nothing to do here.
    fn drain_queue(&mut self, _queue: usize, _cx: &mut DeviceContext<'_>) {}

    /// The driver writes to the configuration space.
    ///
    /// # Errors
    /// The device has no writable field there, or not of this size.
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), Error> {
        let size = data.len();
        Err(Error::ConfigRange { offset, size })
    }

    /// The front end has disconnected; its rings have stopped and its memory is unmapped.
    fn frontend_disconnected(&mut self) {}
}

/// What a [`Device`] works with during one call.
pub struct DeviceContext<'a> {
    pub(crate) rings: &'a mut [Option<Ring>],
    /// Guest memory, which does not change during the call.
    pub memory: &'a GuestMemory,
    /// Where the device registers its own descriptors.
    pub poller: &'a Poller,
}

impl DeviceContext<'_> {
    /// The ring of `queue`, if this worker serves it and it is running.
    pub fn ring(&mut self, queue: usize) -> Option<&mut Ring> {
        self.rings
            .get_mut(queue)?
            .as_mut()
            .filter(|ring| ring.is_active())
    }

    /// Lets the device pop another batch of requests from every ring.
    pub(crate) fn refill_budgets(&mut self) {
        self.rings
            .iter_mut()
            .flatten()
            .for_each(Ring::refill_budget);
    }
}

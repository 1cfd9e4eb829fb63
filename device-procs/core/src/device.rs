//! What a device is to the core.

use std::os::fd::BorrowedFd;

use crate::{ConfigSpace, Error, GuestMemory, Poller, Ring};

/// Largest ring of every device here: QEMU's virtio-mmio offers rings of this size
/// whatever the device.
pub const QUEUE_SIZE: u16 = 1024;

/// What a device is, apart from how it moves data.
pub struct DeviceProperties {
    /// The program's name, for logs and errors.
    pub name: &'static str,
    /// The device's own feature bits; the core adds the transport's.
    pub features: u64,
    /// For each queue, the index of the worker thread that serves it.
    pub queues: Vec<usize>,
    /// Largest ring size, a power of two.
    pub queue_size: u16,
    /// The configuration space.
    pub config: ConfigSpace,
    /// Whether the front end may keep a table of what is in flight, so that each request
    /// is completed exactly once over the death of the process. Without, a successor
    /// goes on at the used index.
    pub inflight: bool,
    /// For how long at most a worker looks for more work before it sleeps, if that
    /// pays; zero: not at all.
    pub poll: std::time::Duration,
}

/// A device as one worker thread drives it. A device with several workers
/// (multi-queue) is several of these that share what they must.
///
/// All methods run under the worker's lock and never block for long: a stop
/// waits for the method in progress and for nothing else.
pub trait Device: Send {
    /// Registers the device's own descriptors (a tap, a terminal) once, before
    /// the first front end.
    ///
    /// # Errors
    /// Ends the process.
    fn register_sources(&mut self, _poller: &Poller) -> std::io::Result<()> {
        Ok(())
    }

    /// The driver's feature bits, before its rings start and again after a
    /// reset.
    fn set_features(&mut self, _features: u64) {}

    /// A front end has come, on this socket. Work that goes on after the process's death
    /// must keep it open: whoever finds it closed takes the process's work for ended.
    fn frontend_connected(&mut self, _socket: BorrowedFd<'_>) {}

    /// `queue` is about to start. While no queue of the device ran, another process may
    /// have worked on the same medium.
    ///
    /// # Errors
    /// Fails the start.
    fn start_queue(&mut self, _queue: usize) -> std::io::Result<()> {
        Ok(())
    }

    /// `queue` has stopped, or its start has failed after [`Device::start_queue`].
    fn stop_queue(&mut self, _queue: usize) {}

    /// There may be new buffers in `queue`. Works until [`Ring::pop`] has none
    /// left, or until something else holds it up that a source will report.
    fn process_queue(&mut self, queue: usize, cx: &mut DeviceContext<'_>);

    /// A registered source is ready. Edge-triggered: works until it would block.
    fn handle_event(&mut self, _token: u64, _cx: &mut DeviceContext<'_>) {}

    /// Completes what is done, without a system call if it can; returns whether there
    /// was anything. Called again and again while a worker polls.
    fn poll(&mut self, _cx: &mut DeviceContext<'_>) -> bool {
        false
    }

    /// Completes every request of `queue` that is in flight: after this the device
    /// touches neither the ring nor the buffers of `queue` until it is kicked
    /// again. A device that completes what it takes within [`Device::process_queue`]
    /// has nothing to do.
    fn drain_queue(&mut self, _queue: usize, _cx: &mut DeviceContext<'_>) {}

    /// The driver writes to the configuration space.
    ///
    /// # Errors
    /// When the device has no such writable field.
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), Error> {
        Err(Error::ConfigRange {
            offset,
            size: data.len(),
        })
    }

    /// The front end has left; its rings are gone.
    fn frontend_disconnected(&mut self) {}
}

/// What a device works on.
pub struct DeviceContext<'a> {
    pub(crate) rings: &'a mut [Option<Ring>],
    /// Guest memory as it is for the length of this call.
    pub memory: &'a GuestMemory,
    /// Where the device's own descriptors are registered.
    pub poller: &'a Poller,
}

impl DeviceContext<'_> {
    /// The ring of `queue`, if it is this worker's and runs.
    pub fn ring(&mut self, queue: usize) -> Option<&mut Ring> {
        self.rings
            .get_mut(queue)?
            .as_mut()
            .filter(|ring| ring.is_running())
    }
}

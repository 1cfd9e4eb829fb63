//! INTx, for firmware and drivers without MSI-X: the runner itself consumes the
//! interrupts of a device and drives its pin. This is the only place where the runner
//! takes part in I/O. Drivers that need performance use MSI-X.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use vmm_sys_util::eventfd::EventFd;

use crate::Error;
use crate::eventfd::borrow;
use crate::layout::{INTX_COUNT, INTX_FIRST};
use crate::vm::irq::{Gsi, IrqRouting};

/// Is called when an eventfd becomes readable.
pub trait IntxHandler: Send + Sync {
    /// `source` is the number that was given to [`Intx::watch`].
    fn notified(&self, source: usize);
}

/// The INTx pins, and the thread that watches the eventfds.
pub struct Intx {
    irq_routing: Arc<dyn IrqRouting>,
    epoll: OwnedFd,
    state: Mutex<IntxState>,
}

#[derive(Default)]
struct IntxState {
    /// For each pin, a bit for each device that asserts it.
    pins: [u32; INTX_COUNT as usize],
    watched: HashMap<u64, (Weak<dyn IntxHandler>, usize)>,
}

impl Intx {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the epoll instance or the thread cannot be created.
    pub fn start(irq_routing: Arc<dyn IrqRouting>) -> Result<Arc<Self>, Error> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|e| Error::io("epoll_create")(e.into()))?;
        let intx = Arc::new(Intx {
            irq_routing,
            epoll,
            state: Mutex::default(),
        });
        let thread = Arc::clone(&intx);
        std::thread::Builder::new()
            .name("intx".into())
            .spawn(move || thread.run())
            .map_err(Error::io("starting the INTx thread"))?;
        Ok(intx)
    }

    fn lock(&self) -> MutexGuard<'_, IntxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The I/O APIC input of the INTA pin of PCI slot `slot`.
    pub fn line(slot: u8) -> Gsi {
        INTX_FIRST + u32::from(slot) % INTX_COUNT
    }

    /// Device number `device` in PCI slot `slot` asserts its pin (`level`) or deasserts it.
    pub fn set(&self, device: usize, slot: u8, level: bool) {
        let gsi = Self::line(slot);
        let mut state = self.lock();
        let pin = &mut state.pins[(gsi - INTX_FIRST) as usize];
        let before = *pin != 0;
        *pin = if level {
            *pin | 1 << device
        } else {
            *pin & !(1 << device)
        };
        let after = *pin != 0;
        if before != after
            && let Err(error) = self.irq_routing.set_line(gsi, after)
        {
            tracing::error!(slot, gsi, %error, "cannot set an INTx line");
        }
    }

    /// Calls `handler` with `source` whenever `fd` becomes readable.
    ///
    /// # Errors
    /// When epoll_ctl(2) fails.
    pub fn watch(
        &self,
        fd: &EventFd,
        handler: Weak<dyn IntxHandler>,
        source: usize,
    ) -> Result<(), Error> {
        let key = fd.as_raw_fd() as u64;
        self.lock().watched.insert(key, (handler, source));
        epoll::add(
            &self.epoll,
            borrow(fd),
            epoll::EventData::new_u64(key),
            epoll::EventFlags::IN,
        )
        .map_err(|e| Error::io("watching an interrupt")(e.into()))
    }

    /// Undoes [`Intx::watch`].
    ///
    /// # Errors
    /// When epoll_ctl(2) fails.
    pub fn unwatch(&self, fd: &EventFd) -> Result<(), Error> {
        self.lock().watched.remove(&(fd.as_raw_fd() as u64));
        epoll::delete(&self.epoll, borrow(fd))
            .map_err(|e| Error::io("unwatching an interrupt")(e.into()))
    }

    fn run(&self) {
        loop {
            let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "INTx stops: epoll_wait failed");
                    return;
                }
            }
            for event in &events {
                let watched = self.lock().watched.get(&event.data.u64()).cloned();
                if let Some((handler, source)) = watched
                    && let Some(handler) = handler.upgrade()
                {
                    handler.notified(source);
                }
            }
        }
    }
}

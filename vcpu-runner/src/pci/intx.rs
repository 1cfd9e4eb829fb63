//! INTx: for firmware and drivers without MSI-X, the runner itself takes a
//! device's notifications and drives the pin. This is the only place where it
//! sees an I/O at all, and no driver that matters comes here.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use vmm_sys_util::eventfd::EventFd;

use crate::Error;
use crate::eventfd::borrow;
use crate::layout::{INTX_COUNT, INTX_FIRST};
use crate::vm::irq::{Gsi, Interrupts};

/// Who takes notifications.
pub trait Sink: Send + Sync {
    /// `source` (the number given to [`Intx::watch`]) notifies.
    fn notified(&self, source: usize);
}

/// The pins and the thread that watches.
pub struct Intx {
    interrupts: Arc<dyn Interrupts>,
    epoll: OwnedFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// For each pin, the devices (bits) that pull it.
    pins: [u32; INTX_COUNT as usize],
    watched: HashMap<u64, (Weak<dyn Sink>, usize)>,
}

impl Intx {
    /// Starts the watching thread.
    ///
    /// # Errors
    /// When there are no descriptors or threads left.
    pub fn start(interrupts: Arc<dyn Interrupts>) -> Result<Arc<Self>, Error> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|e| Error::io("epoll_create")(e.into()))?;
        let intx = Arc::new(Intx {
            interrupts,
            epoll,
            state: Mutex::default(),
        });
        let watcher = Arc::clone(&intx);
        std::thread::Builder::new()
            .name("intx".into())
            .spawn(move || watcher.watch_forever())
            .map_err(Error::io("starting the INTx thread"))?;
        Ok(intx)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The I/O APIC input of the pin of a device in `slot`.
    pub fn line(slot: u8) -> Gsi {
        INTX_FIRST + u32::from(slot) % INTX_COUNT
    }

    /// Device number `device` in `slot` pulls its pin, or lets go.
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
            && let Err(error) = self.interrupts.set_line(gsi, after)
        {
            tracing::error!("{error}");
        }
    }

    /// Passes notifications of `fd` to `sink` as `source` from now on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn watch(&self, fd: &EventFd, sink: Weak<dyn Sink>, source: usize) -> Result<(), Error> {
        let token = fd.as_raw_fd() as u64;
        self.lock().watched.insert(token, (sink, source));
        epoll::add(
            &self.epoll,
            borrow(fd),
            epoll::EventData::new_u64(token),
            epoll::EventFlags::IN,
        )
        .map_err(|e| Error::io("watching an interrupt")(e.into()))
    }

    /// Ends [`Intx::watch`].
    pub fn unwatch(&self, fd: &EventFd) {
        self.lock().watched.remove(&(fd.as_raw_fd() as u64));
        if let Err(error) = epoll::delete(&self.epoll, borrow(fd)) {
            tracing::error!("unwatching an interrupt: {error}");
        }
    }

    fn watch_forever(&self) {
        loop {
            let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!("INTx: epoll_wait: {error}");
                    return;
                }
            }
            for event in &events {
                let watched = self.lock().watched.get(&event.data.u64()).cloned();
                if let Some((sink, source)) = watched
                    && let Some(sink) = sink.upgrade()
                {
                    sink.notified(source);
                }
            }
        }
    }
}

//! SIGTERM and the other termination signals stop the machine in order.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outrigger_cli::signals;
use outrigger_protocol::exit;

const REASON: &str = "stopped by a signal";

/// Blocks the termination signals in this thread and all threads that it creates.
pub fn block() {
    signals::block(&signals::termination_set());
}

/// Stops the machine for the given reason.
type StopMachine = Box<dyn Fn(&'static str) + Send>;

/// The thread that waits for a termination signal. Before the machine is set up, which may
/// wait for other processes for seconds, a signal ends the process.
#[derive(Clone)]
pub struct SignalThread(Arc<Mutex<Option<StopMachine>>>);

impl SignalThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the thread cannot be created.
    pub fn start() -> io::Result<Self> {
        let handle = SignalThread(Arc::default());
        let this = handle.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                let set = signals::termination_set();
                loop {
                    signals::wait(&set);
                    // The lock is held to the end of the process, so that no machine starts
                    // meanwhile and leaves something behind.
                    match &*this.lock() {
                        Some(stop) => stop(REASON),
                        None => {
                            tracing::info!("{REASON}");
                            std::process::exit(exit::POWERED_OFF.into())
                        }
                    }
                }
            })?;
        Ok(handle)
    }

    /// The machine is set up: from now on a signal calls `stop`.
    pub fn set_stop(&self, stop: impl Fn(&'static str) + Send + 'static) {
        *self.lock() = Some(Box::new(stop));
    }

    fn lock(&self) -> MutexGuard<'_, Option<StopMachine>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Raises the soft limit of open files to the hard limit. Two eventfds for each queue of
/// up to 32 devices can be more than the usual 1024.
pub fn raise_file_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both calls access `limit` only. If they fail, the limit stays as it is.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

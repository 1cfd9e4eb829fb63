//! SIGTERM and its relatives end the machine in order.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outrigger_cli::signals;
use outrigger_protocol::exit;

const REASON: &str = "stopped by a signal";

/// Blocks the signals that end a program, in this thread and all that it makes.
pub fn block() {
    signals::block(&signals::termination_set());
}

/// Stops a machine, for the reason given.
type Stop = Box<dyn Fn(&'static str) + Send>;

/// What the thread that waits for signals does when one comes: until there is a
/// machine, it ends the process, for the set-up may wait for others for seconds.
#[derive(Clone)]
pub struct Watch(Arc<Mutex<Option<Stop>>>);

impl Watch {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there are no threads left.
    pub fn start() -> io::Result<Self> {
        let watch = Watch(Arc::default());
        let this = watch.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                let set = signals::termination_set();
                loop {
                    signals::wait(&set);
                    // Held to the end of the process, so that no machine comes up
                    // meanwhile that leaves something behind.
                    match &*this.lock() {
                        Some(stop) => stop(REASON),
                        None => {
                            tracing::info!("{REASON}");
                            std::process::exit(exit::POWERED_OFF.into())
                        }
                    }
                }
            })?;
        Ok(watch)
    }

    /// There is a machine: from now on `stop` is called.
    pub fn hand_over(&self, stop: impl Fn(&'static str) + Send + 'static) {
        *self.lock() = Some(Box::new(stop));
    }

    fn lock(&self) -> MutexGuard<'_, Option<Stop>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Eventfds and irqfds: two for each queue of up to 32 devices are more than the
/// usual soft limit of 1024 open files.
pub fn raise_file_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both calls work on `limit` alone; a refusal leaves what there was.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

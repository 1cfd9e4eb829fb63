//! SIGTERM, SIGHUP and SIGINT end a device process at once, but between two batches: no
//! request is left half done.

use std::sync::{Mutex, PoisonError};

use outrigger_cli::signals;

use crate::process::spawn_thread;

/// Restores what the program changed outside itself, such as a terminal's mode.
pub type Restore = Box<dyn FnOnce() + Send>;

static RESTORE: Mutex<Option<Restore>> = Mutex::new(None);

/// Runs the [`Restore`] of [`exit_on_signal`], the first time that it is called.
pub fn restore() {
    let restore = RESTORE
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if let Some(restore) = restore {
        restore();
    }
}

/// Restores what the program changed, and ends the process with exit code 0.
pub fn exit() -> ! {
    restore();
    std::process::exit(0)
}

/// Blocks the signals that end the program, in this thread and those that it starts from
/// now on. To be called before the first of them: a thread that does not block a signal
/// is ended by it, and the process with it.
pub fn block() -> libc::sigset_t {
    let set = signals::termination_set();
    signals::block(&set);
    set
}

/// Starts a thread that waits for one of `set`, the signals that [`block`] returned, and
/// then calls `stop`. `stop` brings the device to rest and calls [`exit`].
///
/// # Errors
/// The thread cannot be started.
pub fn exit_on_signal(
    set: libc::sigset_t,
    restore: Option<Restore>,
    stop: impl FnOnce() + Send + 'static,
) -> anyhow::Result<()> {
    *RESTORE.lock().unwrap_or_else(PoisonError::into_inner) = restore;
    spawn_thread("signals", move || {
        signals::wait(&set);
        stop();
    })
}

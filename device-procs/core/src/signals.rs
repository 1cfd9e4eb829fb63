//! SIGTERM and its relatives end a device program at once, but between two
//! batches: no request is left half done.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use outrigger_cli::signals;

use crate::worker::Worker;

/// How to put right what the program changed outside itself.
pub type Restore = Box<dyn FnOnce() + Send>;

static RESTORE: Mutex<Option<Restore>> = Mutex::new(None);

/// Runs what [`exit_on_signal`] was given, once.
pub fn finish() {
    let restore = RESTORE
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if let Some(restore) = restore {
        restore();
    }
}

/// Blocks the signals that end the program, in this thread and those that it
/// makes from now on. To be called before the first: a thread that does not
/// block a signal is ended by it, and the process with it.
pub fn block() -> libc::sigset_t {
    let set = signals::termination_set();
    signals::block(&set);
    set
}

/// Starts a thread that waits for the signals that [`block`] returned.
///
/// # Errors
/// When the thread cannot be started.
pub fn exit_on_signal(
    set: libc::sigset_t,
    workers: Arc<[Worker]>,
    restore: Option<Restore>,
) -> anyhow::Result<()> {
    *RESTORE.lock().unwrap_or_else(PoisonError::into_inner) = restore;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            signals::wait(&set);
            leave(&workers)
        })
        .context("starting the signal thread")?;
    Ok(())
}

fn leave(workers: &[Worker]) -> ! {
    // Nested, so that all workers stand still when the process ends.
    match workers.split_first() {
        Some((first, rest)) => first.control(|state, poller| {
            state.quiesce(poller);
            leave(rest)
        }),
        None => {
            finish();
            std::process::exit(0)
        }
    }
}

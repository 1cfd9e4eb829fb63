//! SIGTERM and its relatives end a device program at once, but between two
//! batches: no request is left half done.

use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;

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
/// makes from now on, and starts a thread that waits for them.
///
/// SIGINT counts only if it was not ignored at the start: a launcher that
/// shares its terminal with us handles Ctrl-C itself and ends us by SIGTERM.
///
/// # Errors
/// When the thread cannot be started.
pub fn exit_on_signal(workers: Arc<[Worker]>, restore: Option<Restore>) -> anyhow::Result<()> {
    *RESTORE.lock().unwrap_or_else(PoisonError::into_inner) = restore;
    let set = signal_set();
    // SAFETY: `set` is initialised, and the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut signal = 0;
            // SAFETY: both point to valid memory for the length of the call.
            while unsafe { libc::sigwait(&set, &mut signal) } != 0 {}
            leave(&workers)
        })
        .context("starting the signal thread")?;
    Ok(())
}

fn leave(workers: &[Worker]) -> ! {
    // Nested, so that all workers stand still when the process ends.
    match workers.split_first() {
        Some((first, rest)) => first.control(|_, _| leave(rest)),
        None => {
            finish();
            std::process::exit(0)
        }
    }
}

fn signal_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, the others change it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
        libc::sigaddset(set.as_mut_ptr(), libc::SIGHUP);
        if !is_ignored(libc::SIGINT) {
            libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
        }
        set.assume_init()
    }
}

fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: asks only; on success `action` is initialised.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

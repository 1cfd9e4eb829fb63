//! Signals that end a program.

use std::mem::MaybeUninit;

/// Whether `signal` was ignored when the program started: a launcher that
/// handles Ctrl-C itself starts its children so.
pub fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: asks only; on success `action` is initialised.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// The set of signals that end a program in order: SIGTERM, SIGHUP, and SIGINT
/// unless it was ignored at the start.
pub fn termination_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, sigaddset changes it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT] {
            if signal != libc::SIGINT || !is_ignored(signal) {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
        }
        set.assume_init()
    }
}

/// Blocks `set` in this thread and those that it makes from now on.
pub fn block(set: &libc::sigset_t) {
    // SAFETY: the set is initialised, and the old mask is not asked for; the call
    // fails only for an unknown first argument.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set, std::ptr::null_mut()) };
}

/// Waits for one of `set`, which must be blocked.
pub fn wait(set: &libc::sigset_t) -> libc::c_int {
    let mut signal = 0;
    // SAFETY: both point to valid memory for the length of the call.
    while unsafe { libc::sigwait(set, &mut signal) } != 0 {}
    signal
}

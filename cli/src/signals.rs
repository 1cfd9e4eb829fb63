//! The signals that end a program.

use std::mem::MaybeUninit;

/// Whether `signal` was ignored when the program started. A launcher that handles Ctrl-C
/// itself starts its children with SIGINT ignored.
pub fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action, sigaction(2) only reads the present one, and it
    // initialises `action` when it succeeds.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// Returns the signals on which a program shuts down: SIGTERM, SIGHUP, and SIGINT unless it
/// was ignored at the start.
pub fn termination_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set before sigaddset and assume_init use it.
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

/// Blocks `set` in this thread and in the threads that it starts from now on.
pub fn block(set: &libc::sigset_t) {
    // SAFETY: `set` is initialised and the old mask is not requested. The call fails only
    // for an unknown first argument, so its result is not needed.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set, std::ptr::null_mut()) };
}

/// Waits for one of the signals in `set`, all of which must be blocked, and returns it.
pub fn wait(set: &libc::sigset_t) -> libc::c_int {
    let mut signal = 0;
    // SAFETY: both references are valid for the length of the call.
    while unsafe { libc::sigwait(set, &mut signal) } != 0 {}
    signal
}

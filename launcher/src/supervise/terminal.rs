//! The terminal that we were started in. A console makes it the guest's; one that is
//! killed cannot give it back.

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// The terminal's mode as it was at the start.
pub struct Terminal(Termios);

impl Terminal {
    /// Standard input, if it is a terminal.
    pub fn save() -> Option<Self> {
        let stdin = rustix::stdio::stdin();
        if !isatty(stdin) {
            return None;
        }
        // From the background, the terminal would stop us for changing its mode.
        // SAFETY: all of it is initialised before it is used.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGTTOU);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        }
        tcgetattr(stdin).ok().map(Terminal)
    }

    /// Makes it what it was.
    pub fn restore(&self) {
        // Nobody is left to be told.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}

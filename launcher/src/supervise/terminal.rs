//! The mode of the terminal that the launcher was started in. A console process puts it into
//! raw mode, and cannot restore it if it is killed.

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// The mode that the terminal had when the launcher started.
pub struct SavedTerminal(Termios);

impl SavedTerminal {
    /// Saves the mode, if standard input is a terminal.
    pub fn save() -> Option<Self> {
        let stdin = rustix::stdio::stdin();
        if !isatty(stdin) {
            return None;
        }
        // A background process that changes the mode is stopped by SIGTTOU, unless it blocks
        // the signal.
        // SAFETY: sigemptyset initialises the set before it is used.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGTTOU);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        }
        tcgetattr(stdin).ok().map(SavedTerminal)
    }

    /// Restores the mode.
    pub fn restore(&self) {
        // Fails if the terminal was closed; then its mode no longer matters.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}

//! SIGTERM and its relatives end the machine in order.

use std::io;

use outrigger_cli::signals;

/// Blocks the signals that end a program, in this thread and all that it makes.
pub fn block() {
    signals::block(&signals::ending());
}

/// Starts the thread that waits for one of them and calls `stop`.
///
/// # Errors
/// When there are no threads left.
pub fn start(stop: impl Fn(&'static str) + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let set = signals::ending();
            loop {
                signals::wait(&set);
                stop("stopped by a signal");
            }
        })?;
    Ok(())
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

//! Unix sockets that a program listens on.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// How often a path that nobody serves is tried again.
const RETRY: Duration = Duration::from_millis(5);

/// Bytes of sockaddr_un's path, less the one that ends it.
const LONGEST: usize = 107;

/// Binds `path`. A socket that a dead process left behind is replaced; one that
/// somebody serves is not.
///
/// # Errors
/// bind(2)'s own; a path that is too long (unix(7)), that somebody serves, that names
/// a file of another kind or lies in no directory is called so.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if path.as_os_str().len() > LONGEST {
        let why = format!("longer than the {LONGEST} bytes that a socket's path may have");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            if !path.symlink_metadata()?.file_type().is_socket() {
                return Err(io::Error::new(
                    e.kind(),
                    "a file that is no socket is there",
                ));
            }
            match UnixStream::connect(path) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                _ => {
                    let why = "a process listens there already";
                    return Err(io::Error::new(e.kind(), why));
                }
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(io::Error::new(e.kind(), "its directory does not exist"))
        }
        result => result,
    }
}

/// Connects to `path`. Until `deadline`, waits for somebody to serve it, unless
/// there is something that nobody can serve; without one, tries once.
///
/// # Errors
/// connect(2)'s own, or that `path` is no socket.
pub fn connect(path: &Path, deadline: Option<Instant>) -> io::Result<UnixStream> {
    loop {
        let error = match UnixStream::connect(path) {
            Err(error) => error,
            connected => return connected,
        };
        let Some(deadline) = deadline else {
            return Err(error);
        };
        // To connect(2) a file of another kind is a socket that nobody serves.
        if std::fs::metadata(path).is_ok_and(|there| !there.file_type().is_socket()) {
            return Err(io::Error::other("not a socket"));
        }
        if Instant::now() >= deadline {
            return Err(error);
        }
        std::thread::sleep(RETRY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = bind(&path).unwrap();
        assert!(bind(&path).is_err());
        drop(first);
        bind(&path).unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(bind(&file).is_err());
        assert_eq!(std::fs::read(&file).unwrap(), b"x");
        let long = bind(&dir.path().join("x".repeat(100))).unwrap_err();
        assert!(long.to_string().contains("107 bytes"), "{long}");
    }

    #[test]
    fn a_socket_is_waited_for_and_anything_else_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let wait = |time| connect(&path, Some(Instant::now() + time));
        let error = wait(Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        std::thread::scope(|scope| {
            let client = scope.spawn(|| wait(Duration::from_secs(30)).map(drop));
            let server = bind(&path).unwrap();
            server.accept().unwrap();
            client.join().unwrap().unwrap();
        });
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "x").unwrap();
        let error = wait(Duration::from_secs(30)).unwrap_err();
        assert_eq!(error.to_string(), "not a socket");
    }
}

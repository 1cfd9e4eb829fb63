//! Creating and connecting unix stream sockets.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::builder::{PathBufValueParser, TypedValueParser};
use rustix::fs::{
    AtFlags, FlockOperation, Mode, OFlags, fcntl_getfl, fcntl_setfl, flock, openat, statat,
    unlinkat,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

/// Time between two attempts to connect or to lock a directory.
const RETRY: Duration = Duration::from_millis(5);

/// Size of the path in `struct sockaddr_un`, without its terminating zero.
const MAX_PATH: usize = 107;

/// Returns `path` if it is a valid socket path: not empty, and short enough for `struct
/// sockaddr_un` (unix(7)).
///
/// # Errors
/// A message that says what is wrong with `path`.
pub fn socket_path(path: PathBuf) -> Result<PathBuf, String> {
    match path.as_os_str().len() {
        0 => Err("the socket path is empty: give a path".into()),
        1..=MAX_PATH => Ok(path),
        _ => Err(format!(
            "longer than the {MAX_PATH} bytes that a socket path may have: give a shorter path"
        )),
    }
}

/// Returns a clap value parser that checks an option with [`socket_path`].
pub fn path_parser() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(socket_path)
}

/// How long [`bind`] waits for another process that holds the lock of the directory.
const LOCK_DEADLINE: Duration = Duration::from_secs(5);

/// Creates a socket at `path` and listens on it. Replaces a socket on which no process
/// listens any more. If several processes call this for the same path at the same time, one
/// succeeds.
///
/// # Errors
/// A process listens at `path` already, another kind of file is there, its directory does not
/// exist, or bind(2) fails.
pub fn bind(path: &Path) -> io::Result<(UnixListener, BoundSocket)> {
    let (directory, name) = directory(path)?;
    // Checking for a listener and replacing the socket are two steps, and so are bind(2) and
    // listen(2).
    let _lock = lock(&directory)?;
    let listener = bind_locked(path)?;
    let bound = BoundSocket {
        identity: identity(&directory, &name)?,
        directory,
        name,
        kept: false,
    };
    Ok((listener, bound))
}

fn bind_locked(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            if !path.symlink_metadata()?.file_type().is_socket() {
                return Err(io::Error::new(
                    e.kind(),
                    "a file that is not a socket exists there",
                ));
            }
            if !matches!(try_connect(path), Err(Errno::CONNREFUSED)) {
                let why = "another process listens there already";
                return Err(io::Error::new(e.kind(), why));
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        result => result,
    }
}

/// The file of a listening socket. Dropping it removes the file, unless another socket is
/// there by now, so that a program that fails to start leaves no file behind. The file is
/// found through a descriptor of its directory, because a sandboxed process cannot resolve
/// paths.
#[must_use]
#[derive(Debug)]
pub struct BoundSocket {
    directory: OwnedFd,
    name: OsString,
    identity: (u64, u64),
    kept: bool,
}

impl BoundSocket {
    /// Leaves the file in place. The next process that binds the path replaces it.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        if !self.kept
            && identity(&self.directory, &self.name).is_ok_and(|there| there == self.identity)
        {
            // If this fails, the next process that binds the path replaces the file.
            let _ = unlinkat(&self.directory, &self.name, AtFlags::empty());
        }
    }
}

/// Returns device and inode number of the file `name` in `directory`.
fn identity(directory: &OwnedFd, name: &OsString) -> rustix::io::Result<(u64, u64)> {
    let there = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok((there.st_dev, there.st_ino))
}

/// Opens the directory of `path` (with O_PATH, open(2)) and returns it with the name of the
/// file in it.
///
/// # Errors
/// The directory does not exist, or `path` does not end with a file name.
pub fn directory(path: &Path) -> io::Result<(OwnedFd, OsString)> {
    let (Some(name), Some(parent)) = (path.file_name(), path.parent()) else {
        let why = "the path does not end with a file name";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(parent, flags, Mode::empty()).map_err(|e| match e {
        Errno::NOENT => io::Error::new(e.kind(), "its directory does not exist"),
        _ => e.into(),
    })?;
    Ok((directory, name.to_owned()))
}

/// Locks `directory` against other callers of [`bind`] until the returned descriptor is
/// closed. Returns `None` for a directory that this process may not read: it cannot be
/// locked.
fn lock(directory: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match openat(directory, ".", flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(Errno::ACCESS) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let deadline = Instant::now() + LOCK_DEADLINE;
    loop {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(directory)),
            Err(Errno::INTR) => {}
            Err(e @ Errno::WOULDBLOCK) if Instant::now() >= deadline => {
                let why = "another process holds the lock of its directory";
                return Err(io::Error::new(e.kind(), why));
            }
            Err(Errno::WOULDBLOCK) => std::thread::sleep(RETRY),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Connects to `path`. Until `deadline`, waits for a process to listen there and to have room
/// in its backlog; without a deadline, tries once. A file that is not a socket is an error at
/// once.
///
/// # Errors
/// `path` is not a socket, the listening process does not accept connections, or connect(2)
/// fails.
pub fn connect(path: &Path, deadline: Option<Instant>) -> io::Result<UnixStream> {
    loop {
        let error = match try_connect(path) {
            Ok(stream) => return Ok(stream),
            Err(Errno::AGAIN) => {
                let why = "a process listens there, but does not accept connections";
                io::Error::new(io::ErrorKind::WouldBlock, why)
            }
            Err(error) => error.into(),
        };
        let Some(deadline) = deadline else {
            return Err(error);
        };
        // connect(2) reports any other kind of file as a socket without a listener.
        if std::fs::metadata(path).is_ok_and(|there| !there.file_type().is_socket()) {
            return Err(io::Error::other("not a socket"));
        }
        if Instant::now() >= deadline {
            return Err(error);
        }
        std::thread::sleep(RETRY);
    }
}

/// Connects to `path` without waiting. A blocking connect(2) waits without limit when the
/// backlog of the listener is full; this one fails with EAGAIN (unix(7)).
fn try_connect(path: &Path) -> rustix::io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    // With fcntl(2), because the sandbox forbids the ioctl that the standard library uses.
    fcntl_setfl(&socket, fcntl_getfl(&socket)? - OFlags::NONBLOCK)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_one_with_a_listener_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (first, socket_file) = bind(&path).unwrap();
        socket_file.keep();
        assert!(bind(&path).is_err());
        drop(first);
        let second = bind(&path).unwrap();
        drop(second);
        assert!(!path.exists());
        // A socket that another process has put there is not removed.
        let third = bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        drop(third);
        assert!(path.exists());
        drop(other);
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(bind(&file).is_err());
        assert_eq!(std::fs::read(&file).unwrap(), b"x");
    }

    #[test]
    fn a_socket_path_must_not_be_empty_or_too_long() {
        assert!(socket_path(PathBuf::new()).is_err());
        assert!(socket_path("x".repeat(107).into()).is_ok());
        let long = socket_path("x".repeat(108).into()).unwrap_err();
        assert!(long.contains("107 bytes"), "{long}");
    }

    #[test]
    fn connect_waits_for_a_listener_but_not_at_another_kind_of_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let wait = |time| connect(&path, Some(Instant::now() + time));
        let error = wait(Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        std::thread::scope(|scope| {
            let client = scope.spawn(|| wait(Duration::from_secs(30)).map(drop));
            let (server, _socket_file) = bind(&path).unwrap();
            server.accept().unwrap();
            client.join().unwrap().unwrap();
        });
        std::fs::write(&path, "x").unwrap();
        let error = wait(Duration::from_secs(30)).unwrap_err();
        assert_eq!(error.to_string(), "not a socket");
    }

    #[test]
    fn connect_gives_up_on_a_listener_that_does_not_accept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let flags = SocketFlags::CLOEXEC;
        let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let wait = |time| connect(&path, Some(Instant::now() + time));
        let first = wait(Duration::from_secs(30)).unwrap();
        assert!(!fcntl_getfl(&first).unwrap().contains(OFlags::NONBLOCK));
        for error in [
            wait(Duration::from_millis(20)).unwrap_err(),
            connect(&path, None).unwrap_err(),
        ] {
            assert!(
                error.to_string().contains("does not accept connections"),
                "{error}"
            );
        }
        let error = bind(&path).unwrap_err();
        assert!(
            error.to_string().contains("listens there already"),
            "{error}"
        );
        // Once there is room in the backlog, the waiting connect succeeds.
        std::thread::scope(|scope| {
            let client = scope.spawn(|| wait(Duration::from_secs(30)).map(drop));
            rustix::net::accept(&listener).unwrap();
            client.join().unwrap().unwrap();
        });
    }

    #[test]
    fn of_many_that_replace_a_stale_socket_one_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for _ in 0..50 {
            // The socket of the previous round is stale now.
            let barrier = std::sync::Barrier::new(8);
            let bound: Vec<UnixListener> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8)
                    .map(|_| {
                        scope.spawn(|| {
                            barrier.wait();
                            let (listener, socket_file) = bind(&path)?;
                            socket_file.keep();
                            io::Result::Ok(listener)
                        })
                    })
                    .collect();
                let results = threads.into_iter().map(|thread| thread.join().unwrap());
                results.filter_map(Result::ok).collect()
            });
            assert_eq!(bound.len(), 1);
            let _client = connect(&path, None).unwrap();
            bound[0].set_nonblocking(true).unwrap();
            bound[0].accept().unwrap();
        }
    }
}

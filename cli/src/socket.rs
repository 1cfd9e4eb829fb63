//! Unix sockets that a program listens on or connects to.

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

/// How often a path that nobody serves is tried again.
const RETRY: Duration = Duration::from_millis(5);

/// Bytes of sockaddr_un's path, less the one that ends it.
const LONGEST: usize = 107;

/// A path that fits into `struct sockaddr_un` (unix(7)).
///
/// # Errors
/// When it does not.
pub fn socket_path(path: PathBuf) -> Result<PathBuf, String> {
    match path.as_os_str().len() {
        0 => Err("a socket's path is not empty".into()),
        1..=LONGEST => Ok(path),
        _ => {
            let why = format!("longer than the {LONGEST} bytes that a socket's path may have");
            Err(why)
        }
    }
}

/// [`socket_path`] for an option of the command line.
pub fn path_parser() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(socket_path)
}

/// How long somebody else may lock a directory that a socket is to be made in.
const LOCK_DEADLINE: Duration = Duration::from_secs(5);

/// Binds `path`. A socket that a dead process left behind is replaced; one that
/// somebody serves is not. Of several that try at the same time, one succeeds.
///
/// # Errors
/// bind(2)'s own; a path that somebody serves, that names
/// a file of another kind or lies in no directory is called so.
pub fn bind(path: &Path) -> io::Result<(UnixListener, BoundSocket)> {
    let (directory, name) = directory(path)?;
    // Looking and replacing are not one step, nor are bind(2) and listen(2).
    let _locked = lock(&directory)?;
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
                    "a file that is no socket is there",
                ));
            }
            if !matches!(try_connect(path), Err(Errno::CONNREFUSED)) {
                let why = "a process listens there already";
                return Err(io::Error::new(e.kind(), why));
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        result => result,
    }
}

/// A socket in the file system. Dropped, it is removed, if it is the same one still: a
/// start that fails leaves nothing behind. It is found by way of its directory, which was
/// opened while that was allowed.
#[must_use]
#[derive(Debug)]
pub struct BoundSocket {
    directory: OwnedFd,
    name: OsString,
    identity: (u64, u64),
    kept: bool,
}

impl BoundSocket {
    /// The socket stays, for whoever comes next to replace.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        if !self.kept
            && identity(&self.directory, &self.name).is_ok_and(|there| there == self.identity)
        {
            // One that stays behind is replaced by the next program.
            let _ = unlinkat(&self.directory, &self.name, AtFlags::empty());
        }
    }
}

/// Device and inode of what has this name.
fn identity(directory: &OwnedFd, name: &OsString) -> rustix::io::Result<(u64, u64)> {
    let there = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok((there.st_dev, there.st_ino))
}

/// The directory that `path` is in, opened (O_PATH in open(2)), and its name there.
///
/// # Errors
/// When there is no such directory, or `path` names no file.
pub fn directory(path: &Path) -> io::Result<(OwnedFd, OsString)> {
    let (Some(name), Some(parent)) = (path.file_name(), path.parent()) else {
        let why = "it names no file";
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

/// Keeps others who call [`bind`] out of `directory` until the descriptor is closed;
/// none for a directory that may be written to but not read.
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
                let why = "another process keeps its directory locked";
                return Err(io::Error::new(e.kind(), why));
            }
            Err(Errno::WOULDBLOCK) => std::thread::sleep(RETRY),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Connects to `path`. Until `deadline`, waits for somebody to serve it and to have
/// room for one more, unless there is something that nobody can serve; without a
/// deadline, tries once.
///
/// # Errors
/// connect(2)'s own, that `path` is no socket, or that nobody accepts there.
pub fn connect(path: &Path, deadline: Option<Instant>) -> io::Result<UnixStream> {
    loop {
        let error = match try_connect(path) {
            Ok(stream) => return Ok(stream),
            Err(Errno::AGAIN) => {
                let why = "a process listens there, but accepts nobody";
                io::Error::new(io::ErrorKind::WouldBlock, why)
            }
            Err(error) => error.into(),
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

/// Connects to `path` now or not at all. To std's connect(2) a listener that nobody
/// accepts from is one to wait for without end, once its queue is full; here that is
/// EAGAIN (unix(7)).
fn try_connect(path: &Path) -> rustix::io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    // As in `fd`: not by the ioctl of std, which the sandbox forbids.
    fcntl_setfl(&socket, fcntl_getfl(&socket)? - OFlags::NONBLOCK)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (first, unserved) = bind(&path).unwrap();
        unserved.keep();
        assert!(bind(&path).is_err());
        drop(first);
        let second = bind(&path).unwrap();
        drop(second);
        assert!(!path.exists());
        // What somebody else put there is not removed.
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
    fn a_path_of_a_socket_is_neither_empty_nor_too_long() {
        assert!(socket_path(PathBuf::new()).is_err());
        assert!(socket_path("x".repeat(107).into()).is_ok());
        let long = socket_path("x".repeat(108).into()).unwrap_err();
        assert!(long.contains("107 bytes"), "{long}");
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
            let (server, _unserved) = bind(&path).unwrap();
            server.accept().unwrap();
            client.join().unwrap().unwrap();
        });
        std::fs::write(&path, "x").unwrap();
        let error = wait(Duration::from_secs(30)).unwrap_err();
        assert_eq!(error.to_string(), "not a socket");
    }

    #[test]
    fn a_listener_that_accepts_nobody_is_not_waited_for_without_end() {
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
            assert!(error.to_string().contains("accepts nobody"), "{error}");
        }
        let error = bind(&path).unwrap_err();
        assert!(
            error.to_string().contains("listens there already"),
            "{error}"
        );
        // Once there is room, it is used.
        std::thread::scope(|scope| {
            let client = scope.spawn(|| wait(Duration::from_secs(30)).map(drop));
            rustix::net::accept(&listener).unwrap();
            client.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_stale_socket_is_replaced_by_one_of_many() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for _ in 0..50 {
            // What the round before left is stale now.
            let together = std::sync::Barrier::new(8);
            let bound: Vec<UnixListener> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8)
                    .map(|_| {
                        scope.spawn(|| {
                            together.wait();
                            let (listener, unserved) = bind(&path)?;
                            unserved.keep();
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

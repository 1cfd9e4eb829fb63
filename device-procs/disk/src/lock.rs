//! Image locks, compatible with QEMU's (block/file-posix.c, "raw_check_lock_bytes"), so that
//! two independent programs do not write to the same image.
//!
//! A program takes shared locks on single bytes of the image: on bytes from 100 on for each
//! permission that it uses, and on bytes from 200 on for each permission that it does not
//! share. Then it checks that no other program has locked the opposite bytes. The locks
//! belong to the open file description (F_OFD_SETLK in fcntl(2)): the kernel drops them when
//! the process ends, and they do not conflict with those of duplicate descriptors.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::image::SECTOR;

/// Lock byte of permission 0 that a program uses.
const USED_BASE: i64 = 100;
/// Lock byte of permission 0 that a program does not share.
const UNSHARED_BASE: i64 = 200;

/// QEMU's BLK_PERM_CONSISTENT_READ: reads data that no other program is changing.
const CONSISTENT_READ: i64 = 0;
/// BLK_PERM_WRITE.
const WRITE: i64 = 1;
/// BLK_PERM_RESIZE.
const RESIZE: i64 = 3;

/// How an image is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageAccess {
    /// It is read.
    Read,
    /// It is written, and its file does not grow.
    Write,
    /// It is written, and its file grows.
    Grow,
}

/// How long to wait for a lock whose holder cannot be found.
const UNKNOWN_HOLDER_TIMEOUT: Duration = Duration::from_secs(1);

/// Locks `file` as the disk of a VM: no other program may write to it.
///
/// The locks of a process that was killed remain for a moment, while the kernel dismantles
/// its io_uring. So this waits a little for a holder that cannot be found.
///
/// # Errors
/// Another program uses the image; the error names it if it is known. Or fcntl(2) fails.
pub fn take(file: &File, access: ImageAccess) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match try_take(file, access) {
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy
                    && start.elapsed() < UNKNOWN_HOLDER_TIMEOUT =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

/// As [`take`], without waiting. `ResourceBusy` if the holder cannot be found.
fn try_take(file: &File, access: ImageAccess) -> io::Result<()> {
    let used: &[i64] = match access {
        ImageAccess::Read => &[CONSISTENT_READ],
        // An incomplete last sector is completed when the guest writes to it.
        ImageAccess::Write if file.metadata()?.len() % SECTOR == 0 => &[CONSISTENT_READ, WRITE],
        ImageAccess::Write | ImageAccess::Grow => &[CONSISTENT_READ, WRITE, RESIZE],
    };
    for &permission in used {
        lock(file, USED_BASE + permission)?;
    }
    lock(file, UNSHARED_BASE + WRITE)?;

    // Every program locks first and checks then, so of two that start at the same time at
    // least one sees the other.
    for &permission in used {
        let why = match permission {
            WRITE => "does not let others write to it",
            RESIZE => "does not let others change its size",
            _ => "does not let others read it",
        };
        check(file, UNSHARED_BASE + permission, why)?;
    }
    check(file, USED_BASE + WRITE, "writes to it")
}

fn request(kind: libc::c_int, start: i64) -> libc::flock {
    // SAFETY: plain data, for which zeros are valid. (l_pid must be 0.)
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    request.l_type = kind as libc::c_short;
    request.l_whence = libc::SEEK_SET as libc::c_short;
    request.l_start = start;
    request.l_len = 1;
    request
}

fn fcntl(file: &File, command: libc::c_int, request: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: both commands take a `struct flock`, which `request` is.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut *request) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn lock(file: &File, start: i64) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, &mut request(libc::F_RDLCK, start)).map_err(|error| {
        // QEMU and we take shared locks only, so this is another kind of program.
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => locked(file, start, "has an exclusive lock"),
            _ => io::Error::new(
                error.kind(),
                format!("locking it: {error} (use --lock off to serve it without locks)"),
            ),
        }
    })
}

/// Checks that no other program holds a lock on byte `start`.
fn check(file: &File, start: i64, why: &str) -> io::Result<()> {
    let mut request = request(libc::F_WRLCK, start);
    fcntl(file, libc::F_OFD_GETLK, &mut request)?;
    if libc::c_int::from(request.l_type) == libc::F_UNLCK {
        return Ok(());
    }
    Err(locked(file, start, why))
}

fn locked(file: &File, start: i64, why: &str) -> io::Error {
    let (kind, holder) = match holder(file, start) {
        Some(holder) => (io::ErrorKind::WouldBlock, holder),
        None => (io::ErrorKind::ResourceBusy, "another process".to_owned()),
    };
    io::Error::new(kind, format!("it is locked: {holder} {why}"))
}

/// The process that holds a lock on byte `start` of `file`. /proc/locks does not tell the
/// owner of an OFD lock, but /proc/PID/fdinfo does (proc_pid_fdinfo(5)), for processes that
/// we may inspect.
fn holder(file: &File, start: i64) -> Option<String> {
    let metadata = file.metadata().ok()?;
    let (major, minor) = (libc::major(metadata.dev()), libc::minor(metadata.dev()));
    let image = format!("{major:02x}:{minor:02x}:{}", metadata.ino());
    std::fs::read_dir("/proc")
        .ok()?
        .flatten()
        .find_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            if pid == std::process::id() {
                return None;
            }
            let mut open = std::fs::read_dir(entry.path().join("fdinfo"))
                .ok()?
                .flatten();
            open.find(|info| {
                std::fs::read_to_string(info.path()).is_ok_and(|text| locks(&text, &image, start))
            })?;
            let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            let name = name.trim_end().replace(char::is_control, "?");
            Some(format!("process {pid} ({name})"))
        })
}

/// Whether the fdinfo of a descriptor has a lock on byte `start` of `image`, which is given
/// as `MAJOR:MINOR:INODE`:
/// `lock:  1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101`.
fn locks(fdinfo: &str, image: &str, start: i64) -> bool {
    let lines = fdinfo.lines().filter_map(|line| line.strip_prefix("lock:"));
    lines.map(str::split_whitespace).any(|fields| {
        let fields: Vec<&str> = fields.collect();
        let [.., of, first, last] = fields[..] else {
            return false;
        };
        let covers = last == "EOF" || last.parse().is_ok_and(|last: i64| last >= start);
        of == image && covers && first.parse().is_ok_and(|first: i64| first <= start)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::NamedTempFile;

    fn open(file: &NamedTempFile) -> File {
        File::options().read(true).write(true).open(file).unwrap()
    }

    #[test]
    fn readers_share_and_a_writer_does_not() {
        let image = NamedTempFile::new().unwrap();
        let (first, second, third) = (open(&image), open(&image), open(&image));
        take(&first, ImageAccess::Read).unwrap();
        take(&second, ImageAccess::Read).unwrap();
        let why = try_take(&third, ImageAccess::Write)
            .unwrap_err()
            .to_string();
        assert!(why.contains("locked"), "{why}");
        drop((first, second, third));

        let writer = open(&image);
        take(&writer, ImageAccess::Write).unwrap();
        assert!(try_take(&open(&image), ImageAccess::Write).is_err());
        assert!(try_take(&open(&image), ImageAccess::Read).is_err());
        // The lock belongs to the open file description, and lasts as long as that.
        let duplicate = writer.try_clone().unwrap();
        drop(writer);
        assert!(try_take(&open(&image), ImageAccess::Read).is_err());
        drop(duplicate);
        take(&open(&image), ImageAccess::Write).unwrap();
    }

    /// A file that ends within a sector may grow, which needs the permission.
    #[test]
    fn an_image_that_may_grow_takes_the_resize_lock() {
        let image = NamedTempFile::new().unwrap();
        for (len, access, grows) in [
            (1000, ImageAccess::Write, true),
            (1000, ImageAccess::Read, false),
            (1024, ImageAccess::Write, false),
            (1024, ImageAccess::Grow, true),
        ] {
            image.as_file().set_len(len).unwrap();
            let user = open(&image);
            take(&user, access).unwrap();
            let locked = check(&open(&image), USED_BASE + RESIZE, "").is_err();
            assert_eq!(locked, grows, "{len} bytes, {access:?}");
            drop(user);

            let other = open(&image);
            lock(&other, UNSHARED_BASE + RESIZE).unwrap();
            let refused = try_take(&open(&image), access).is_err();
            assert_eq!(refused, grows, "{len} bytes, {access:?}");
        }
    }

    #[test]
    fn a_lock_is_found_in_fdinfo() {
        let text =
            "pos:\t0\nflags:\t0100002\nlock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:12 100 101\n";
        assert!(locks(text, "fe:00:12", 100));
        assert!(locks(text, "fe:00:12", 101));
        assert!(!locks(text, "fe:00:12", 102));
        assert!(!locks(text, "fe:00:1", 100));
        assert!(!locks("lock:\n", "fe:00:12", 100));
    }
}

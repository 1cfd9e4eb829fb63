//! Image locks as QEMU takes them, so that two programs that do not know of each other
//! do not write to one image (QEMU, block/file-posix.c, "raw_check_lock_bytes").
//!
//! Who uses an image marks, with shared locks on single bytes of it, what it does
//! (from byte 100 on) and what it does not let others do (from byte 200 on); then it
//! looks whether anybody has marked the contrary. The locks belong to the open file
//! description (F_OFD_SETLK in fcntl(2)): they go when the process does, however that
//! may be, and do not conflict with those of its own duplicates.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::image::SECTOR;

/// First byte of what a user does.
const DOES: i64 = 100;
/// First byte of what a user keeps others from doing.
const FORBIDS: i64 = 200;

/// Reads data that makes sense, as against data in mid-change. (QEMU's consistent
/// read and write-unchanged are permissions 0 and 2.)
const READ: i64 = 0;
/// Writes.
const WRITE: i64 = 1;
/// Changes the size.
const RESIZE: i64 = 3;

/// What is to be done with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageAccess {
    /// Its bytes are read.
    Read,
    /// They are written, too, where they are.
    Write,
    /// They are written, and the file grows by it.
    Grow,
}

/// So long is waited for a holder that nobody knows.
const PATIENCE: Duration = Duration::from_secs(1);

/// Locks `file` as a disk of a machine: nobody else may write to it.
///
/// A process that was killed may hold its locks for a moment longer: the kernel takes its
/// io_uring apart when it is gone. So a holder that cannot be found is given some time.
///
/// # Errors
/// One line that says what somebody else does with the image, and who it is if that
/// can be known; or fcntl(2)'s.
pub fn take(file: &File, to: ImageAccess) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        match take_at_once(file, to) {
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy && begun.elapsed() < PATIENCE =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

/// As [`take`]; `ResourceBusy` is somebody whom we cannot find.
fn take_at_once(file: &File, to: ImageAccess) -> io::Result<()> {
    let does: &[i64] = match to {
        ImageAccess::Read => &[READ],
        // Its last sector is made whole once the guest writes there.
        ImageAccess::Write if file.metadata()?.len() % SECTOR == 0 => &[READ, WRITE],
        ImageAccess::Write | ImageAccess::Grow => &[READ, WRITE, RESIZE],
    };
    for &permission in does {
        lock(file, DOES + permission)?;
    }
    lock(file, FORBIDS + WRITE)?;

    // Everybody marks first and looks then, so of two who come at once at least one
    // sees the other.
    for &permission in does {
        let what = match permission {
            WRITE => "lets nobody else write to it",
            RESIZE => "lets nobody else change its size",
            _ => "lets nobody else read it",
        };
        look(file, FORBIDS + permission, what)?;
    }
    look(file, DOES + WRITE, "writes to it")
}

fn request(kind: libc::c_int, start: i64) -> libc::flock {
    // SAFETY: plain data, for which zeros are valid (and l_pid must be 0).
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    request.l_type = kind as libc::c_short;
    request.l_whence = libc::SEEK_SET as libc::c_short;
    request.l_start = start;
    request.l_len = 1;
    request
}

fn fcntl(file: &File, command: libc::c_int, request: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: both commands take a `struct flock`.
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
        // Nobody of QEMU's kin takes these bytes for itself alone.
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => taken(file, start, "has it for itself alone"),
            _ => io::Error::new(
                error.kind(),
                format!("locking it: {error} (--lock off does without)"),
            ),
        }
    })
}

fn look(file: &File, start: i64, what: &str) -> io::Result<()> {
    let mut request = request(libc::F_WRLCK, start);
    fcntl(file, libc::F_OFD_GETLK, &mut request)?;
    if libc::c_int::from(request.l_type) == libc::F_UNLCK {
        return Ok(());
    }
    Err(taken(file, start, what))
}

fn taken(file: &File, start: i64, what: &str) -> io::Error {
    let (kind, who) = match holder(file, start) {
        Some(who) => (io::ErrorKind::WouldBlock, who),
        None => (io::ErrorKind::ResourceBusy, "another process".to_owned()),
    };
    io::Error::new(kind, format!("it is locked: {who} {what}"))
}

/// Who holds a lock on byte `start` of `file`. /proc/locks does not tell whose an OFD
/// lock is; /proc/PID/fdinfo does (proc_pid_fdinfo(5)), of processes that we may look
/// into.
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

/// Whether a descriptor's fdinfo has a lock on byte `start` of `image`, which is
/// `MAJOR:MINOR:INODE`:
/// `lock:  1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101`.
fn locks(fdinfo: &str, image: &str, start: i64) -> bool {
    let lines = fdinfo.lines().filter_map(|line| line.strip_prefix("lock:"));
    lines.map(str::split_whitespace).any(|fields| {
        let fields: Vec<&str> = fields.collect();
        let [.., of, first, last] = fields[..] else {
            return false;
        };
        let reaches = last == "EOF" || last.parse().is_ok_and(|last: i64| last >= start);
        of == image && reaches && first.parse().is_ok_and(|first: i64| first <= start)
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
        let why = take_at_once(&third, ImageAccess::Write)
            .unwrap_err()
            .to_string();
        assert!(why.contains("locked"), "{why}");
        drop((first, second, third));

        let writer = open(&image);
        take(&writer, ImageAccess::Write).unwrap();
        assert!(take_at_once(&open(&image), ImageAccess::Write).is_err());
        assert!(take_at_once(&open(&image), ImageAccess::Read).is_err());
        // The lock is the open file's: it goes with its last descriptor.
        let duplicate = writer.try_clone().unwrap();
        drop(writer);
        assert!(take_at_once(&open(&image), ImageAccess::Read).is_err());
        drop(duplicate);
        take(&open(&image), ImageAccess::Write).unwrap();
    }

    /// A file that ends within a sector grows, which somebody may not let it.
    #[test]
    fn an_image_that_may_grow_is_marked() {
        let image = NamedTempFile::new().unwrap();
        for (len, to, grows) in [
            (1000, ImageAccess::Write, true),
            (1000, ImageAccess::Read, false),
            (1024, ImageAccess::Write, false),
            (1024, ImageAccess::Grow, true),
        ] {
            image.as_file().set_len(len).unwrap();
            let user = open(&image);
            take(&user, to).unwrap();
            let marked = look(&open(&image), DOES + RESIZE, "").is_err();
            assert_eq!(marked, grows, "{len} bytes, {to:?}");
            drop(user);

            let other = open(&image);
            lock(&other, FORBIDS + RESIZE).unwrap();
            let refused = take_at_once(&open(&image), to).is_err();
            assert_eq!(refused, grows, "{len} bytes, {to:?}");
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

//! What device processes use of the host: files, taps, terminals, sockets. A script
//! names them, and each process opens its own. The launcher opens them once and leaves
//! them open to every process that comes to serve the device, so that a successor has
//! what its predecessor had: the same lock, the same terminal, the same waiting clients.

mod tap;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use outrigger_cli::socket::{self, BoundSocket};
use rustix::fs::{MemfdFlags, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

/// Something of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resource {
    /// A disk image or block device.
    Image {
        /// Where it is.
        path: PathBuf,
        /// Open it for reading only.
        readonly: bool,
    },
    /// An existing tap device.
    Tap {
        /// Its interface.
        name: String,
    },
    /// A new pseudo-terminal.
    Pty {
        /// A symbolic link to it.
        link: Option<PathBuf>,
    },
    /// A unix socket that clients connect to.
    Listener {
        /// Where.
        path: PathBuf,
    },
    /// A file that a console's output is appended to.
    Log {
        /// Where it is.
        path: PathBuf,
    },
    /// A file that an output of the platform is written to, from its end on.
    Output {
        /// The option of `device-platform` that it belongs to.
        option: &'static str,
        /// Where it is.
        path: PathBuf,
    },
    /// Memory for a console's output that nobody has read yet.
    Backlog,
}

/// A resource that is open.
pub struct Opened {
    resource: Resource,
    fd: OwnedFd,
    /// What to show of it, where its name says too little.
    pub note: Option<String>,
    _socket: Option<BoundSocket>,
    _link: Option<Link>,
}

/// A symbolic link, removed at the end if it still points where it did.
struct Link {
    path: PathBuf,
    target: PathBuf,
}

impl Drop for Link {
    fn drop(&mut self) {
        if std::fs::read_link(&self.path).is_ok_and(|target| target == self.target) {
            // One that stays behind is replaced by the next.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn words(option: &str, value: impl Into<OsString>) -> Vec<OsString> {
    vec![option.into(), value.into()]
}

impl Resource {
    /// The options by which a process opens it itself.
    pub fn by_path(&self) -> Vec<OsString> {
        match self {
            Resource::Image { path, .. } => words("--blk-file", path),
            Resource::Tap { name } => words("--tap", name),
            Resource::Pty { link: None } => vec!["--pty".into()],
            Resource::Pty { link: Some(link) } => {
                vec!["--pty".into(), "--pty-link".into(), link.into()]
            }
            Resource::Listener { path } => words("--unix", path),
            Resource::Log { path } => words("--file", path),
            Resource::Output { option, path } => {
                let mut value = OsString::from("file=");
                value.push(path);
                words(option, value)
            }
            Resource::Backlog => Vec::new(),
        }
    }

    /// Opens it for the device `id`, unless `others` have it open already.
    ///
    /// # Errors
    /// Names the device and the resource.
    pub fn open(&self, id: &str, others: &[Arc<Opened>]) -> anyhow::Result<Arc<Opened>> {
        if let Some(same) = others.iter().find(|other| self.is(other)) {
            return Ok(Arc::clone(same));
        }
        self.open_anew()
            .map(Arc::new)
            .map_err(|error| anyhow::anyhow!("{id}: {}: {error}", self.name()))
    }

    /// Whether `other` is this resource, open: a path may lead to another file by now.
    fn is(&self, other: &Opened) -> bool {
        let file = match self {
            Resource::Image { path, .. }
            | Resource::Log { path }
            | Resource::Output { path, .. } => path,
            _ => return *self == other.resource,
        };
        let alike = match (self, &other.resource) {
            (Resource::Image { readonly: a, .. }, Resource::Image { readonly: b, .. }) => a == b,
            (one, two) => one == two,
        };
        let same = || {
            let there = std::fs::metadata(file).ok()?;
            let open = rustix::fs::fstat(&other.fd).ok()?;
            Some((there.dev(), there.ino()) == (open.st_dev, open.st_ino))
        };
        alike && same() == Some(true)
    }

    fn name(&self) -> String {
        match self {
            Resource::Image { path, .. }
            | Resource::Listener { path }
            | Resource::Log { path }
            | Resource::Output { path, .. } => path.display().to_string(),
            Resource::Tap { name } => format!("tap {name}"),
            Resource::Pty { link: Some(link) } => {
                format!("pseudo-terminal for {}", link.display())
            }
            Resource::Pty { link: None } => "pseudo-terminal".into(),
            Resource::Backlog => "memory for its output".into(),
        }
    }

    fn open_anew(&self) -> io::Result<Opened> {
        let mut bound = None;
        let fd = match self {
            Resource::Image { path, readonly } => image(path, *readonly)?.into(),
            Resource::Tap { name } => tap::attach(name)?,
            Resource::Pty { .. } => pty()?,
            Resource::Listener { path } => {
                let (listener, removed) = socket::bind(path)?;
                bound = Some(removed);
                listener.into()
            }
            Resource::Log { path } => output(true, path)?.into(),
            // Each byte has its place there, so it is not appended to.
            Resource::Output { path, .. } => output(false, path)?.into(),
            Resource::Backlog => rustix::fs::memfd_create("backlog", MemfdFlags::CLOEXEC)?,
        };
        let mut opened = Opened {
            resource: self.clone(),
            fd,
            note: None,
            _socket: bound,
            _link: None,
        };
        if let Resource::Pty { link } = self {
            let name = ptsname(&opened.fd, Vec::new())?;
            let target = PathBuf::from(std::ffi::OsStr::from_bytes(name.as_bytes()));
            opened.note = Some(format!("pseudo-terminal {}", target.display()));
            if let Some(path) = link {
                opened._link = Some(Link::make(path.clone(), target)?);
            }
        }
        Ok(opened)
    }
}

impl Link {
    /// One that is there already, as a process before this left it, is replaced, and
    /// nothing else.
    fn make(path: PathBuf, target: PathBuf) -> io::Result<Self> {
        if path.symlink_metadata().is_ok_and(|it| it.is_symlink()) {
            std::fs::remove_file(&path)?;
        }
        std::os::unix::fs::symlink(&target, &path)?;
        Ok(Link { path, target })
    }
}

impl Opened {
    /// The options by which a process takes it over.
    pub fn by_fd(&self) -> Vec<OsString> {
        let number = self.fd.as_raw_fd().to_string();
        match self.resource {
            Resource::Image { .. } => words("--blk-fd", number),
            Resource::Tap { .. } => words("--tap-fd", number),
            Resource::Pty { .. } => words("--pty-fd", number),
            Resource::Listener { .. } => words("--unix-fd", number),
            Resource::Log { .. } => words("--file-fd", number),
            Resource::Output { option, .. } => words(option, format!("fd={number}")),
            Resource::Backlog => words("--backlog-fd", number),
        }
    }

    /// The descriptor that the process must inherit.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

/// Not to block is for FIFOs, which would wait for their other end.
fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    options.custom_flags(flags.bits() as i32);
    options
}

fn image(path: &Path, readonly: bool) -> io::Result<File> {
    let open = |write| options().read(true).write(write).open(path);
    open(!readonly).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            if !readonly && open(false).is_ok() =>
        {
            let why = format!("it cannot be written: {error} (readonly=on serves it as it is)");
            io::Error::new(error.kind(), why)
        }
        io::ErrorKind::IsADirectory => {
            io::Error::other("neither a regular file nor a block device")
        }
        _ => error,
    })
}

fn output(append: bool, path: &Path) -> io::Result<File> {
    options()
        .create(true)
        .write(true)
        .append(append)
        .truncate(false)
        .open(path)
}

fn pty() -> io::Result<OwnedFd> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    Ok(master)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(resource: &Resource) -> anyhow::Result<Arc<Opened>> {
        resource.open("disk0", &[])
    }

    #[test]
    fn what_cannot_be_opened_is_named() {
        for (resource, said) in [
            (
                Resource::Image {
                    path: "/none.img".into(),
                    readonly: false,
                },
                "disk0: /none.img: No such file",
            ),
            (
                Resource::Image {
                    path: "/".into(),
                    readonly: false,
                },
                "disk0: /: neither a regular file nor a block device",
            ),
            (
                Resource::Tap {
                    name: "no-such-tap".into(),
                },
                "disk0: tap no-such-tap: No such device",
            ),
            (
                Resource::Listener {
                    path: "/none/a".into(),
                },
                "disk0: /none/a: its directory does not exist",
            ),
        ] {
            let error = open(&resource).err().unwrap().to_string();
            assert!(error.starts_with(said), "{error}");
        }
    }

    #[test]
    fn what_is_open_already_is_shared_if_it_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, "a").unwrap();
        let image = |readonly| Resource::Image {
            path: path.clone(),
            readonly,
        };
        let first = open(&image(false)).unwrap();
        let others = [Arc::clone(&first)];
        let shared =
            |resource: &Resource| Arc::ptr_eq(&resource.open("disk0", &others).unwrap(), &first);
        assert!(shared(&image(false)));
        assert!(!shared(&image(true)));
        // By another name.
        let link = dir.path().join("link");
        std::fs::hard_link(&path, &link).unwrap();
        assert!(shared(&Resource::Image {
            path: link,
            readonly: false
        }));
        // Another file by the same name.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "b").unwrap();
        assert!(!shared(&image(false)));
    }

    #[test]
    fn links_and_sockets_are_gone_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let (link, path) = (dir.path().join("link"), dir.path().join("socket"));
        let pty = open(&Resource::Pty {
            link: Some(link.clone()),
        })
        .unwrap();
        let socket = open(&Resource::Listener { path: path.clone() }).unwrap();
        assert!(std::fs::read_link(&link).unwrap().starts_with("/dev/pts"));
        assert!(path.exists());
        drop((pty, socket));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

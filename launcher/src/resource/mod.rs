//! Resources of the host that device processes use: files, tap devices, pseudo-terminals,
//! sockets.
//!
//! In a printed script, each process opens its resources by path. The launcher opens them
//! itself and passes the same descriptors to every process that serves the device, so that a
//! successor gets what its predecessor had: the lock of the image, the pseudo-terminal, the
//! clients that wait to be accepted.

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

/// A resource of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostResource {
    /// A disk image or block device.
    Image {
        /// Its path.
        path: PathBuf,
        /// Whether it is opened for reading only.
        readonly: bool,
    },
    /// An existing tap device.
    Tap {
        /// The name of its network interface.
        name: String,
    },
    /// A new pseudo-terminal.
    Pty {
        /// A symbolic link to create to it.
        link: Option<PathBuf>,
    },
    /// A unix socket that clients connect to.
    Listener {
        /// Its path.
        path: PathBuf,
    },
    /// A file that a console's output is appended to.
    Log {
        /// Its path.
        path: PathBuf,
    },
    /// A file that the platform appends output to.
    Output {
        /// The option of `device-platform` for this output.
        option: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// Memory for output of a console that no client has read yet.
    Backlog,
}

/// An open resource.
pub struct OpenResource {
    resource: HostResource,
    fd: OwnedFd,
    /// A description for the user that is known only once the resource is open.
    pub note: Option<String>,
    _socket: Option<BoundSocket>,
    _link: Option<PtyLink>,
}

/// A symbolic link to a pseudo-terminal. Dropping it removes the link, unless it points
/// elsewhere by now.
struct PtyLink {
    path: PathBuf,
    target: PathBuf,
}

impl Drop for PtyLink {
    fn drop(&mut self) {
        if std::fs::read_link(&self.path).is_ok_and(|target| target == self.target) {
            // If this fails, the next launcher replaces the link.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn words(option: &str, value: impl Into<OsString>) -> Vec<OsString> {
    vec![option.into(), value.into()]
}

impl HostResource {
    /// Returns the options with which a process opens the resource by path.
    pub fn by_path(&self) -> Vec<OsString> {
        match self {
            HostResource::Image { path, .. } => words("--blk-file", path),
            HostResource::Tap { name } => words("--tap", name),
            HostResource::Pty { link: None } => vec!["--pty".into()],
            HostResource::Pty { link: Some(link) } => {
                vec!["--pty".into(), "--pty-link".into(), link.into()]
            }
            HostResource::Listener { path } => words("--unix", path),
            HostResource::Log { path } => words("--file", path),
            HostResource::Output { option, path } => {
                let mut value = OsString::from("file=");
                value.push(path);
                words(option, value)
            }
            HostResource::Backlog => Vec::new(),
        }
    }

    /// Opens the resource for the device `id`, unless it is among `others`, which are open
    /// already.
    ///
    /// # Errors
    /// The resource cannot be opened. The message names the device and the resource.
    pub fn open(
        &self,
        id: &str,
        others: &[Arc<OpenResource>],
    ) -> anyhow::Result<Arc<OpenResource>> {
        if let Some(same) = others.iter().find(|other| self.is_same(other)) {
            return Ok(Arc::clone(same));
        }
        self.open_new()
            .map(Arc::new)
            .map_err(|error| anyhow::anyhow!("{id}: {}: {error}", self.name()))
    }

    /// Whether `other` is this resource. Its path may lead to another file by now.
    fn is_same(&self, other: &OpenResource) -> bool {
        let file = match self {
            HostResource::Image { path, .. }
            | HostResource::Log { path }
            | HostResource::Output { path, .. } => path,
            _ => return *self == other.resource,
        };
        let same_kind = match (self, &other.resource) {
            (HostResource::Image { readonly: a, .. }, HostResource::Image { readonly: b, .. }) => {
                a == b
            }
            (one, two) => one == two,
        };
        let same_file = || {
            let present = std::fs::metadata(file).ok()?;
            let open = rustix::fs::fstat(&other.fd).ok()?;
            Some((present.dev(), present.ino()) == (open.st_dev, open.st_ino))
        };
        same_kind && same_file() == Some(true)
    }

    fn name(&self) -> String {
        match self {
            HostResource::Image { path, .. }
            | HostResource::Listener { path }
            | HostResource::Log { path }
            | HostResource::Output { path, .. } => path.display().to_string(),
            HostResource::Tap { name } => format!("tap {name}"),
            HostResource::Pty { link: Some(link) } => {
                format!("pseudo-terminal for {}", link.display())
            }
            HostResource::Pty { link: None } => "pseudo-terminal".into(),
            HostResource::Backlog => "memory for unread output".into(),
        }
    }

    fn open_new(&self) -> io::Result<OpenResource> {
        let mut bound = None;
        let fd = match self {
            HostResource::Image { path, readonly } => image(path, *readonly)?.into(),
            HostResource::Tap { name } => tap::attach(name)?,
            HostResource::Pty { .. } => pty()?,
            HostResource::Listener { path } => {
                let (listener, removed) = socket::bind(path)?;
                bound = Some(removed);
                listener.into()
            }
            HostResource::Log { path } => output(true, path)?.into(),
            // The platform writes each byte at an offset that it knows, so that a byte which it
            // writes again after a restart is in the file once. O_APPEND would prevent that.
            HostResource::Output { path, .. } => output(false, path)?.into(),
            HostResource::Backlog => rustix::fs::memfd_create("backlog", MemfdFlags::CLOEXEC)?,
        };
        let mut opened = OpenResource {
            resource: self.clone(),
            fd,
            note: None,
            _socket: bound,
            _link: None,
        };
        if let HostResource::Pty { link } = self {
            let name = ptsname(&opened.fd, Vec::new())?;
            let target = PathBuf::from(std::ffi::OsStr::from_bytes(name.as_bytes()));
            opened.note = Some(format!("pseudo-terminal {}", target.display()));
            if let Some(path) = link {
                opened._link = Some(PtyLink::create(path.clone(), target)?);
            }
        }
        Ok(opened)
    }
}

impl PtyLink {
    /// Creates the link. Replaces a symbolic link, which an earlier launcher may have left
    /// behind, but no other kind of file.
    fn create(path: PathBuf, target: PathBuf) -> io::Result<Self> {
        if path.symlink_metadata().is_ok_and(|it| it.is_symlink()) {
            std::fs::remove_file(&path)?;
        }
        std::os::unix::fs::symlink(&target, &path)?;
        Ok(PtyLink { path, target })
    }
}

impl OpenResource {
    /// Returns the options with which a process inherits the resource.
    pub fn by_fd(&self) -> Vec<OsString> {
        let number = self.fd.as_raw_fd().to_string();
        match self.resource {
            HostResource::Image { .. } => words("--blk-fd", number),
            HostResource::Tap { .. } => words("--tap-fd", number),
            HostResource::Pty { .. } => words("--pty-fd", number),
            HostResource::Listener { .. } => words("--unix-fd", number),
            HostResource::Log { .. } => words("--file-fd", number),
            HostResource::Output { option, .. } => words(option, format!("fd={number}")),
            HostResource::Backlog => words("--backlog-fd", number),
        }
    }

    /// Returns the descriptor that the process must inherit.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

/// Returns options with O_NONBLOCK, because opening a FIFO would otherwise wait for its other
/// end.
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
            let why = format!(
                "cannot be opened for writing: {error} (to serve it read-only, use readonly=on)"
            );
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

    fn open(resource: &HostResource) -> anyhow::Result<Arc<OpenResource>> {
        resource.open("disk0", &[])
    }

    #[test]
    fn an_error_names_the_device_and_the_resource() {
        for (resource, message) in [
            (
                HostResource::Image {
                    path: "/none.img".into(),
                    readonly: false,
                },
                "disk0: /none.img: No such file",
            ),
            (
                HostResource::Image {
                    path: "/".into(),
                    readonly: false,
                },
                "disk0: /: neither a regular file nor a block device",
            ),
            (
                HostResource::Tap {
                    name: "no-such-tap".into(),
                },
                "disk0: tap no-such-tap: No such device",
            ),
            (
                HostResource::Listener {
                    path: "/none/a".into(),
                },
                "disk0: /none/a: its directory does not exist",
            ),
        ] {
            let error = open(&resource).err().unwrap().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }

    #[test]
    fn an_open_resource_is_shared_if_it_is_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, "a").unwrap();
        let image = |readonly| HostResource::Image {
            path: path.clone(),
            readonly,
        };
        let first = open(&image(false)).unwrap();
        let others = [Arc::clone(&first)];
        let shared = |resource: &HostResource| {
            Arc::ptr_eq(&resource.open("disk0", &others).unwrap(), &first)
        };
        assert!(shared(&image(false)));
        assert!(!shared(&image(true)));
        // The same file under another name.
        let link = dir.path().join("link");
        std::fs::hard_link(&path, &link).unwrap();
        assert!(shared(&HostResource::Image {
            path: link,
            readonly: false
        }));
        // Another file under the same name.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "b").unwrap();
        assert!(!shared(&image(false)));
    }

    #[test]
    fn links_and_sockets_are_removed_on_drop() {
        let dir = tempfile::tempdir().unwrap();
        let (link, path) = (dir.path().join("link"), dir.path().join("socket"));
        let pty = open(&HostResource::Pty {
            link: Some(link.clone()),
        })
        .unwrap();
        let socket = open(&HostResource::Listener { path: path.clone() }).unwrap();
        assert!(std::fs::read_link(&link).unwrap().starts_with("/dev/pts"));
        assert!(path.exists());
        drop((pty, socket));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

//! The runtime directory of a machine, which holds the sockets between its processes. Only
//! its user can access it, and it is removed when the machine ends.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::Context;
use outrigger_cli::socket::{self, BoundSocket};
use tempfile::TempDir;

/// The longest path of a directory for runtime directories. A socket path has at most 107
/// bytes (unix(7)), and the rest is for the names below this directory.
const MAX_PARENT: usize = 60;

/// The runtime directory.
pub struct RuntimeDir {
    directory: TempDir,
    /// Number of sockets created so far, which makes their names unique.
    sockets: usize,
}

/// A listening socket that successive processes inherit. It stays open in the launcher, so a
/// connection that is made while no process accepts waits for the next one.
pub struct ListeningSocket {
    /// The socket.
    pub listener: UnixListener,
    /// Its path.
    pub path: PathBuf,
    _socket_file: BoundSocket,
}

impl RuntimeDir {
    /// Creates the directory in XDG_RUNTIME_DIR; if that fails, in TMPDIR or else in /tmp.
    ///
    /// # Errors
    /// The directory cannot be created in any of them.
    pub fn create() -> anyhow::Result<Self> {
        let user = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let candidates = user
            .into_iter()
            .chain([std::env::temp_dir(), "/tmp".into()]);
        let mut last = None;
        for parent in candidates.filter(|path| path.is_absolute()) {
            if parent.as_os_str().len() > MAX_PARENT {
                continue;
            }
            let result = tempfile::Builder::new()
                .prefix("outrigger.")
                .permissions(std::fs::Permissions::from_mode(0o700))
                .tempdir_in(&parent)
                .with_context(|| format!("cannot create a directory in {}", parent.display()));
            match result {
                Ok(directory) => {
                    return Ok(RuntimeDir {
                        directory,
                        sockets: 0,
                    });
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| {
            anyhow::anyhow!(
                "XDG_RUNTIME_DIR, TMPDIR and /tmp are not usable for the machine's sockets"
            )
        }))
    }

    /// The path at which the runner creates its control socket.
    pub fn runner_control(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    /// Creates a new socket for the processes of the device `id`.
    ///
    /// # Errors
    /// The socket cannot be created.
    pub fn listen(&mut self, id: &str) -> anyhow::Result<ListeningSocket> {
        let path = self.path(id);
        let (listener, socket_file) =
            socket::bind(&path).with_context(|| format!("{id}: {}", path.display()))?;
        self.sockets += 1;
        Ok(ListeningSocket {
            listener,
            path,
            _socket_file: socket_file,
        })
    }

    fn path(&self, id: &str) -> PathBuf {
        let directory: &Path = self.directory.path();
        directory.join(format!("{id}.{}", self.sockets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_is_private_and_removed_at_the_end() {
        let mut runtime = RuntimeDir::create().unwrap();
        let directory = runtime.directory.path().to_owned();
        let mode = directory.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let (first, second) = (
            runtime.listen("disk0").unwrap(),
            runtime.listen("disk0").unwrap(),
        );
        assert_ne!(first.path, second.path);
        // A client can connect although no process accepts yet.
        socket::connect(&first.path, None).unwrap();
        let removed = first.path.clone();
        drop(first);
        assert!(!removed.exists() && second.path.exists());
        drop(second);
        drop(runtime);
        assert!(!directory.exists());
    }
}

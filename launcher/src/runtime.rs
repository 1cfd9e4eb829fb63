//! The directory of a machine that runs: only its user may look into it, and it is
//! removed at the end. In it the processes meet.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::Context;
use outrigger_cli::socket::{self, BoundSocket};
use tempfile::TempDir;

/// Longest name of a directory in which all that is made has a path short enough for
/// a socket (107 bytes, unix(7)).
const LONGEST: usize = 60;

/// The directory.
pub struct Runtime {
    directory: TempDir,
    made: usize,
}

/// A socket that one process after the other serves. It is bound once and stays open
/// here: who connects while none is there waits for the next.
pub struct Endpoint {
    /// The socket, listening.
    pub listener: UnixListener,
    /// Where it is.
    pub path: PathBuf,
    _bound: BoundSocket,
}

impl Runtime {
    /// Makes it, below XDG_RUNTIME_DIR, else TMPDIR, else /tmp.
    ///
    /// # Errors
    /// When it cannot be made in any of them.
    pub fn new() -> anyhow::Result<Self> {
        let user = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let candidates = user
            .into_iter()
            .chain([std::env::temp_dir(), "/tmp".into()]);
        let mut last = None;
        for parent in candidates.filter(|path| path.is_absolute()) {
            if parent.as_os_str().len() > LONGEST {
                continue;
            }
            let made = tempfile::Builder::new()
                .prefix("outrigger.")
                .permissions(std::fs::Permissions::from_mode(0o700))
                .tempdir_in(&parent)
                .with_context(|| format!("making a directory in {}", parent.display()));
            match made {
                Ok(directory) => return Ok(Runtime { directory, made: 0 }),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| anyhow::anyhow!("no directory for the machine's sockets")))
    }

    /// Where the runner makes its control socket.
    pub fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    /// A new socket for processes of the device `id`.
    ///
    /// # Errors
    /// bind(2)'s own.
    pub fn endpoint(&mut self, id: &str) -> anyhow::Result<Endpoint> {
        let path = self.path(id);
        let (listener, bound) =
            socket::bind(&path).with_context(|| format!("{id}: {}", path.display()))?;
        self.made += 1;
        Ok(Endpoint {
            listener,
            path,
            _bound: bound,
        })
    }

    fn path(&self, id: &str) -> PathBuf {
        let directory: &Path = self.directory.path();
        directory.join(format!("{id}.{}", self.made))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_it_is_gone_at_the_end() {
        let mut runtime = Runtime::new().unwrap();
        let directory = runtime.directory.path().to_owned();
        let mode = directory.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let (first, second) = (
            runtime.endpoint("disk0").unwrap(),
            runtime.endpoint("disk0").unwrap(),
        );
        assert_ne!(first.path, second.path);
        // Nobody accepts yet, and a client is not turned away.
        socket::connect(&first.path, None).unwrap();
        let gone = first.path.clone();
        drop(first);
        assert!(!gone.exists() && second.path.exists());
        drop(second);
        drop(runtime);
        assert!(!directory.exists());
    }
}

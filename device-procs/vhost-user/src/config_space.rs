//! The device's configuration space, shared between the device, which changes it, and the
//! main thread, which serves it to the front end.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Error;
use crate::vhost_workarounds::config_change_message;

/// The largest configuration space that vhost-user carries, in bytes.
pub const MAX_SIZE: usize = 256;

#[derive(Default)]
struct SharedConfig {
    bytes: Vec<u8>,
    /// The back-end channel (SET_BACKEND_REQ_FD).
    channel: Option<UnixStream>,
}

/// The bytes of the configuration space, and the channel that announces changes. Clones
/// share one space.
#[derive(Clone, Default)]
pub struct ConfigSpace(Arc<Mutex<SharedConfig>>);

impl ConfigSpace {
    /// A space that contains `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        let space = ConfigSpace::default();
        space.lock().bytes = bytes;
        space
    }

    fn lock(&self) -> MutexGuard<'_, SharedConfig> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the bytes and, if they differ, sends CONFIG_CHANGE_MSG. A front end without
    /// a back-end channel sees the change when it reads the space.
    pub fn update(&self, bytes: Vec<u8>) {
        let mut config = self.lock();
        if config.bytes == bytes {
            return;
        }
        config.bytes = bytes;
        let message = config_change_message();
        // WouldBlock: the channel is full of announcements that the front end has not read.
        // When it reads one of them, it sees this change, too.
        if let Some(Err(error)) = config.channel.as_mut().map(|c| c.write_all(&message))
            && error.kind() != ErrorKind::WouldBlock
        {
            tracing::warn!(%error, "sending CONFIG_CHANGE_MSG failed; no more are sent");
            config.channel = None;
        }
    }

    /// Reads `size` bytes at `offset`. Bytes between the end of the device's space and
    /// [`MAX_SIZE`] read as zero, for front ends that ask for more.
    ///
    /// # Errors
    /// The range reaches beyond [`MAX_SIZE`].
    pub fn read(&self, offset: u32, size: usize) -> Result<Vec<u8>, Error> {
        let start = offset as usize;
        let end = start.saturating_add(size);
        if end > MAX_SIZE {
            return Err(Error::ConfigRange { offset, size });
        }
        let mut all = self.lock().bytes.clone();
        all.resize(MAX_SIZE, 0);
        Ok(all[start..end].to_vec())
    }

    /// Announces changes on `channel` from now on; `None` when the front end has left.
    pub(crate) fn set_channel(&self, channel: Option<UnixStream>) {
        // A front end that does not read its channel must not block a device.
        if let Some(channel) = &channel
            && let Err(error) = device_core::fd::set_nonblocking(channel)
        {
            tracing::warn!(%error, "back-end channel");
        }
        self.lock().channel = channel;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn reads_are_padded_and_bounded() {
        let space = ConfigSpace::new(vec![1, 2, 3]);
        assert_eq!(space.read(1, 4).unwrap(), [2, 3, 0, 0]);
        assert!(space.read(250, 7).is_err());
        assert!(space.read(u32::MAX, 1).is_err());
    }

    #[test]
    fn changes_are_announced_to_a_front_end_that_reads_late() {
        let space = ConfigSpace::new(vec![0]);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let probe = ours.try_clone().unwrap();
        space.set_channel(Some(ours));
        let mut changes = 0u32;
        // Fills the channel, and makes one more change then.
        while (&probe).write(&[0; 12]).is_ok() {
            changes += 1;
        }
        space.update(changes.to_le_bytes().to_vec());
        theirs.set_nonblocking(true).unwrap();
        let mut buffer = [0; 4096];
        while theirs.read(&mut buffer).is_ok() {}
        space.update(vec![1]);
        theirs.set_nonblocking(false).unwrap();
        drop(probe);
        space.set_channel(None);
        let mut got = Vec::new();
        theirs.read_to_end(&mut got).unwrap();
        assert_eq!(got, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_change_is_announced_once() {
        let space = ConfigSpace::new(vec![1]);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        space.set_channel(Some(ours));
        space.update(vec![1]);
        space.update(vec![2]);
        space.set_channel(None);
        let mut got = Vec::new();
        theirs.read_to_end(&mut got).unwrap();
        assert_eq!(got, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }
}

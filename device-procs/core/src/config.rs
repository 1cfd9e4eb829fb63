//! The device's configuration space, shared by whoever changes it and the
//! control thread, which serves it and tells the front end of changes.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Error;

/// Request number of BACKEND_CONFIG_CHANGE_MSG on the back-end channel
/// (vhost-user, "Back-end message types").
const CONFIG_CHANGE_MSG: u32 = 2;
/// Version 1 in the header's flags.
const HEADER_VERSION: u32 = 1;
/// The largest configuration space that vhost-user carries, in bytes.
pub const MAX_SIZE: usize = 256;

#[derive(Default)]
struct Inner {
    bytes: Vec<u8>,
    channel: Option<UnixStream>,
}

/// Bytes of the configuration space and the channel to announce changes on.
/// Clones share one space.
#[derive(Clone, Default)]
pub struct ConfigSpace(Arc<Mutex<Inner>>);

impl ConfigSpace {
    /// A space that starts with `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        let space = ConfigSpace::default();
        space.lock().bytes = bytes;
        space
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the bytes and, if they differ, tells the front end. A front end
    /// without a back-end channel finds the change at its next read.
    pub fn update(&self, bytes: Vec<u8>) {
        let mut inner = self.lock();
        if inner.bytes == bytes {
            return;
        }
        inner.bytes = bytes;
        let mut message = [0u8; 12];
        message[..4].copy_from_slice(&CONFIG_CHANGE_MSG.to_le_bytes());
        message[4..8].copy_from_slice(&HEADER_VERSION.to_le_bytes());
        // One that has no room is full of news that the front end has not read; when it
        // does, it finds this, too.
        if let Some(Err(error)) = inner.channel.as_mut().map(|c| c.write_all(&message))
            && error.kind() != ErrorKind::WouldBlock
        {
            tracing::warn!("configuration change not announced: {error}");
            inner.channel = None;
        }
    }

    /// `size` bytes at `offset`. Bytes between the end of the device's own space
    /// and [`MAX_SIZE`] read as zero, for front ends that ask for more.
    ///
    /// # Errors
    /// When the range reaches beyond [`MAX_SIZE`].
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

    /// Where changes are announced from now on; `None` when the front end left.
    pub(crate) fn set_channel(&self, channel: Option<UnixStream>) {
        // A front end that does not read its channel must not block a device.
        if let Some(channel) = &channel
            && let Err(error) = crate::fd::set_nonblocking(channel)
        {
            tracing::warn!("back-end channel: {error}");
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
    fn a_front_end_that_reads_late_is_told_of_changes_all_the_same() {
        let space = ConfigSpace::new(vec![0]);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let probe = ours.try_clone().unwrap();
        space.set_channel(Some(ours));
        let mut changes = 0u32;
        // Until nothing fits any more, and once more then.
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

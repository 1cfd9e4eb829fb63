//! Reading through images on top of each other, with compressed clusters in any of them.
//!
//! imago takes a stream that refers to what was before its beginning, and gives what
//! memory it happened to have instead, which is nothing for a guest to see. So we inflate
//! ourselves, and look at what imago is going to copy beforehand.

use std::io;

use device_vhost_user::Buffers;
use imago::io_buffers::IoVectorMut;
use imago::{FormatAccess, ShallowMapping};

use super::super::metadata_file::damaged;
use super::storage::Storage;

/// Fills `buffers` with the disk's bytes from `offset` on.
///
/// # Errors
/// The media's; or that a table or compressed cluster is damaged.
pub fn read(
    access: &FormatAccess<Storage>,
    mut offset: u64,
    buffers: &Buffers<'_>,
) -> io::Result<()> {
    let mut left = buffers.clone();
    while !left.is_empty() {
        let (mapping, found) = access.get_shallow_mapping(offset, left.len() as u64)?;
        let cluster = match mapping {
            ShallowMapping::Special { .. } => match cluster(access, offset)? {
                None => continue, // written anew meanwhile
                some => some,
            },
            _ => None,
        };
        let here = match (found, &cluster) {
            (0, _) => left.len(), // an image below ends: zeros
            (found, None) => found as usize,
            (found, Some((within, bytes))) => (found as usize).min(bytes.len() - within),
        };
        let piece = left.take(here).ok_or(io::ErrorKind::InvalidInput)?;
        match (mapping, cluster) {
            (_, Some((within, cluster))) => {
                let bytes = cluster.get(within..).and_then(|rest| rest.get(..here));
                piece.copy_from(bytes.ok_or(io::ErrorKind::InvalidInput)?);
            }
            (ShallowMapping::Indirect { layer, offset, .. }, _) => read(layer, offset, &piece)?,
            _ => {
                let (vector, _guards) = IoVectorMut::from_volatile_slice(piece.slices());
                access.readv(vector, offset)?;
            }
        }
        offset += here as u64;
    }
    Ok(())
}

/// Looks at all compressed clusters of a range.
///
/// # Errors
/// As [`read`].
pub fn check(access: &FormatAccess<Storage>, mut offset: u64, mut len: u64) -> io::Result<()> {
    while len > 0 {
        let (mapping, mut found) = access.get_shallow_mapping(offset, len)?;
        match mapping {
            _ if found == 0 => return Ok(()),
            ShallowMapping::Indirect { layer, offset, .. } => check(layer, offset, found)?,
            ShallowMapping::Special { .. } => {
                if let Some((within, bytes)) = cluster(access, offset)? {
                    found = found.min((bytes.len() - within) as u64);
                }
            }
            _ => {}
        }
        offset += found;
        len -= found;
    }
    Ok(())
}

/// The cluster with the disk's byte `offset`, which is compressed, and where in it that
/// is; `None` when it is not compressed any more.
fn cluster(access: &FormatAccess<Storage>, offset: u64) -> io::Result<Option<(usize, Vec<u8>)>> {
    // An image's own file comes after those of the images below.
    let storages = access.inner().collect_storage_dependencies();
    let storage = storages.last().ok_or(io::ErrorKind::InvalidInput)?;
    let found = storage.inflate(offset);
    // This after that: its place was not free, nor anything else there, as long as the
    // tables in memory led to it.
    match access.get_shallow_mapping(offset, 1)?.0 {
        ShallowMapping::Special { .. } => match found? {
            None => Err(damaged("its tables in the file are not those in memory")),
            some => Ok(some),
        },
        _ => Ok(None),
    }
}

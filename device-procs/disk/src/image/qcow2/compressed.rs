//! Reading through a chain of images, any of which may have compressed clusters.
//!
//! imago accepts a deflate stream that refers to bytes before its beginning, and returns
//! uninitialised memory for them, which a guest must not see. So we inflate the clusters
//! ourselves, and check those that imago is about to copy.

use std::io;

use device_vhost_user::Buffers;
use imago::io_buffers::IoVectorMut;
use imago::{FormatAccess, ShallowMapping};

use super::super::metadata_file::damaged;
use super::storage::Storage;

/// Fills `buffers` with the disk's bytes from `offset` on.
///
/// # Errors
/// A file cannot be read, or a table or compressed cluster is damaged.
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
                None => continue, // rewritten meanwhile
                some => some,
            },
            _ => None,
        };
        let here = match (found, &cluster) {
            (0, _) => left.len(), // beyond the end of a backing file: zeros
            (found, None) => found as usize,
            (found, Some((within, bytes))) => (found as usize).min(bytes.len() - within),
        };
        let part = left.take(here).ok_or(io::ErrorKind::InvalidInput)?;
        match (mapping, cluster) {
            (_, Some((within, cluster))) => {
                let bytes = cluster.get(within..).and_then(|rest| rest.get(..here));
                part.copy_from(bytes.ok_or(io::ErrorKind::InvalidInput)?);
            }
            (ShallowMapping::Indirect { layer, offset, .. }, _) => read(layer, offset, &part)?,
            _ => {
                let (vector, _guards) = IoVectorMut::from_volatile_slice(part.slices());
                access.readv(vector, offset)?;
            }
        }
        offset += here as u64;
    }
    Ok(())
}

/// Checks all compressed clusters of a range.
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

/// The compressed cluster with the disk's byte `offset`: the position of that byte in it, and
/// the cluster. `None` if it is not compressed any more.
fn cluster(access: &FormatAccess<Storage>, offset: u64) -> io::Result<Option<(usize, Vec<u8>)>> {
    // The image's own file comes after those of its backing files.
    let storages = access.inner().collect_storage_dependencies();
    let storage = storages.last().ok_or(io::ErrorKind::InvalidInput)?;
    let found = storage.inflate(offset);
    // In this order: as long as the tables in memory map the cluster, its range in the file
    // is not used for anything else, so what was read is valid.
    match access.get_shallow_mapping(offset, 1)?.0 {
        ShallowMapping::Special { .. } => match found? {
            None => Err(damaged(
                "its tables in the file differ from those in memory",
            )),
            some => Ok(some),
        },
        _ => Ok(None),
    }
}

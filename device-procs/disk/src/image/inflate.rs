//! Compressed clusters of qcow and qcow2 images: deflate streams without a header.

use std::io::{self, IoSliceMut};

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

use super::metadata_file::{MetadataFile, damaged};

/// The cluster of `size` bytes that is compressed in `len` bytes of the file at `at`.
///
/// # Errors
/// The medium's; or one that says that there is no such thing.
pub fn inflate(guard: &MetadataFile, at: u64, len: usize, size: usize) -> io::Result<Vec<u8>> {
    let mut compressed = vec![0; len];
    guard.read_padded(&mut [IoSliceMut::new(&mut compressed)], at)?;
    let mut cluster = vec![0; size];
    let (status, _, count) = decompress(
        &mut DecompressorOxide::new(),
        &compressed,
        &mut cluster,
        0,
        TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
    );
    // That there could be more does not matter once the cluster is full.
    let sound = matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput);
    if !sound || count != cluster.len() {
        return Err(damaged(&format!(
            "a compressed cluster at {at:#x} is not one"
        )));
    }
    Ok(cluster)
}

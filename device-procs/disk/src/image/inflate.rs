//! Compressed clusters of qcow and qcow2 images: deflate streams without a header.

use std::io::{self, IoSliceMut};

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

use super::metadata_file::{MetadataFile, damaged};

/// Inflates the cluster of `size` bytes that is stored in `len` bytes of the file at `at`.
///
/// # Errors
/// The file cannot be read, or the cluster is damaged.
pub fn inflate(image_file: &MetadataFile, at: u64, len: usize, size: usize) -> io::Result<Vec<u8>> {
    let mut compressed = vec![0; len];
    image_file.read_padded(&mut [IoSliceMut::new(&mut compressed)], at)?;
    let mut cluster = vec![0; size];
    let (status, _, count) = decompress(
        &mut DecompressorOxide::new(),
        &compressed,
        &mut cluster,
        0,
        TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
    );
    // More output than a cluster does no harm.
    let valid = matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput);
    if !valid || count != cluster.len() {
        return Err(damaged(&format!(
            "the compressed cluster at {at:#x} cannot be inflated"
        )));
    }
    Ok(cluster)
}

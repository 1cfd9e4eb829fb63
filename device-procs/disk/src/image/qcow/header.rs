//! The header of a qcow image of version 1 (as QEMU writes it, block/qcow.c): 48 bytes,
//! numbers big-endian.
//!
//! | offset | bytes | |
//! |---:|---:|---|
//! | 0 | 4 | magic |
//! | 4 | 4 | version |
//! | 8 | 8 + 4 | backing file's name: offset, length |
//! | 20 | 4 | modification time of the backing file |
//! | 24 | 8 | size of the disk in bytes |
//! | 32 | 1 | log2 of the cluster size |
//! | 33 | 1 | log2 of the number of entries of an L2 table |
//! | 36 | 4 | encryption method |
//! | 40 | 8 | offset of the L1 table |

use std::io::{self, IoSlice};

use super::super::metadata_file::MetadataFile;
use super::super::qcow2::header::MAGIC;

/// Length of the header in bytes.
pub const LEN: usize = 48;
/// Offset of the size of the disk. From here to the end, `update` writes the header.
const SIZE: usize = 24;
/// The most entries of an L1 table, 32 MiB, as in a qcow2 image.
const MAX_ENTRIES: u64 = 4 << 20;

/// The fields of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QcowHeader {
    /// Size of the disk in bytes.
    pub size: u64,
    /// log2 of the cluster size in bytes.
    pub cluster_bits: u32,
    /// log2 of the number of entries of an L2 table.
    pub l2_bits: u32,
    /// Offset of the L1 table.
    pub l1: u64,
    /// Name of the backing file.
    pub backing: Option<String>,
}

fn refused(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

impl QcowHeader {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// The file cannot be read, or the image is invalid or not supported.
    pub fn read(image_file: &MetadataFile) -> io::Result<Self> {
        let len = image_file.refresh_len()?;
        if len < LEN as u64 {
            return Err(refused("it is not a qcow image"));
        }
        let mut bytes = [0; LEN];
        image_file.read(&mut bytes, 0)?;
        let (mut header, (name, name_len)) = QcowHeader::parse(&bytes, len).map_err(refused)?;
        if name != 0 {
            let bad = || refused("the name of its backing file is at an invalid offset");
            if name_len == 0 || name_len > 1023 {
                return Err(bad());
            }
            let mut bytes = vec![0; name_len as usize];
            image_file.read(&mut bytes, name).map_err(|_| bad())?;
            header.backing = Some(String::from_utf8(bytes).map_err(|_| bad())?);
        }
        Ok(header)
    }

    /// Decodes and checks the header; also returns offset and length of the backing file's
    /// name.
    fn parse(bytes: &[u8; LEN], len: u64) -> Result<(Self, (u64, u32)), String> {
        let word = |at: usize| u32::from_be_bytes(std::array::from_fn(|i| bytes[at + i]));
        let long = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| bytes[at + i]));
        if bytes[..4] != MAGIC {
            return Err("it is not a qcow image".into());
        }
        match word(4) {
            1 => {}
            2 | 3 => return Err("it is a qcow2 image (--format qcow2)".into()),
            version => return Err(format!("version {version} of qcow is not supported")),
        }
        if word(36) != 0 {
            return Err("it is encrypted, which is not supported".into());
        }
        let header = QcowHeader {
            size: long(SIZE),
            cluster_bits: bytes[32].into(),
            l2_bits: bytes[33].into(),
            l1: long(40),
            backing: None,
        };
        // QEMU's limits: an L2 table has 512 bytes to 64 KiB.
        let (bits, l2_bits) = (header.cluster_bits, header.l2_bits);
        if !(9..=16).contains(&bits) {
            return Err(format!("clusters of 2^{bits} bytes are not supported"));
        }
        if !(6..=13).contains(&l2_bits) {
            return Err(format!("tables of 2^{l2_bits} entries are not supported"));
        }
        header.check_size()?;
        let end = header.l1.checked_add(header.l1_entries() * 8);
        if header.l1 < LEN as u64 || end.is_none_or(|end| end > len) {
            return Err("its L1 table is at an invalid offset".into());
        }
        Ok((header, (long(8), word(16))))
    }

    /// Checks the size of the disk.
    ///
    /// # Errors
    /// A qcow image cannot have this size.
    pub fn check_size(&self) -> Result<(), String> {
        let size = self.size;
        if size < 512 {
            return Err("it is empty: a disk has at least one sector".into());
        }
        if size > i64::MAX as u64 || self.l1_entries() > MAX_ENTRIES {
            return Err(format!("its disk is too large, {size} bytes"));
        }
        Ok(())
    }

    /// Number of entries of the L1 table, each of which maps as many clusters as an L2 table
    /// has entries.
    pub fn l1_entries(&self) -> u64 {
        self.size.div_ceil(1 << (self.cluster_bits + self.l2_bits))
    }

    /// Writes the size of the disk and the offset of the L1 table in one write, so that a
    /// sudden death leaves both or neither.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn update(&self, image_file: &MetadataFile) -> io::Result<()> {
        let mut bytes = [0; LEN - SIZE];
        image_file.read(&mut bytes, SIZE as u64)?;
        bytes[..8].copy_from_slice(&self.size.to_be_bytes());
        bytes[40 - SIZE..].copy_from_slice(&self.l1.to_be_bytes());
        image_file.write_table(&mut [IoSlice::new(&bytes)], SIZE as u64)
    }

    /// Writes a new image.
    ///
    /// # Errors
    /// The file cannot be written, or the disk is too large.
    pub fn create(&self, image_file: &MetadataFile) -> io::Result<()> {
        let name = self.backing.as_deref().unwrap_or("");
        let mut bytes = Vec::with_capacity(LEN);
        bytes.extend(MAGIC);
        bytes.extend(1u32.to_be_bytes());
        let name_offset = if name.is_empty() { 0 } else { LEN as u64 };
        bytes.extend(name_offset.to_be_bytes());
        bytes.extend((name.len() as u32).to_be_bytes());
        bytes.extend(0u32.to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend([self.cluster_bits as u8, self.l2_bits as u8, 0, 0]);
        bytes.extend(0u32.to_be_bytes());
        bytes.extend(self.l1.to_be_bytes());
        let end = self.l1 + self.l1_entries() * 8;
        if let Ok(header) = <&[u8; LEN]>::try_from(&bytes[..]) {
            QcowHeader::parse(header, end).map_err(refused)?;
        }
        bytes.extend(name.as_bytes());
        image_file.write(&mut [IoSlice::new(&bytes)], 0)?;
        image_file.zero(bytes.len() as u64, end - bytes.len() as u64, true)
    }

    /// The header of a new image.
    pub fn new(size: u64, cluster_bits: Option<u32>, backing: Option<&str>) -> Self {
        // QEMU's defaults. With a backing file it uses the smallest clusters, because it does
        // not copy the rest of a cluster that is written in part.
        let (cluster_bits, l2_bits) = match (cluster_bits, backing) {
            (Some(bits), _) => (bits, bits - 3),
            (None, Some(_)) => (9, 12),
            (None, None) => (12, 9),
        };
        let name = backing.map_or(0, str::len);
        QcowHeader {
            size,
            cluster_bits,
            l2_bits,
            l1: (LEN + name).next_multiple_of(8) as u64,
            backing: backing.map(str::to_owned),
        }
    }
}

//! The header of a qcow2 image (QEMU, docs/interop/qcow2.txt). It is checked before imago
//! opens the image, because imago opens an encrypted image as a plain one, for example, and
//! does not limit the size of tables.

use std::io;

use super::super::metadata_file::MetadataFile;

/// The first four bytes of qcow and qcow2 images.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Length of a version 2 header, and of the part that all versions have.
pub const V2_LEN: usize = 72;
const V3_LEN: usize = 104;
/// Offset of the size of the disk.
pub const SIZE: usize = 24;
/// Offset of the autoclear bits.
pub const AUTOCLEAR: u64 = 88;
/// The most entries of an L1 or refcount table: the limits of QEMU and imago.
const MAX_ENTRIES: u64 = 4 << 20;
const MAX_SNAPSHOTS: u32 = 65_536;

const REPAIR: &str = "qemu-img check -r all repairs it";

/// The fields of a header that matter here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size in bytes.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits.
    pub refcount_order: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Offset and number of entries of the L1 table.
    pub l1: (u64, u64),
    /// Offset and number of entries of the refcount table.
    pub refcounts: (u64, u64),
    /// Name of the backing file, and its format if the image says it.
    pub backing: Option<(String, Option<String>)>,
    /// Feature bits that a program must clear when it writes and does not know them.
    pub autoclear: u64,
}

impl Qcow2Header {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// The file cannot be read, or the image is invalid or not supported. The error says what
    /// to do.
    pub fn read(image_file: &MetadataFile, writable: bool) -> io::Result<Self> {
        let len = image_file.refresh_len()?;
        let mut bytes = vec![0; len.min(V3_LEN as u64) as usize];
        image_file.read(&mut bytes, 0)?;
        let refused = |why| io::Error::new(io::ErrorKind::InvalidData, why);
        let cluster = cluster_bits(&bytes).map_err(refused)?;
        bytes.resize(len.min(1 << cluster) as usize, 0);
        image_file.read(&mut bytes, 0)?;
        parse(&bytes, len, writable).map_err(refused)
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    if let Some(found) = bytes.get(at..at.saturating_add(4)) {
        word.copy_from_slice(found);
    }
    u32::from_be_bytes(word)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at.saturating_add(4)))
}

/// The positions of L1 table and refcount table in a version 2 header: offset and number of
/// entries, offset and number of clusters.
pub fn pointers(header: &[u8]) -> ((u64, u64), (u64, u64)) {
    (
        (be64(header, 40), be32(header, 36).into()),
        (be64(header, 48), be32(header, 56).into()),
    )
}

fn cluster_bits(bytes: &[u8]) -> Result<u32, String> {
    if bytes.get(..4) != Some(&MAGIC) {
        return Err("it is not a qcow2 image".into());
    }
    match be32(bytes, 4) {
        1 => return Err("it is a qcow image of version 1 (--format qcow)".into()),
        2 | 3 => {}
        version => return Err(format!("version {version} of qcow2 is not supported")),
    }
    let needed = if be32(bytes, 4) == 2 { V2_LEN } else { V3_LEN };
    if bytes.len() < needed {
        return Err("its header is incomplete".into());
    }
    match be32(bytes, 20) {
        bits @ 9..=21 => Ok(bits),
        bits => Err(format!("clusters of 2^{bits} bytes are not supported")),
    }
}

/// Decodes and checks the first cluster of an image, `bytes`, whose file has `len` bytes.
fn parse(bytes: &[u8], len: u64, writable: bool) -> Result<Qcow2Header, String> {
    let cluster_bits = cluster_bits(bytes)?;
    let cluster = 1u64 << cluster_bits;
    let version = be32(bytes, 4);
    match be32(bytes, 32) {
        0 => {}
        1 | 2 => return Err("it is encrypted, which is not supported".into()),
        method => return Err(format!("encryption method {method} is not supported")),
    }

    let mut header = Qcow2Header {
        version,
        cluster_bits,
        refcount_order: 4,
        size: be64(bytes, SIZE),
        l1: (be64(bytes, 40), be32(bytes, 36).into()),
        refcounts: (be64(bytes, 48), 0),
        backing: None,
        autoclear: 0,
    };
    let mut extensions = V2_LEN;
    if version == 3 {
        incompatible(be64(bytes, 72), bytes)?;
        header.autoclear = be64(bytes, AUTOCLEAR as usize);
        header.refcount_order = be32(bytes, 96);
        if header.refcount_order > 6 {
            let order = header.refcount_order;
            return Err(format!("refcounts of 2^{order} bits are not supported"));
        }
        extensions = be32(bytes, 100) as usize;
        if extensions < V3_LEN || extensions as u64 > cluster || !extensions.is_multiple_of(8) {
            return Err(format!(
                "its header has an invalid length, {extensions} bytes"
            ));
        }
    }
    let found = Extensions::parse(bytes, extensions)?;
    if found.bitmaps && header.autoclear & 1 != 0 && writable {
        return Err("it has persistent bitmaps, which are not updated here \
             (remove them with qemu-img bitmap --remove, or use --read-only)"
            .into());
    }
    header.backing = backing(bytes, cluster)?.map(|name| (name, found.format));
    tables(&mut header, bytes, len)?;
    Ok(header)
}

fn incompatible(bits: u64, bytes: &[u8]) -> Result<(), String> {
    if bits & 1 != 0 {
        return Err(format!("it was not closed properly: {REPAIR}"));
    }
    if bits & 2 != 0 {
        return Err(format!("it is marked as damaged: {REPAIR}"));
    }
    if bits & 4 != 0 {
        return Err("its data is in another file (data_file), which is not supported".into());
    }
    if bits & 8 != 0 {
        let kind = bytes.get(V3_LEN).copied().unwrap_or(0);
        return Err(format!(
            "compression other than zlib is not supported (type {kind})"
        ));
    }
    if bits & 16 != 0 {
        return Err("extended L2 entries (extended_l2) are not supported".into());
    }
    if bits != 0 {
        return Err(format!("it has unknown features ({bits:#x})"));
    }
    Ok(())
}

/// The header extensions that matter here.
#[derive(Default)]
struct Extensions {
    format: Option<String>,
    bitmaps: bool,
}

impl Extensions {
    fn parse(bytes: &[u8], mut at: usize) -> Result<Self, String> {
        const END: u32 = 0;
        const BACKING_FORMAT: u32 = 0xe279_2aca;
        const FEATURE_NAMES: u32 = 0x6803_f857;
        const BITMAPS: u32 = 0x2385_2875;
        const ENCRYPTION: u32 = 0x0537_be77;
        let mut found = Extensions::default();
        loop {
            let bad = || "its header extensions have no end".to_owned();
            let head = bytes.get(at..).filter(|rest| rest.len() >= 8);
            let head = head.ok_or_else(bad)?;
            let (kind, len) = (be32(head, 0), be32(head, 4) as usize);
            let data = head[8..].get(..len).ok_or_else(bad)?;
            match kind {
                END => return Ok(found),
                BACKING_FORMAT => {
                    let name = String::from_utf8(data.to_vec());
                    let name = name.map_err(|_| "the format of its backing file is not UTF-8")?;
                    if found.format.replace(name).is_some() {
                        return Err("its backing file has two formats".into());
                    }
                }
                // imago panics on an incomplete entry.
                FEATURE_NAMES if !len.is_multiple_of(48) => {
                    return Err("its table of feature names is incomplete".into());
                }
                BITMAPS => found.bitmaps = true,
                ENCRYPTION => return Err("it is encrypted, which is not supported".into()),
                _ => {}
            }
            at += 8 + len.next_multiple_of(8); // both are at most a cluster
        }
    }
}

fn backing(bytes: &[u8], cluster: u64) -> Result<Option<String>, String> {
    let (offset, len) = (be64(bytes, 8), be32(bytes, 16) as usize);
    if offset == 0 {
        return Ok(None);
    }
    let bad = || "the name of its backing file is at an invalid offset".to_owned();
    if len == 0 || len > 1023 || offset >= cluster {
        return Err(bad());
    }
    let name = bytes.get(offset as usize..).and_then(|b| b.get(..len));
    String::from_utf8(name.ok_or_else(bad)?.to_vec())
        .map(Some)
        .map_err(|_| "the name of its backing file is not UTF-8".to_owned())
}

/// Checks the positions of the tables.
fn tables(header: &mut Qcow2Header, bytes: &[u8], len: u64) -> Result<(), String> {
    let bits = header.cluster_bits;
    let cluster = 1u64 << bits;
    let damaged = |what: &str| format!("{what}: {REPAIR}");
    let lies = |offset: u64, size: u64, end: u64| {
        let inside = offset.checked_add(size).is_some_and(|last| last <= end);
        offset >= cluster && offset.is_multiple_of(cluster) && inside
    };

    if header.size == 0 {
        return Err("it is empty: a disk has at least one sector".into());
    }
    // An L1 entry maps as many clusters as an L2 table has entries.
    let needed = header.size.div_ceil(1 << (2 * bits - 3));
    if header.size > i64::MAX as u64 || needed > MAX_ENTRIES {
        let size = header.size;
        return Err(format!("its disk is too large, {size} bytes"));
    }
    let (l1, entries) = header.l1;
    if entries < needed || entries > MAX_ENTRIES || !lies(l1, entries * 8, len) {
        return Err(damaged("its L1 table is at an invalid offset"));
    }
    let clusters = u64::from(be32(bytes, 56));
    // The last cluster of a file may be incomplete.
    let end = len.next_multiple_of(cluster);
    let size = clusters * cluster; // less than 2^32 * 2^21
    if clusters == 0 || size / 8 > MAX_ENTRIES || !lies(header.refcounts.0, size, end) {
        return Err(damaged("its refcount table is at an invalid offset"));
    }
    header.refcounts.1 = size / 8;
    let (snapshots, at) = (be32(bytes, 60), be64(bytes, 64));
    if snapshots > MAX_SNAPSHOTS || (snapshots > 0 && !lies(at, 1, len)) {
        return Err(damaged("its table of snapshots is at an invalid offset"));
    }
    Ok(())
}

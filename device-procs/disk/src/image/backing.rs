//! Backing files: what is not allocated in an image is read from there. An image from an
//! untrusted source may name any file that we can read, so backing files are opened only if
//! the user allows it (`--backing allow`).

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use imago::FormatAccess;
use imago::raw::Raw;

use super::metadata_file::MetadataFile;
use super::qcow2::{self, storage::Storage};
use super::{BackingPolicy, ImageFormat, ImageOrigin, looks_like, not_a_disk, open_file};
use crate::lock;

/// The longest chain of backing files. QEMU has no limit; here each one takes memory.
const MAX_DEPTH: u32 = 16;

/// Opens the backing file `name` of an image, read-only. Without a format it is raw, unless
/// it begins like another format.
///
/// # Errors
/// The file cannot be used. The error names it.
pub fn open(
    name: &str,
    format: Option<&str>,
    origin: &ImageOrigin<'_>,
) -> io::Result<FormatAccess<Storage>> {
    let error = |why: String| io::Error::other(format!("its backing file {name}: {why}"));
    if origin.backing == BackingPolicy::Deny {
        return Err(error(
            "backing files are not opened by default (use --backing allow)".into(),
        ));
    }
    if origin.depth >= MAX_DEPTH {
        return Err(error(format!(
            "the image has more than {MAX_DEPTH} backing files"
        )));
    }
    // "nbd:...", "json:{...}": QEMU also allows names that are not paths.
    let protocol = name.split('/').next().is_some_and(|it| it.contains(':'));
    let path = match (protocol, origin.directory) {
        (true, _) => return Err(error("its name is not a path".into())),
        (false, Some(directory)) => directory.join(name),
        (false, None) if Path::new(name).is_absolute() => name.into(),
        (false, None) => {
            return Err(error(
                "its name is relative to the image, whose path is not known".into(),
            ));
        }
    };
    let open = || {
        let file = open_file(&path, true)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(not_a_disk());
        }
        if origin.lock {
            lock::take(&file, lock::ImageAccess::Read)?;
        }
        let display = path.display().to_string();
        let format = match (format, looks_like(&file)) {
            (Some(format), _) => format,
            (None, None) => "raw",
            (None, Some(other)) => {
                return Err(io::Error::other(format!(
                    "it begins like an image of format {other}, but the image does not say its format"
                )));
            }
        };
        match format.parse() {
            Ok(ImageFormat::Raw) => {
                let storage = Storage::new(MetadataFile::new(file, &display)?);
                Ok(FormatAccess::new(Raw::open_image(storage, false)?))
            }
            Ok(ImageFormat::Qcow2) => {
                let backing_origin = ImageOrigin {
                    name: &display,
                    directory: path.parent(),
                    depth: origin.depth + 1,
                    ..*origin
                };
                Ok(qcow2::access(file, &backing_origin, false)?.access)
            }
            _ => Err(io::Error::other(format!(
                "format {format} is not supported in a backing file"
            ))),
        }
    };
    open().map_err(|e| error(e.to_string()))
}

/// The error for an image that does not say the format of its backing file `name`.
pub fn without_format(name: &str, origin: &ImageOrigin<'_>) -> io::Error {
    match origin.backing {
        BackingPolicy::Deny => open(name, None, origin).err().unwrap_or_else(not_a_disk),
        BackingPolicy::Allow => io::Error::other(format!(
            "its backing file {name}: the image does not say its format \
             (qemu-img rebase -u -b {name} -F FORMAT sets it)"
        )),
    }
}

//! Files that images lie on: what an image has nothing of is read from there. An image may
//! come from anywhere and name any file that we may read, so this is only done for those
//! who ask for it.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use imago::FormatAccess;
use imago::raw::Raw;

use super::metadata_file::MetadataFile;
use super::qcow2::{self, storage::Storage};
use super::{BackingPolicy, ImageFormat, ImageOrigin, looks_like, not_a_disk, open_file};
use crate::lock;

/// Images on top of each other. QEMU has no limit; each has memory of its own here.
const MOST: u32 = 16;

/// Opens the file `name` that an image names as its backing file, read-only. Without a
/// format it is raw, unless it looks like something else.
///
/// # Errors
/// One line that says which file and why not.
pub fn open(
    name: &str,
    format: Option<&str>,
    origin: &ImageOrigin<'_>,
) -> io::Result<FormatAccess<Storage>> {
    let on = |why: String| io::Error::other(format!("its backing file {name}: {why}"));
    if origin.backing == BackingPolicy::Deny {
        return Err(on(
            "no other files are opened unless asked for (--backing allow)".into(),
        ));
    }
    if origin.depth >= MOST {
        return Err(on(format!("more than {MOST} images on top of each other")));
    }
    // "nbd:...", "json:{...}": QEMU's ways to name what is no file.
    let protocol = name.split('/').next().is_some_and(|it| it.contains(':'));
    let path = match (protocol, origin.directory) {
        (true, _) => return Err(on("it is not named by a path".into())),
        (false, Some(directory)) => directory.join(name),
        (false, None) if Path::new(name).is_absolute() => name.into(),
        (false, None) => {
            return Err(on(
                "it is named relative to the image, whose place is not known".into(),
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
        let said = path.display().to_string();
        let format = match (format, looks_like(&file)) {
            (Some(format), _) => format,
            (None, None) => "raw",
            (None, Some(other)) => {
                return Err(io::Error::other(format!(
                    "it begins like an image of format {other}, and nothing says what it is"
                )));
            }
        };
        match format.parse() {
            Ok(ImageFormat::Raw) => {
                let storage = Storage::new(MetadataFile::new(file, &said)?);
                Ok(FormatAccess::new(Raw::open_image(storage, false)?))
            }
            Ok(ImageFormat::Qcow2) => {
                let below = ImageOrigin {
                    name: &said,
                    directory: path.parent(),
                    depth: origin.depth + 1,
                    ..*origin
                };
                Ok(qcow2::access(file, &below, false)?.access)
            }
            _ => Err(io::Error::other(format!(
                "format {format} is not supported in a backing file"
            ))),
        }
    };
    open().map_err(|error| on(error.to_string()))
}

/// An image that does not say what its backing file `name` is.
pub fn without_format(name: &str, origin: &ImageOrigin<'_>) -> io::Error {
    match origin.backing {
        BackingPolicy::Deny => open(name, None, origin).err().unwrap_or_else(not_a_disk),
        BackingPolicy::Allow => io::Error::other(format!(
            "its backing file {name}: the image does not say which format that has \
             (qemu-img rebase -u -b {name} -F FORMAT)"
        )),
    }
}

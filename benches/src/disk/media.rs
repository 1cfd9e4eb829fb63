//! The images on each medium.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cases::{Case, Format, IMAGE, Medium};

/// All images, filled with non-zero bytes. Dropping this removes them.
pub struct Media {
    memory: tempfile::TempDir,
    disk: tempfile::TempDir,
    qcow2: bool,
}

impl Media {
    /// Makes them on tmpfs and below `directory`.
    pub fn new(directory: &Path) -> Self {
        let media = Media {
            memory: tempfile::tempdir_in("/dev/shm").expect("tmpfs at /dev/shm"),
            disk: tempfile::tempdir_in(directory).expect("room in the target directory"),
            qcow2: has_qemu_img(),
        };
        if !media.qcow2 {
            println!("device-disk or qemu-img cannot do qcow2: its cases are left out");
        }
        for directory in [media.memory.path(), media.disk.path()] {
            let raw = directory.join("raw");
            fill(&raw);
            if media.qcow2 {
                convert(&raw, &directory.join("qcow2"));
            }
        }
        media
    }

    /// Whether there is one for `case`.
    pub fn has(&self, case: &Case) -> bool {
        case.format == Format::Raw || self.qcow2
    }

    /// The one for `case`.
    pub fn path(&self, case: &Case) -> PathBuf {
        let directory = match case.medium {
            Medium::Memory => &self.memory,
            Medium::Direct => &self.disk,
        };
        directory.path().join(match case.format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

fn has_qemu_img() -> bool {
    Command::new("qemu-img").arg("--version").output().is_ok()
}

fn fill(path: &Path) {
    let piece: Vec<u8> = (0..1u32 << 20).map(|i| (i % 251) as u8 | 1).collect();
    let mut file = File::create(path).expect("a new file");
    for _ in 0..IMAGE / piece.len() as u64 {
        file.write_all(&piece).expect("room for the image");
    }
    file.sync_all().expect("the image is on its medium");
}

fn convert(raw: &Path, qcow2: &Path) {
    let status = Command::new("qemu-img")
        .args(["convert", "-q", "-f", "raw", "-O", "qcow2"])
        .args([raw, qcow2])
        .status();
    assert!(status.is_ok_and(|it| it.success()), "qemu-img convert");
    let file = File::open(qcow2).expect("it was made");
    file.sync_all().expect("the image is on its medium");
}

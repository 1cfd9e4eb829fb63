//! An I/O error fails only the request that caused it.

use std::fs::File;
use std::path::Path;

use outrigger_tests::binaries::binary;
use outrigger_tests::disk::{SECTOR, pattern_of};
use outrigger_tests::guest::{EVENT_IDX, Guest};
use outrigger_tests::loops::Loop;
use outrigger_tests::process::Launch;
use virtio_bindings::virtio_blk::*;

use crate::cache::has_direct;
use crate::subject::{Disk, FLUSH, SIZE};

const OK: u32 = VIRTIO_BLK_S_OK;
const ERROR: u32 = VIRTIO_BLK_S_IOERR;

/// Another process truncates the file: only requests for the missing part fail.
#[test]
fn requests_beyond_the_end_of_a_truncated_file_fail() {
    for mode in ["writeback", "none"] {
        if mode == "none" && !has_direct() {
            continue;
        }
        let mut disk = Disk::new(&["--cache", mode]);
        let file = File::options().write(true).open(&disk.image).unwrap();
        file.set_len(SIZE as u64 / 2).unwrap();
        let half = (SIZE / SECTOR / 2) as u64;
        for (sector, status) in [(half - 8, OK), (half - 4, ERROR), (half, ERROR), (0, OK)] {
            let got = disk.receive(VIRTIO_BLK_T_IN, sector, 8 * SECTOR).0;
            assert_eq!(got, status, "{mode}, sector {sector}");
        }
        let log = disk.process.log();
        assert!(log.contains("request failed queue=0 request="), "{log}");
        assert!(log.contains("operation=\"read\""), "{log}");
        // Writes of the guest make the file longer again.
        let data = vec![0x77; 4096];
        assert_eq!(disk.send(VIRTIO_BLK_T_OUT, half, &data), OK);
        assert_eq!(disk.receive(VIRTIO_BLK_T_IN, half, 4096), (OK, data));
    }
}

/// A block device that fails in its second half: EIO.
#[test]
fn an_io_error_fails_only_its_request() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), pattern_of(0, SIZE)).unwrap();
    let Some(device) = Loop::new(file.path()) else {
        return;
    };
    for mode in ["writeback", "none"] {
        file.as_file().set_len(SIZE as u64).unwrap();
        let process = Launch::new("device-disk")
            .args(["--cache", mode, "--blk-file", device.path()])
            .listening();
        let guest = Guest::boot(process.connect(), FLUSH | EVENT_IDX, 1);
        let mut disk = Disk {
            image: file.path().to_owned(),
            process,
            guest,
        };
        file.as_file().set_len(SIZE as u64 / 2).unwrap();
        let beyond = (SIZE / SECTOR * 3 / 4) as u64;
        for sector in [8, beyond, 16, beyond + 64, 24] {
            let status = disk.receive(VIRTIO_BLK_T_IN, sector, 8 * SECTOR).0;
            let expected = if sector < beyond { OK } else { ERROR };
            assert_eq!(status, expected, "{mode}, sector {sector}");
        }
        let log = disk.process.log();
        assert!(
            log.contains("operation=\"read\" error=Input/output error"),
            "{log}"
        );
    }
}

/// A file system without room for all of a sparse image: ENOSPC, until it has room again.
#[test]
fn a_full_file_system_fails_only_requests_that_need_space() {
    for format in ["raw", "qcow2", "qcow"] {
        let launch = Launch::program(Path::new("unshare"));
        let place = launch.directory().join("place");
        let socket = launch.directory().join("socket");
        std::fs::create_dir(&place).unwrap();
        // A file system of its own, which is unmounted with the process.
        let script = "mount -t tmpfs -o size=640k none \"$1\" && \
             \"$2\" create \"$1/image\" --format \"$3\" --size 1M && \
             exec \"$2\" --format \"$3\" --blk-file \"$1/image\" --socket-path \"$4\" --ready-fd \"$6\"";
        let process = launch
            .args([
                "--user",
                "--map-root-user",
                "--mount",
                "sh",
                "-c",
                script,
                "sh",
            ])
            .args([&*place, &*binary("device-disk")])
            .args([format.as_ref(), socket.as_os_str()])
            .ready();
        let guest = Guest::boot(process.connect(), FLUSH | EVENT_IDX, 1);
        let mut disk = Disk {
            image: place.join("image"),
            process,
            guest,
        };
        let data = vec![0x5a; 32 << 10];
        let sector = |number: usize| (number * data.len() / SECTOR) as u64;
        let chunks = SIZE / data.len();
        let done: Vec<bool> = (0..chunks)
            .map(|number| disk.send(VIRTIO_BLK_T_OUT, sector(number), &data) == OK)
            .collect();
        let (good, bad) = (
            done.iter().position(|&ok| ok),
            done.iter().position(|&ok| !ok),
        );
        let (Some(good), Some(bad)) = (good, bad) else {
            panic!("{format}: {done:?}");
        };
        let log = disk.process.log();
        assert!(log.contains("No space left on device"), "{format}: {log}");
        // Allocated ranges are read and written as before. The others have not changed.
        for (number, &ok) in done.iter().enumerate() {
            let (status, got) = disk.receive(VIRTIO_BLK_T_IN, sector(number), data.len());
            assert_eq!(status, OK, "{format}, {number}");
            assert!(!ok || got == data, "{format}, {number}");
        }
        assert_eq!(disk.send(VIRTIO_BLK_T_OUT, sector(good), &data), OK);
        assert_eq!(disk.send(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        if format == "raw" {
            // The file system has room again.
            let zeroes = outrigger_tests::disk::range(sector(good), sector(1) as u32, 0);
            assert_eq!(disk.send(VIRTIO_BLK_T_DISCARD, 0, &zeroes), OK);
            assert_eq!(disk.send(VIRTIO_BLK_T_OUT, sector(bad), &data), OK);
            let got = disk.receive(VIRTIO_BLK_T_IN, sector(bad), data.len());
            assert_eq!(got, (OK, data));
        }
    }
}

//! Requests of every type and layout.

use std::os::unix::fs::MetadataExt;

use outrigger_tests::disk::{Request, SECTOR, header, pattern_of, range};
use outrigger_tests::guest::{EVENT_IDX, Guest};
use outrigger_tests::process::Launch;
use outrigger_tests::queue::Buffer;
use outrigger_tests::ram::Ram;
use virtio_bindings::virtio_blk::*;

use crate::subject::{Disk, FLUSH, SECTORS, SIZE};

#[test]
fn reads_the_image() {
    let mut disk = Disk::new(&[]);
    for (sector, len) in [(0, 512), (1, 4096), (SECTORS - 1, 512), (0, SIZE)] {
        let (status, data) = disk.receive(VIRTIO_BLK_T_IN, sector, len);
        assert_eq!(status, VIRTIO_BLK_S_OK);
        assert!(data == pattern_of(sector as usize * SECTOR, len));
    }
}

#[test]
fn writes_the_image_and_flushes_it() {
    let mut disk = Disk::new(&[]);
    let data = vec![0x5a; 3 * SECTOR];
    assert_eq!(disk.send(VIRTIO_BLK_T_OUT, 7, &data), VIRTIO_BLK_S_OK);
    assert_eq!(disk.send(VIRTIO_BLK_T_FLUSH, 0, &[]), VIRTIO_BLK_S_OK);
    let mut expected = pattern_of(0, SIZE);
    expected[7 * SECTOR..10 * SECTOR].copy_from_slice(&data);
    assert!(disk.file() == expected);
    assert_eq!(disk.receive(VIRTIO_BLK_T_IN, 7, 3 * SECTOR).1, data);
}

/// If a file ends within a sector, the disk ends with that sector, as in QEMU.
#[test]
fn pads_an_incomplete_last_sector() {
    let mut disk = Disk::start(10_000, &[], 1);
    let log = disk.process.log();
    assert!(log.contains("240 zero bytes"), "{log}");
    assert_eq!(disk.guest.config(0, 8), 20u64.to_le_bytes());
    let last = 19 * SECTOR;
    let mut expected = pattern_of(last, 10_000 - last);
    expected.resize(SECTOR, 0);
    let (status, data) = disk.receive(VIRTIO_BLK_T_IN, 19, SECTOR);
    assert_eq!((status, data), (VIRTIO_BLK_S_OK, expected));
    assert_eq!(disk.receive(VIRTIO_BLK_T_IN, 20, 512).0, VIRTIO_BLK_S_IOERR);
    // The file does not grow until the guest writes there.
    let data = [0x5a; SECTOR];
    assert_eq!(disk.send(VIRTIO_BLK_T_OUT, 18, &data), VIRTIO_BLK_S_OK);
    assert_eq!(disk.file().len(), 10_000);
    assert_eq!(disk.send(VIRTIO_BLK_T_OUT, 19, &data), VIRTIO_BLK_S_OK);
    assert_eq!(disk.file()[18 * SECTOR..], [0x5a; 2 * SECTOR]);
    assert_eq!(disk.receive(VIRTIO_BLK_T_IN, 0, 20 * SECTOR).1, disk.file());
}

#[test]
fn returns_its_serial_number() {
    let mut disk = Disk::new(&["--serial", "twenty-bytes-serial!"]);
    let (status, id) = disk.receive(VIRTIO_BLK_T_GET_ID, 0, 20);
    assert_eq!(
        (status, &id[..]),
        (VIRTIO_BLK_S_OK, &b"twenty-bytes-serial!"[..])
    );
    // Buffers that are longer or shorter than the serial number.
    assert_eq!(disk.receive(VIRTIO_BLK_T_GET_ID, 0, 6).1, b"twenty");
    assert_eq!(disk.receive(VIRTIO_BLK_T_GET_ID, 0, 30).1[..20], id);

    let mut disk = Disk::new(&["--serial", "x"]);
    assert_eq!(
        disk.receive(VIRTIO_BLK_T_GET_ID, 0, 20).1,
        *b"x\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
}

#[test]
fn deallocates_discarded_ranges() {
    let mut disk = Disk::new(&[]);
    if !disk.offers(VIRTIO_BLK_F_DISCARD) {
        return; // the file system cannot punch holes
    }
    let before = std::fs::metadata(&disk.image).unwrap();
    for range in [range(0, 256, 0), range(512, 1024, 0)] {
        assert_eq!(disk.send(VIRTIO_BLK_T_DISCARD, 0, &range), VIRTIO_BLK_S_OK);
    }
    let after = std::fs::metadata(&disk.image).unwrap();
    assert_eq!(after.len(), before.len());
    assert!(after.blocks() < before.blocks());
    // The range in between has not changed.
    let (_, kept) = disk.receive(VIRTIO_BLK_T_IN, 256, 256 * SECTOR);
    assert!(kept == pattern_of(256 * SECTOR, 256 * SECTOR));
}

#[test]
fn writes_zeroes() {
    let mut disk = Disk::new(&[]);
    let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    for range in [range(1, 3, 0), range(100, 64, unmap), range(9, 0, 0)] {
        assert_eq!(
            disk.send(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range),
            VIRTIO_BLK_S_OK
        );
    }
    let mut expected = pattern_of(0, SIZE);
    expected[SECTOR..4 * SECTOR].fill(0);
    expected[100 * SECTOR..164 * SECTOR].fill(0);
    assert!(disk.file() == expected);
}

/// tmpfs does not support FALLOC_FL_ZERO_RANGE, so the process writes zeros.
#[test]
fn writes_zeroes_on_a_file_system_without_fallocate() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let image = directory.path().join("image");
    std::fs::write(&image, pattern_of(0, SIZE)).unwrap();
    let process = Launch::new("device-disk")
        .args(["--blk-file".as_ref(), image.as_os_str()])
        .listening();
    let guest = Guest::boot(process.connect(), FLUSH | EVENT_IDX, 1);
    let mut disk = Disk {
        image,
        process,
        guest,
    };
    let ranges = range(1, 300, 0);
    assert_eq!(
        disk.send(VIRTIO_BLK_T_WRITE_ZEROES, 0, &ranges),
        VIRTIO_BLK_S_OK
    );
    let mut expected = pattern_of(0, SIZE);
    expected[SECTOR..301 * SECTOR].fill(0);
    assert!(disk.file() == expected);
}

#[test]
fn refuses_invalid_ranges() {
    let mut disk = Disk::new(&[]);
    let invalid = [
        range(SECTORS, 1, 0),
        range(SECTORS - 1, 2, 0),
        range(u64::MAX, 1, 0),
        range(u64::MAX - 1, u32::MAX, 0),
        range(u64::MAX / 512 + 1, 8, 0),
        range(0, u32::MAX, 0),
        range(0, 32_769, 0),
        range(0, 1, 0)[..15].to_vec(),
        range(0, 1, 0).repeat(2),
        [range(0, 1, 0), vec![0]].concat(),
        vec![],
    ];
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for data in &invalid {
            assert_eq!(disk.send(kind, 0, data), VIRTIO_BLK_S_IOERR, "{data:?}");
        }
        // Unknown flags are not supported.
        assert_eq!(disk.send(kind, 0, &range(0, 1, 2)), VIRTIO_BLK_S_UNSUPP);
    }
    // If one of several ranges is invalid, none is zeroed.
    assert!(disk.file() == pattern_of(0, SIZE));
}

#[test]
fn refuses_writes_to_a_read_only_disk() {
    let mut disk = Disk::new(&["--read-only"]);
    assert!(disk.offers(VIRTIO_BLK_F_RO));
    assert!(!disk.offers(VIRTIO_BLK_F_DISCARD) && !disk.offers(VIRTIO_BLK_F_WRITE_ZEROES));
    let range = range(0, 8, 0);
    for (kind, data) in [
        (VIRTIO_BLK_T_OUT, &[0; SECTOR][..]),
        (VIRTIO_BLK_T_DISCARD, &range),
        (VIRTIO_BLK_T_WRITE_ZEROES, &range),
    ] {
        assert_eq!(disk.send(kind, 0, data), VIRTIO_BLK_S_IOERR);
    }
    assert_eq!(disk.send(VIRTIO_BLK_T_FLUSH, 0, &[]), VIRTIO_BLK_S_OK);
    assert_eq!(
        disk.receive(VIRTIO_BLK_T_IN, 0, 512),
        (VIRTIO_BLK_S_OK, pattern_of(0, 512))
    );
    assert!(disk.file() == pattern_of(0, SIZE));
}

#[test]
fn refuses_requests_beyond_the_end_of_the_disk() {
    let mut disk = Disk::new(&[]);
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX - 1, 4096),
        (u64::MAX / 512, 4096),
        (1 << 55, 512), // times 512, this is 0
        (0, 511),
        (0, 513),
    ] {
        let (status, data) = disk.receive(VIRTIO_BLK_T_IN, sector, len);
        assert_eq!(status, VIRTIO_BLK_S_IOERR, "read of {len} at {sector}");
        assert_eq!(data, vec![0xcc; len]);
        let status = disk.send(VIRTIO_BLK_T_OUT, sector, &vec![0; len]);
        assert_eq!(status, VIRTIO_BLK_S_IOERR, "write of {len} at {sector}");
    }
    assert!(disk.file() == pattern_of(0, SIZE));
}

#[test]
fn refuses_unknown_request_types() {
    let mut disk = Disk::new(&[]);
    for kind in [2, 5, 7, 12, 14, 1 << 31, u32::MAX] {
        assert_eq!(disk.receive(kind, 0, 512).0, VIRTIO_BLK_S_UNSUPP);
        assert_eq!(disk.send(kind, 0, &[1; 512]), VIRTIO_BLK_S_UNSUPP);
    }
}

/// `buffer` as a chain of buffers with these lengths, repeated.
fn split(buffer: Buffer, lengths: &[u32]) -> Vec<Buffer> {
    let mut pieces = Vec::new();
    let mut at = 0;
    for &len in lengths.iter().cycle() {
        let len = len.min(buffer.len - at);
        if at == buffer.len {
            return pieces;
        }
        pieces.push(Buffer {
            address: buffer.address + u64::from(at),
            len,
            ..buffer
        });
        at += len;
    }
    pieces
}

#[test]
fn accepts_any_split_of_header_data_and_status() {
    let mut disk = Disk::new(&[]);
    let ram = std::sync::Arc::clone(&disk.guest.ram);
    let queue = &mut disk.guest.queues[0];
    for lengths in [
        &[16][..],
        &[1],
        &[15, 1],
        &[3, 7, 60],
        &[40],
        &[700],
        &[5000],
    ] {
        // A read: data and status are contiguous.
        let header = |kind| ram.put(&header(kind, 3));
        let readable = split(Buffer::readable(header(VIRTIO_BLK_T_IN), 16), lengths);
        let answer = ram.put(&[0xee; 513]);
        let stretch = split(Buffer::writable(answer, 513), &[lengths, &[100]].concat());
        let used = queue.run(&[readable, stretch].concat());
        assert_eq!(used.len, 513);
        let mut expected = pattern_of(3 * SECTOR, 512);
        expected.push(VIRTIO_BLK_S_OK as u8);
        assert_eq!(ram.get(answer, 513), expected, "{lengths:?}");

        // A write of the same data: header and data are contiguous.
        let mut bytes = outrigger_tests::disk::header(VIRTIO_BLK_T_OUT, 3).to_vec();
        bytes.extend(&expected[..512]);
        let readable = Buffer::readable(ram.put(&bytes), 528);
        let mut chain = split(readable, &[lengths, &[100]].concat());
        chain.push(Buffer::writable(answer, 1));
        ram.set(answer, &[0xee]);
        assert_eq!(queue.run(&chain).len, 1);
        assert_eq!(ram.get(answer, 1), [VIRTIO_BLK_S_OK as u8], "{lengths:?}");
    }
    assert!(disk.file() == pattern_of(0, SIZE));
}

#[test]
fn returns_requests_without_header_or_status() {
    let mut disk = Disk::new(&[]);
    let ram = std::sync::Arc::clone(&disk.guest.ram);
    let queue = &mut disk.guest.queues[0];
    let header = Buffer::readable(ram.put(&header(VIRTIO_BLK_T_IN, 0)), 16);
    // Without a status byte no error can be reported, but the buffer is returned.
    assert_eq!(queue.run(&[header]).len, 0);
    let status = Buffer::writable(ram.put(&[0xee]), 1);
    let short = Buffer { len: 15, ..header };
    for chain in [&[status][..], &[short, status]] {
        assert_eq!(queue.run(chain).len, 1);
        assert_eq!(ram.get(status.address, 1), [VIRTIO_BLK_S_IOERR as u8]);
    }
    assert_eq!(disk.receive(VIRTIO_BLK_T_IN, 0, 512).0, VIRTIO_BLK_S_OK);
}

#[test]
fn refuses_sector_numbers_that_overflow() {
    let Disk { process, guest, .. } = Disk::new(&[]);
    drop(guest);
    // One writable byte more than a used element can count.
    let ram = Ram::new(&[(0, 1 << 20), (1 << 32, (2 << 30) + (1 << 20))]);
    let mut guest = Guest::new(process.connect(), ram);
    guest.negotiate(EVENT_IDX);
    guest.share_memory();
    guest.add_queue(64);
    let header = Buffer::readable(guest.ram.put(&header(VIRTIO_BLK_T_IN, 0)), 16);
    let half = Buffer::writable((1 << 32) + (1 << 20), 1 << 31);
    guest.queues[0].run(&[header, half, half]);
    let less = Buffer {
        len: half.len - 17,
        ..half
    };
    assert_eq!(
        guest.queues[0].run(&[header, half, less]).len,
        u32::MAX - 16
    );
    let more = Buffer::writable(half.address, 4096);
    guest.queues[0].run(&[header, half, half, half, more]);
    assert!(process.is_running());
    let data = Buffer::writable(guest.ram.alloc(512), 512);
    let request = Request::new(&guest.ram, VIRTIO_BLK_T_IN, 0, &[data]);
    assert_eq!(
        request.run(&guest.ram, &mut guest.queues[0]),
        VIRTIO_BLK_S_OK
    );
}

#[test]
fn serves_many_queues_in_parallel() {
    const QUEUES: usize = 4;
    let mut disk = Disk::start(SIZE, &["--queues", "4"], QUEUES);
    assert!(disk.offers(VIRTIO_BLK_F_MQ));
    assert_eq!(disk.guest.config(34, 2), [QUEUES as u8, 0]);
    let ram = std::sync::Arc::clone(&disk.guest.ram);
    // Each queue writes a quarter of the disk, in parallel.
    let quarter = SIZE / QUEUES;
    std::thread::scope(|scope| {
        for (number, queue) in disk.guest.queues.iter_mut().enumerate() {
            let ram = &ram;
            scope.spawn(move || {
                let data = ram.put(&vec![number as u8 + 1; quarter]);
                for from in (0..quarter).step_by(8192) {
                    let data = Buffer::readable(data + from as u64, 8192);
                    let sector = (number * quarter + from) / SECTOR;
                    let request = Request::new(ram, VIRTIO_BLK_T_OUT, sector as u64, &[data]);
                    assert_eq!(request.run(ram, queue), VIRTIO_BLK_S_OK);
                }
            });
        }
    });
    let file = disk.file();
    for (number, bytes) in file.chunks(quarter).enumerate() {
        assert!(
            bytes.iter().all(|&byte| byte == number as u8 + 1),
            "queue {number}"
        );
    }
}

#[test]
fn refuses_files_that_are_not_images() {
    for image in ["/nonexistent", "/", "/dev/null"] {
        let process = Launch::new("device-disk")
            .args(["--socket-path", "/nonexistent/socket", "--blk-file", image])
            .spawn();
        assert_eq!(process.wait().code(), Some(1));
    }
}

#[test]
fn log_lines_carry_the_name_of_the_device() {
    let json = ["--log-format", "json"];
    for (options, name) in [(&[][..], "device-disk"), (&["--id", "disk7"], "disk7")] {
        let disk = Disk::new(&[options, &json].concat());
        let log = disk.process.log();
        let line = log.lines().find(|line| line.contains("--blk-file"));
        let line: serde_json::Value = serde_json::from_str(line.unwrap()).unwrap();
        assert_eq!(line["span"]["device"], name, "{log}");
    }
}

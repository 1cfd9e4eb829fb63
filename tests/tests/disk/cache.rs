//! Cache modes: every path between the image and guest memory.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;

use outrigger_tests::chaos::Random;
use outrigger_tests::disk::{Request, SECTOR, pattern_of};
use outrigger_tests::guest::{EVENT_IDX, Guest};
use outrigger_tests::process::{Launch, Process};
use outrigger_tests::queue::Buffer;
use outrigger_tests::ram::Ram;
use virtio_bindings::virtio_blk::*;

use crate::subject::{Disk, FLUSH, SIZE};

/// The longest request in sectors.
const LONGEST: u64 = 48;

/// Random requests of any length, with buffers at any address, several in flight. The disk
/// must agree with a model, and so must the file afterwards.
fn work(disk: &mut Disk, requests: usize) {
    let mut random = Random::announced();
    let mut model = pattern_of(0, SIZE);
    let room = LONGEST * SECTOR as u64 + 4096;
    let buffers: Vec<u64> = (0..6).map(|_| disk.ram().alloc(room)).collect();
    let mut left = requests;
    while left > 0 {
        let mut batch = Vec::new();
        let count = (1 + random.below(buffers.len() as u64) as usize).min(left);
        // The requests of a batch do not overlap, because their order is not defined.
        let share = (SIZE / SECTOR) as u64 / count as u64;
        for (number, &buffer) in buffers[..count].iter().enumerate() {
            let sectors = 1 + random.below(LONGEST);
            let sector = number as u64 * share + random.below(share - sectors);
            let len = sectors as usize * SECTOR;
            // Sometimes whole pages, which use another path.
            let at = match random.below(3) {
                0 => buffer.next_multiple_of(4096),
                _ => buffer + random.below(4096 - 16),
            };
            let (kind, data) = match random.below(8) {
                0 => (VIRTIO_BLK_T_FLUSH, vec![]),
                1..=3 => {
                    let byte = random.below(256) as u8;
                    let bytes: Vec<u8> = (0..len).map(|i| byte ^ i as u8).collect();
                    disk.ram().set(at, &bytes);
                    model[sector as usize * SECTOR..][..len].copy_from_slice(&bytes);
                    (VIRTIO_BLK_T_OUT, vec![Buffer::readable(at, len as u32)])
                }
                _ => {
                    disk.ram().set(at, &vec![0xee; len]);
                    (VIRTIO_BLK_T_IN, vec![Buffer::writable(at, len as u32)])
                }
            };
            let split = data.iter().flat_map(|&it| in_pieces(&mut random, it));
            let split: Vec<Buffer> = split.collect();
            let request = Request::new(disk.ram(), kind, sector, &split);
            disk.guest.queues[0].add(&request.buffers);
            batch.push((kind, sector, at, len, request.status));
        }
        disk.guest.queues[0].kick();
        for _ in 0..count {
            disk.guest.queues[0].wait();
        }
        for (kind, sector, at, len, status) in batch {
            assert_eq!(disk.ram().get(status, 1), [VIRTIO_BLK_S_OK as u8]);
            if kind == VIRTIO_BLK_T_IN {
                let expected = &model[sector as usize * SECTOR..][..len];
                assert!(
                    disk.ram().get(at, len) == expected,
                    "sector {sector}, {len}"
                );
            }
        }
        left -= count;
    }
    assert!(disk.file() == model);
}

/// The same memory in up to three buffers.
fn in_pieces(random: &mut Random, buffer: Buffer) -> Vec<Buffer> {
    let mut pieces = vec![buffer];
    while pieces.len() < 3 && random.below(2) == 0 {
        let last = pieces.pop().unwrap();
        let cut = 1 + random.below(u64::from(last.len) - 1) as u32;
        pieces.push(Buffer { len: cut, ..last });
        pieces.push(Buffer {
            address: last.address + u64::from(cut),
            len: last.len - cut,
            ..last
        });
    }
    pieces
}

/// Drops the page cache of the image, if the file system supports that.
fn chill(disk: &Disk) {
    let file = File::open(&disk.image).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// Whether the file system of temporary files supports O_DIRECT.
pub fn has_direct() -> bool {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_DIRECT);
    let has = options.open(file.path()).is_ok();
    if !has {
        eprintln!("skipped: no O_DIRECT for temporary files");
    }
    has
}

#[test]
fn writeback_mode_uses_the_page_cache() {
    for mode in ["writeback", "unsafe"] {
        let mut disk = Disk::new(&["--cache", mode]);
        work(&mut disk, 400);
        chill(&disk);
    }
}

#[test]
fn reads_that_miss_the_page_cache_return_the_data() {
    read_cold(&mut Disk::new(&[]));
}

fn read_cold(disk: &mut Disk) {
    for round in 0..20 {
        chill(disk);
        for sector in [round * 64, 1999 - round * 32] {
            let (status, data) = disk.receive(VIRTIO_BLK_T_IN, sector, 16 * SECTOR);
            assert_eq!(status, VIRTIO_BLK_S_OK);
            assert!(data == pattern_of(sector as usize * SECTOR, 16 * SECTOR));
        }
    }
}

#[test]
fn cache_none_bypasses_the_page_cache() {
    if has_direct() {
        let mut disk = Disk::new(&["--cache", "none"]);
        work(&mut disk, 400);
    }
}

#[test]
fn requests_are_served_one_by_one_without_io_uring() {
    for mode in ["writeback", "none"] {
        if mode == "none" && !has_direct() {
            continue;
        }
        let mut launch = Launch::new("device-disk");
        // SAFETY: the closure makes system calls only, and allocates nothing.
        unsafe { launch.command().pre_exec(forbid_io_uring) };
        let mut disk = Disk::launch(launch, SIZE, &["--cache", mode], 1, FLUSH);
        let log = disk.process.log();
        assert!(log.contains("no io_uring"), "{log}");
        read_cold(&mut disk);
        work(&mut disk, 200);
    }
}

/// Makes io_uring_setup(2) fail from now on (seccomp(2)).
fn forbid_io_uring() -> std::io::Result<()> {
    let statement = |code: u32, k: u32, jt, jf| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let refuse = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let mut filter = [
        // The number of the system call is the first word of the data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            libc::SYS_io_uring_setup as u32,
            0,
            1,
        ),
        statement(libc::BPF_RET | libc::BPF_K, refuse, 0, 0),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the arguments are as prctl(2) documents; the program is valid during the call.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) != 0
    };
    match refused {
        true => Err(std::io::Error::last_os_error()),
        false => Ok(()),
    }
}

/// A driver without VIRTIO_BLK_F_FLUSH, and one that sets `writeback` to 0 (virtio 1.2
/// section 5.2.6.2).
#[test]
fn a_driver_can_switch_to_write_through() {
    const WRITEBACK: u32 = 32;
    let wce = 1 << VIRTIO_BLK_F_CONFIG_WCE;
    for (features, expected) in [(0, 0), (FLUSH | wce, 1)] {
        let mut disk = Disk::driven(features);
        assert_eq!(disk.guest.config(WRITEBACK, 1), [expected]);
        work(&mut disk, 60);
    }
    let mut disk = Disk::driven(FLUSH | wce);
    for value in [0, 1, 0] {
        disk.guest.set_config(WRITEBACK, &[value]).unwrap();
        assert_eq!(disk.guest.config(WRITEBACK, 1), [value]);
    }
    // Other values and other fields cannot be written.
    assert!(disk.guest.set_config(WRITEBACK, &[2]).is_err());
    assert!(disk.guest.set_config(0, &[0]).is_err());
    assert_eq!(disk.guest.config(WRITEBACK, 1), [0]);
    work(&mut disk, 60);
}

#[test]
fn transfers_of_partial_blocks_are_refused() {
    let mut disk = Disk::new(&["--block-size", "4096"]);
    assert_eq!(disk.guest.config(20, 4), 4096u32.to_le_bytes());
    assert_eq!(disk.receive(VIRTIO_BLK_T_IN, 8, 4096).0, VIRTIO_BLK_S_OK);
    for (sector, len) in [(1, 4096), (8, 512), (8, 4096 + 512)] {
        let (status, _) = disk.receive(VIRTIO_BLK_T_IN, sector, len);
        assert_eq!(status, VIRTIO_BLK_S_IOERR, "{sector}, {len}");
    }
    let log = disk.process.log();
    assert!(log.contains("not made of whole blocks"), "{log}");
}

/// The peak resident memory of a process in KiB.
fn peak(process: &Process) -> u64 {
    let text = process.status("", "VmHWM");
    text.trim_end_matches(" kB").parse().unwrap()
}

/// A request that consists of the same few pages many times, misaligned for direct I/O, needs
/// little memory in the process.
#[test]
fn a_huge_request_needs_little_memory() {
    const PIECE: u32 = 2 << 20;
    const PIECES: usize = 126;
    if !has_direct() {
        return;
    }
    let launch = Launch::new("device-disk");
    let image = launch.directory().join("image");
    let file = File::create(&image).unwrap();
    file.set_len(u64::from(PIECE) * PIECES as u64).unwrap();
    let process = launch
        .args(["--blk-file".as_ref(), image.as_os_str()])
        .args(["--cache", "none"])
        .listening();
    let mut guest = Guest::new(process.connect(), Ram::small());
    guest.negotiate(FLUSH | EVENT_IDX);
    guest.share_memory();
    guest.add_queue(256);
    let at = guest.ram.alloc(u64::from(PIECE) + 1) | 1;
    let before = peak(&process);
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        let data = match kind {
            VIRTIO_BLK_T_IN => Buffer::writable(at, PIECE),
            _ => Buffer::readable(at, PIECE),
        };
        let request = Request::new(&guest.ram, kind, 0, &[data; PIECES]);
        let status = request.run(&guest.ram, &mut guest.queues[0]);
        assert_eq!(status, VIRTIO_BLK_S_OK);
    }
    let most = peak(&process) - before;
    assert!(most < 64 << 10, "{most} KiB");
}

/// A worker that polls also continues a short transfer.
#[test]
fn a_request_of_many_segments_completes_while_its_worker_polls() {
    const SIZE: u64 = 1 << 20;
    const PIECES: usize = 1022;
    let disk = Disk::new(&[]);
    let launch = Launch::new("device-disk");
    let process = launch
        .args(["--blk-file".as_ref(), disk.image.as_os_str()])
        .args(["--poll-us", "10000", "--read-only", "--lock", "off"])
        .listening();
    // Each buffer lies in two regions.
    let ram = Ram::new(&[(0, SIZE), (SIZE, SIZE)]);
    assert_eq!(ram.alloc(512), SIZE);
    let mut guest = Guest::new(process.connect(), ram);
    guest.negotiate(EVENT_IDX);
    guest.share_memory();
    guest.add_queue(1024);
    let data = [Buffer::writable(SIZE - 256, 512); PIECES];
    for _ in 0..20 {
        chill(&disk);
        let request = Request::new(&guest.ram, VIRTIO_BLK_T_IN, 0, &data);
        let status = request.run(&guest.ram, &mut guest.queues[0]);
        assert_eq!(status, VIRTIO_BLK_S_OK);
        let last = pattern_of((PIECES - 1) * SECTOR, SECTOR);
        assert!(guest.ram.get(SIZE - 256, 512) == last);
    }
}

//! Each way between the medium and guest memory.

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

/// Longest request in sectors.
const LONGEST: u64 = 48;

/// Random requests of any length, to buffers at any address, some at a time; the disk
/// must say what a model says, and so must the file afterwards.
fn work(disk: &mut Disk, requests: usize) {
    let mut random = Random::announced();
    let mut model = pattern_of(0, SIZE);
    let room = LONGEST * SECTOR as u64 + 4096;
    let buffers: Vec<u64> = (0..6).map(|_| disk.ram().alloc(room)).collect();
    let mut left = requests;
    while left > 0 {
        let mut batch = Vec::new();
        let count = (1 + random.below(buffers.len() as u64) as usize).min(left);
        // No two of a batch touch the same bytes: their order is nobody's promise.
        let share = (SIZE / SECTOR) as u64 / count as u64;
        for (number, &buffer) in buffers[..count].iter().enumerate() {
            let sectors = 1 + random.below(LONGEST);
            let sector = number as u64 * share + random.below(share - sectors);
            let len = sectors as usize * SECTOR;
            // Whole pages at times, which go another way.
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

/// The same memory in up to three pieces.
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

/// Drops what the page cache has of the image, as far as the file system lets it.
fn chill(disk: &Disk) {
    let file = File::open(&disk.image).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// Whether the file system of temporary files knows a way past the page cache.
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
fn through_the_page_cache() {
    for mode in ["writeback", "unsafe"] {
        let mut disk = Disk::new(&["--cache", mode]);
        work(&mut disk, 400);
        chill(&disk);
    }
}

#[test]
fn what_is_not_in_the_page_cache_is_read_all_the_same() {
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
fn past_the_page_cache() {
    if has_direct() {
        let mut disk = Disk::new(&["--cache", "none"]);
        work(&mut disk, 400);
    }
}

#[test]
fn one_request_after_the_other_where_the_host_has_no_io_uring() {
    for mode in ["writeback", "none"] {
        if mode == "none" && !has_direct() {
            continue;
        }
        let mut launch = Launch::new("device-disk");
        // SAFETY: makes system calls only, and allocates nothing.
        unsafe { launch.command().pre_exec(forbid_io_uring) };
        let mut disk = Disk::launch(launch, SIZE, &["--cache", mode], 1, FLUSH);
        let log = disk.process.log();
        assert!(log.contains("no io_uring"), "{log}");
        read_cold(&mut disk);
        work(&mut disk, 200);
    }
}

/// io_uring_setup(2) is refused from now on (seccomp(2)).
fn forbid_io_uring() -> std::io::Result<()> {
    let statement = |code: u32, k: u32, jt, jf| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let refuse = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let mut filter = [
        // The call's number is the first word of what is looked at.
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
    // SAFETY: prctl(2) as it is documented; the program is valid for the call.
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

/// A driver that does not flush, or says so in the field (virtio 1.2 section 5.2.6.2).
#[test]
fn writes_through_where_the_driver_wants_it() {
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
    // Neither another value nor another field.
    assert!(disk.guest.set_config(WRITEBACK, &[2]).is_err());
    assert!(disk.guest.set_config(0, &[0]).is_err());
    assert_eq!(disk.guest.config(WRITEBACK, 1), [0]);
    work(&mut disk, 60);
}

#[test]
fn blocks_of_4096_bytes_are_all_or_nothing() {
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

/// The most resident memory that a process ever had, in KiB.
fn peak(process: &Process) -> u64 {
    let text = process.status("", "VmHWM");
    text.trim_end_matches(" kB").parse().unwrap()
}

/// Sent again and again over the same few pages, at an address that the medium does not
/// take: what the process has of it in memory stays little.
#[test]
fn a_huge_request_takes_little_memory() {
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

/// A worker that looks for work finds what the kernel did a part of, too.
#[test]
fn a_request_of_very_many_pieces_goes_on_while_its_worker_looks() {
    const SIZE: u64 = 1 << 20;
    const PIECES: usize = 1022;
    let disk = Disk::new(&[]);
    let launch = Launch::new("device-disk");
    let process = launch
        .args(["--blk-file".as_ref(), disk.image.as_os_str()])
        .args(["--poll-us", "10000", "--read-only", "--lock", "off"])
        .listening();
    // Each piece lies in two regions.
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

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use device_core::Poller;
use io_uring::squeue::Flags;

use super::*;

const DEADLINE: Duration = Duration::from_secs(30);

fn file(content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

fn engine(file: &File) -> IoEngine {
    IoEngine::new(file.as_fd(), None).unwrap()
}

fn iovec(memory: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: memory.as_mut_ptr().cast(),
        iov_len: memory.len(),
    }
}

fn part(request: usize, task: IoOp, offset: u64, memory: Vec<libc::iovec>) -> IoTransfer {
    IoTransfer {
        request,
        task,
        path: IoPath::Cached,
        offset,
        memory,
        bounce: None,
    }
}

/// As many as there can be, and nobody takes one before all have ended: the driver waits
/// for all of them, so nothing else makes the thread call the kernel.
#[test]
fn no_end_of_a_transfer_waits_for_another_request() {
    let file = file(&[7; 4096]);
    let mut engine = engine(&file);
    let poller = Poller::new().unwrap();
    poller.add_readable(&engine, 0).unwrap();
    let mut memory = vec![[0u8; 4]; MAX_PARTS as usize];
    for (number, memory) in memory.iter_mut().enumerate() {
        let part = part(number, IoOp::Read, 0, vec![iovec(memory)]);
        engine.begin(part).unwrap();
    }
    assert!(engine.is_full());
    let one_more = part(0, IoOp::Flush, 0, vec![]);
    assert!(engine.begin(one_more).is_err());
    engine.submit().unwrap();
    let start = Instant::now();
    let mut ended = HashMap::new();
    while engine.is_busy() {
        assert!(start.elapsed() < DEADLINE, "{} have ended", ended.len());
        let mut tokens = Vec::new();
        poller
            .wait(&mut tokens, Some(Duration::from_secs(1)))
            .unwrap();
        while let Some((number, result)) = engine.ended() {
            result.unwrap();
            *ended.entry(number).or_insert(0) += 1;
        }
        engine.submit().unwrap();
    }
    assert_eq!(ended.len(), memory.len());
    assert!(ended.values().all(|&times| times == 1));
    assert!(memory.iter().all(|it| it == &[7; 4]));
}

/// More pieces than one call takes, in one part.
#[test]
fn what_was_short_goes_on() {
    let content: Vec<u8> = (0..3 * MAX_PIECES).map(|at| (at % 251) as u8).collect();
    let file = file(&content);
    let mut engine = engine(&file);
    let mut memory = vec![0; content.len()];
    let pieces = memory.chunks_mut(1).map(iovec).collect();
    engine.begin(part(1, IoOp::Read, 0, pieces)).unwrap();
    engine.wait().unwrap();
    let (request, result) = engine.ended().unwrap();
    result.unwrap();
    assert_eq!((request, engine.is_busy()), (1, false));
    assert!(memory == content);

    let mut changed: Vec<u8> = content.iter().map(|byte| !byte).collect();
    let pieces = changed.chunks_mut(1).map(iovec).collect();
    let durable = IoOp::Write { durable: true };
    engine.begin(part(2, durable, 0, pieces)).unwrap();
    engine.wait().unwrap();
    engine.ended().unwrap().1.unwrap();
    file.read_exact_at(&mut memory, 0).unwrap();
    assert!(memory == changed);
}

#[test]
fn bounces_are_no_more_than_fit() {
    let file = file(&[7; 4096]);
    let mut engine = engine(&file);
    let mut memory = vec![0u8; 4096];
    let mut begun = 0;
    while !engine.is_full() {
        engine
            .begin(IoTransfer {
                bounce: Some(Bounce::new(1 << 20, 4096).unwrap()),
                ..part(0, IoOp::Read, 0, vec![iovec(&mut memory)])
            })
            .unwrap();
        begun += 1;
    }
    assert_eq!(begun, MAX_BOUNCED >> 20);
    while engine.is_busy() {
        engine.wait().unwrap();
        while let Some((_, result)) = engine.ended() {
            // The file ends before the buffer does.
            result.unwrap_err();
        }
    }
    assert!(!engine.is_full());
    assert_eq!((engine.bounced, &memory[..]), (0, &[7; 4096][..]));
}

/// What the ring is not for, and what seccomp cannot see (docs/sandbox.md).
#[test]
fn the_ring_does_nothing_else() {
    let file = file(&[7; 4096]);
    let mut engine = engine(&file);
    let fd = types::Fd(file.as_raw_fd());
    let mut memory = [0u8; 8];
    let path = c"/dev/null".as_ptr();
    let pieces = [iovec(&mut memory)];
    let readv = || opcode::Readv::new(fd, pieces.as_ptr(), 1).build();
    let forbidden = [
        ("nop", opcode::Nop::new().build()),
        (
            "open",
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path).build(),
        ),
        (
            "socket",
            opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
        ),
        (
            "accept",
            opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut()).build(),
        ),
        (
            "connect",
            opcode::Connect::new(fd, std::ptr::null(), 0).build(),
        ),
        (
            "unlink",
            opcode::UnlinkAt::new(types::Fd(libc::AT_FDCWD), path).build(),
        ),
        ("close", opcode::Close::new(fd).build()),
        ("fallocate", opcode::Fallocate::new(fd, 4096).build()),
        (
            "read",
            opcode::Read::new(fd, memory.as_mut_ptr(), 8).build(),
        ),
        (
            "message to another ring",
            opcode::MsgRingData::new(fd, 0, 0, None).build(),
        ),
        (
            "a registered file",
            opcode::Readv::new(types::Fixed(0), pieces.as_ptr(), 1).build(),
        ),
        ("a thread of the kernel's", readv().flags(Flags::ASYNC)),
        ("a chain", readv().flags(Flags::IO_LINK)),
    ];
    let mut result = |entry: &Entry| {
        // SAFETY: it is refused; else it would use memory that is there.
        unsafe { engine.ring.submission().push(entry) }.unwrap();
        engine.ring.submit_and_wait(1).unwrap();
        let entry = engine.ring.completion().next().unwrap();
        entry.result()
    };
    for (name, entry) in &forbidden {
        assert_eq!(result(entry), -libc::EACCES, "{name}");
    }
    assert_eq!(result(&readv()), 8);
    // And takes nothing but files.
    let submitter = engine.ring.submitter();
    let refused = [
        submitter.register_files(&[-1]).map(drop),
        submitter.register_eventfd(file.as_raw_fd()).map(drop),
        submitter.register_personality().map(drop),
        submitter.register_probe(&mut io_uring::Probe::new()),
        submitter.register_iowq_max_workers(&mut [1, 1]),
        submitter.register_enable_rings(),
    ];
    for (number, result) in refused.into_iter().enumerate() {
        assert!(result.is_err(), "{number}");
    }
    engine.hold(Some(file.as_fd())).unwrap();
    engine.hold(None).unwrap();
}

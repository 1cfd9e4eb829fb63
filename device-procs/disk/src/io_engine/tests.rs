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

fn iovec(memory: &mut [u8]) -> GuestIovec {
    GuestIovec::new(memory.as_mut_ptr(), memory.len())
}

fn transfer(request: usize, op: IoOp, offset: u64, memory: Vec<GuestIovec>) -> IoTransfer {
    IoTransfer {
        request,
        op,
        path: IoPath::Cached,
        offset,
        memory,
        bounce: None,
    }
}

/// With the most transfers in flight, all completions arrive although no other request makes
/// the thread enter the kernel.
#[test]
fn no_completion_waits_for_another_request() {
    let file = file(&[7; 4096]);
    let mut engine = engine(&file);
    let poller = Poller::new().unwrap();
    poller.add_readable(&engine, 0).unwrap();
    let mut memory = vec![[0u8; 4]; MAX_TRANSFERS as usize];
    for (number, memory) in memory.iter_mut().enumerate() {
        let transfer = transfer(number, IoOp::Read, 0, vec![iovec(memory)]);
        engine.queue(transfer).unwrap();
    }
    assert!(engine.is_full());
    let one_more = transfer(0, IoOp::Flush, 0, vec![]);
    assert!(engine.queue(one_more).is_err());
    let start = Instant::now();
    let mut ended = HashMap::new();
    loop {
        engine.step().unwrap();
        while let Some((number, result)) = engine.next_completed() {
            result.unwrap();
            *ended.entry(number).or_insert(0) += 1;
        }
        if !engine.is_busy() {
            break;
        }
        assert!(start.elapsed() < DEADLINE, "{} have ended", ended.len());
        let mut tokens = Vec::new();
        poller
            .wait(&mut tokens, Some(Duration::from_secs(1)))
            .unwrap();
    }
    assert_eq!(ended.len(), memory.len());
    assert!(ended.values().all(|&times| times == 1));
    assert!(memory.iter().all(|it| it == &[7; 4]));
}

/// A transfer has more iovecs than one call takes.
#[test]
fn a_short_transfer_continues() {
    let content: Vec<u8> = (0..3 * MAX_IOVECS).map(|at| (at % 251) as u8).collect();
    let file = file(&content);
    let mut engine = engine(&file);
    let mut memory = vec![0; content.len()];
    let iovecs = memory.chunks_mut(1).map(iovec).collect();
    engine.queue(transfer(1, IoOp::Read, 0, iovecs)).unwrap();
    engine.wait().unwrap();
    let (request, result) = engine.next_completed().unwrap();
    result.unwrap();
    assert_eq!((request, engine.is_busy()), (1, false));
    assert!(memory == content);

    let mut changed: Vec<u8> = content.iter().map(|byte| !byte).collect();
    let iovecs = changed.chunks_mut(1).map(iovec).collect();
    let durable = IoOp::Write { durable: true };
    engine.queue(transfer(2, durable, 0, iovecs)).unwrap();
    engine.wait().unwrap();
    engine.next_completed().unwrap().1.unwrap();
    file.read_exact_at(&mut memory, 0).unwrap();
    assert!(memory == changed);
}

#[test]
fn memory_of_bounce_buffers_is_limited() {
    let file = file(&[7; 4096]);
    let mut engine = engine(&file);
    let mut memory = vec![0u8; 4096];
    let mut queued = 0;
    while !engine.is_full() {
        engine
            .queue(IoTransfer {
                bounce: Some(BounceBuffer::new(1 << 20, 4096).unwrap()),
                ..transfer(0, IoOp::Read, 0, vec![iovec(&mut memory)])
            })
            .unwrap();
        queued += 1;
    }
    assert_eq!(queued, MAX_BOUNCED >> 20);
    while engine.is_busy() {
        engine.wait().unwrap();
        while let Some((_, result)) = engine.next_completed() {
            // The file ends before the buffer does.
            result.unwrap_err();
        }
    }
    assert!(!engine.is_full());
    assert_eq!((engine.bounced, &memory[..]), (0, &[7; 4096][..]));
}

/// The ring is restricted, because seccomp cannot see what it does (docs/sandbox.md).
#[test]
fn the_ring_allows_only_reads_writes_and_flushes() {
    let file = file(&[7; 4096]);
    let mut engine = engine(&file);
    let fd = types::Fd(file.as_raw_fd());
    let mut memory = [0u8; 8];
    let path = c"/dev/null".as_ptr();
    let iovecs = [iovec(&mut memory)];
    let readv = || opcode::Readv::new(fd, GuestIovec::as_ptr(&iovecs), 1).build();
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
            opcode::Readv::new(types::Fixed(0), GuestIovec::as_ptr(&iovecs), 1).build(),
        ),
        ("a kernel thread", readv().flags(Flags::ASYNC)),
        ("a linked entry", readv().flags(Flags::IO_LINK)),
    ];
    let mut result = |entry: &Entry| {
        // SAFETY: the entry is refused; otherwise it would use memory that is mapped.
        unsafe { engine.ring.submission().push(entry) }.unwrap();
        engine.ring.submit_and_wait(1).unwrap();
        let entry = engine.ring.completion().next().unwrap();
        entry.result()
    };
    for (name, entry) in &forbidden {
        assert_eq!(result(entry), -libc::EACCES, "{name}");
    }
    assert_eq!(result(&readv()), 8);
    // Only the registered file can be replaced.
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
    engine.hold_socket(Some(file.as_fd())).unwrap();
    engine.hold_socket(None).unwrap();
}

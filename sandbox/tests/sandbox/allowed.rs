//! Actions that a sealed process must still be able to perform.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, Barrier, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use outrigger_sandbox::{BASE, Check, LISTENER, Policy, Rule, SOCKET, SandboxMode, isolate, seal};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, Mode as Permissions, OFlags, SealFlags, fcntl_add_seals};
use rustix::fs::{fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::{POLICY, ProbeEnd, SandboxProbe, sealed, sealed_only};

const fn works(name: &'static str, run: fn()) -> SandboxProbe {
    SandboxProbe {
        name,
        run,
        end: ProbeEnd::Success,
    }
}

pub const PROBES: &[SandboxProbe] = &[
    works("do nothing", sealed),
    works(
        "use memory and eventfds that are received later",
        use_received_fds,
    ),
    works("read and write an open disk image", use_open_file),
    works("create the memory of an inflight table", || {
        sealed();
        make_memory();
    }),
    works("accept on an open listening socket", accept),
    works("set a receive timeout", || {
        let (mut socket, _peer) = UnixStream::pair().unwrap();
        sealed();
        socket
            .set_read_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        let error = socket.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }),
    works("grow and shrink the heap in all threads", use_heap),
    works("wait, measure time, lock, wake", use_clocks_and_locks),
    works("seal while threads are starting", seal_early),
    works("signal a thread of the process", signal_thread),
    works("print and unwind a panic", || {
        let thread = isolated_thread(|| panic!("on purpose"));
        thread.join().unwrap_err();
        eprintln!("logged");
    }),
    SandboxProbe {
        name: "abort",
        run: || {
            sealed();
            std::process::abort();
        },
        end: ProbeEnd::Signal(&[libc::SIGABRT]),
    },
    works("call an ioctl that is on the list", || {
        let (reader, mut writer) = io::pipe().unwrap();
        sealed();
        writer.write_all(b"four").unwrap();
        assert_eq!(rustix::io::ioctl_fionread(reader).unwrap(), 4);
    }),
    works(
        "use KVM in a process that is sealed but not isolated",
        use_kvm,
    ),
    works("make a forbidden call in log mode", || {
        isolate(&POLICY, SandboxMode::Log).unwrap();
        seal(&POLICY, SandboxMode::Log).unwrap();
        // seccomp allows the call, which then finds no such file in the empty root.
        File::open("/etc/passwd").unwrap_err();
    }),
    works("open a file when the sandbox is off", || {
        let before = rustix::process::geteuid().as_raw();
        let isolation = isolate(&POLICY, SandboxMode::Off).unwrap();
        seal(&POLICY, SandboxMode::Off).unwrap();
        assert_eq!(isolation.uid, before);
        assert!(isolation.to_string().starts_with("sandbox off"));
        File::open("/etc/passwd").unwrap();
    }),
];

/// Runs `work` in a thread that starts between the two stages, as the threads of a device
/// process do. The work begins after the process is sealed.
fn isolated_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    isolate(&POLICY, SandboxMode::Enforce).unwrap();
    let (go, wait) = mpsc::channel::<()>();
    let thread = thread::spawn(move || {
        wait.recv().unwrap();
        work()
    });
    sealed_only();
    go.send(()).unwrap();
    thread
}

const MEMORY: usize = 1 << 20;

fn make_memory() -> OwnedFd {
    let memory = memfd_create("memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&memory, MEMORY as u64).unwrap();
    fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    memory
}

/// Maps the memory file until the process ends.
fn map(memory: impl AsFd) -> *mut u64 {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe {
        mmap(
            std::ptr::null_mut(),
            MEMORY,
            prot,
            MapFlags::SHARED,
            memory,
            0,
        )
    };
    at.unwrap().cast()
}

/// Receives descriptors as with SET_MEM_TABLE and SET_VRING_KICK. The front end keeps its own
/// mapping.
fn use_received_fds() {
    let (front, back) = UnixStream::pair().unwrap();
    let memory = make_memory();
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let seen_by_front = map(&memory);
    let passed = [memory.as_fd(), event.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&passed)));
    sendmsg(
        &front,
        &[IoSlice::new(b"x")],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
    drop(memory);

    sealed();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let into = &mut [IoSliceMut::new(&mut byte)];
    recvmsg(&back, into, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut received: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    let kick = File::from(received.pop().unwrap());
    let memory = received.pop().unwrap();
    assert_eq!(fstat(&memory).unwrap().st_size, MEMORY as i64);

    // SAFETY: both mappings have MEMORY bytes and are never removed.
    unsafe {
        map(&memory).add(1000).write_volatile(0xfeed);
        assert_eq!(seen_by_front.add(1000).read_volatile(), 0xfeed);
    }
    (&kick).write_all(&7u64.to_ne_bytes()).unwrap();
    let mut count = [0; 8];
    rustix::io::read(&event, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 7);
}

fn use_open_file() {
    let image = rustix::fs::open(
        std::env::temp_dir(),
        OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
        Permissions::RUSR | Permissions::WUSR,
    );
    let image = File::from(image.unwrap());
    sealed();
    image.write_all_at(b"sector", 1 << 20).unwrap();
    image.sync_data().unwrap();
    let mut data = [0; 6];
    image.read_exact_at(&mut data, 1 << 20).unwrap();
    assert_eq!(&data, b"sector");
}

fn accept() {
    static POLICY: Policy = Policy {
        process: "listener",
        syscalls: &[BASE, SOCKET, LISTENER],
        keep_network: false,
        max_files: 64,
    };
    // An abstract name, which leaves no file behind.
    let name = format!("outrigger-sandbox-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let mut front = UnixStream::connect_addr(&address).unwrap();
    isolate(&POLICY, SandboxMode::Enforce).unwrap();
    seal(&POLICY, SandboxMode::Enforce).unwrap();
    let (mut back, _) = listener.accept().unwrap();
    front.write_all(b"hello").unwrap();
    let mut data = [0; 5];
    back.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"hello");
}

/// Allocates enough for glibc to return memory to the kernel, both from the main arena and from
/// a thread's, and lets several threads request arenas at the same time.
fn use_heap() {
    const THREADS: usize = 12;
    isolate(&POLICY, SandboxMode::Enforce).unwrap();
    let start = Arc::new(Barrier::new(THREADS + 1));
    let allocate = || {
        for size in [1 << 10, 50 << 10, 100 << 10, 3 << 20] {
            let buffers: Vec<Vec<u8>> = (0..64).map(|i| vec![i; size]).collect();
            assert!(buffers.iter().all(|b| b.len() == size));
        }
    };
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let start = Arc::clone(&start);
            thread::spawn(move || {
                start.wait();
                allocate();
            })
        })
        .collect();
    sealed_only();
    start.wait();
    allocate();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn use_clocks_and_locks() {
    let pair = Arc::new((Mutex::new(false), Condvar::new()));
    let pair_in_thread = Arc::clone(&pair);
    let thread = isolated_thread(move || {
        thread::sleep(Duration::from_millis(1));
        *pair_in_thread.0.lock().unwrap() = true;
        pair_in_thread.1.notify_one();
    });
    let woken = pair.0.lock().unwrap();
    let (woken, _) = pair
        .1
        .wait_timeout_while(woken, Duration::from_secs(10), |woken| !*woken)
        .unwrap();
    assert!(*woken);
    thread.join().unwrap();
    thread::park_timeout(Duration::from_millis(1));
    thread::yield_now();
    assert!(Instant::now().elapsed() < Duration::from_secs(10));
    assert!(SystemTime::now() > SystemTime::UNIX_EPOCH);
    assert!(HashMap::from([(1, 2)]).contains_key(&1)); // random keys
}

fn seal_early() {
    isolate(&POLICY, SandboxMode::Enforce).unwrap();
    let threads: Vec<_> = (0..48)
        .map(|i| {
            let builder = thread::Builder::new().name(format!("thread {i}"));
            builder.spawn(move || i).unwrap()
        })
        .collect();
    sealed_only();
    for (i, thread) in threads.into_iter().enumerate() {
        assert_eq!(thread.join().unwrap(), i);
    }
}

/// A signal interrupts a system call of another thread, as it takes a vCPU out of KVM_RUN.
fn signal_thread() {
    extern "C" fn handle(_: libc::c_int) {}
    // SAFETY: the handler does nothing and has no SA_RESTART; zeros are valid for the other
    // fields.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as extern "C" fn(libc::c_int) as usize;
        assert_eq!(
            libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()),
            0
        );
    }
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let (done, wait) = mpsc::channel();
    let thread = isolated_thread(move || {
        done.send(rustix::io::read(&event, &mut [0; 8])).unwrap();
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    let result = loop {
        // SAFETY: the thread is not joined yet, so its id is valid.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1) };
        match wait.recv_timeout(Duration::from_millis(2)) {
            Ok(result) => break result,
            Err(_) => assert!(Instant::now() < deadline, "the read was not interrupted"),
        }
    };
    assert_eq!(result, Err(rustix::io::Errno::INTR));
    thread.join().unwrap();
}

fn use_kvm() {
    const KVM_GET_API_VERSION: u32 = 0xae00;
    static POLICY: Policy = Policy {
        process: "runner",
        syscalls: &[
            BASE,
            &[Rule::when(
                libc::SYS_ioctl,
                &[Check::OneOf(1, &[KVM_GET_API_VERSION])],
            )],
        ],
        keep_network: true,
        max_files: 64,
    };
    let Ok(kvm) = File::options().read(true).write(true).open("/dev/kvm") else {
        return; // no KVM on this host, or no access to it
    };
    seal(&POLICY, SandboxMode::Enforce).unwrap();
    use std::os::fd::AsRawFd;
    // SAFETY: the request has no argument.
    let version = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION.into(), 0) };
    assert_eq!(version, 12);
}

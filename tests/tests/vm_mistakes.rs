//! Mistakes that the runner detects once KVM is open: the exit code, one line that names the
//! cause, and no file left behind.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use outrigger_tests::machine::{embedded_guest, skip_kvm};
use outrigger_tests::process::Launch;
use outrigger_tests::runner::{Place, check_line, mistake};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use rustix::process::Signal;

const FAILURE: i32 = 1;

/// Offsets in the first program header of an ELF file, which is at 64.
const P_PADDR: usize = 64 + 24;
const P_MEMSZ: usize = 64 + 40;

fn patched(file: &[u8], offset: usize, value: u64) -> Vec<u8> {
    let mut file = file.to_vec();
    file[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    file
}

/// A minimal bzImage: headers, and a kernel of zeros.
fn bzimage(xloadflags: u16, init_size: u32) -> Vec<u8> {
    let mut file = vec![0; 4096];
    let mut put = |offset: usize, bytes: &[u8]| {
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0x1f1, &[1]); // setup_sects: the kernel starts at 1024
    put(0x1f4, &(3072u32 / 16).to_le_bytes()); // syssize
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes()); // version
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x214, &0x10_0000u32.to_le_bytes()); // code32_start
    put(0x236, &xloadflags.to_le_bytes());
    put(0x258, &0x10_0000u64.to_le_bytes()); // pref_address
    put(0x260, &init_size.to_le_bytes());
    file
}

#[test]
fn truncated_or_invalid_kernels_are_reported() {
    if skip_kvm() {
        return;
    }
    let place = Place::default();
    let elf = std::fs::read(embedded_guest()).unwrap();
    let bzimage = bzimage(1, 0x1000);
    let mut mistakes = Vec::new();
    let mut add = |name: &str, content: &[u8], word: &'static [&'static str]| {
        let file = place.file(name, content);
        let mut mistake = mistake(&format!("--kernel {file} --memory 64M"), FAILURE, word);
        mistake.args.push("--control".into());
        mistake.args.push(place.name(&format!("control-{name}")));
        mistakes.push(mistake);
    };
    for cut in [4, 20, 64, 100, 5000, elf.len() / 2, elf.len() - 1] {
        add(&format!("elf-{cut}"), &elf[..cut], &["/elf-", "truncated"]);
    }
    let foreign = &["/foreign-", "an ELF file, but not for 64-bit x86"];
    // EI_CLASS: 32-bit. EI_DATA: big-endian. e_machine: AArch64.
    for (name, offset, value) in [("bits", 4, 1), ("endian", 5, 2), ("machine", 18, 183)] {
        let mut file = elf.clone();
        file[offset] = value;
        add(&format!("foreign-{name}"), &file, foreign);
    }
    let program = std::fs::read("/bin/true").unwrap();
    add("program", &program, &["/program", "a program for Linux"]);
    for cut in [1024, 1025, 4000, 4095] {
        add(
            &format!("bz-{cut}"),
            &bzimage[..cut],
            &["/bz-", "truncated"],
        );
    }
    for cut in [5, 0x1f1, 0x210] {
        add(
            &format!("bz-{cut}"),
            &bzimage[..cut],
            &["/bz-", "neither an ELF file nor a bzImage"],
        );
    }
    add("short", b"abc", &["/short", "shorter than any kernel"]);
    add(
        "text",
        b"#!/bin/sh\necho hello\n",
        &["/text", "neither an ELF file"],
    );
    add("zeros", &[0; 100_000], &["/zeros", "neither an ELF file"]);
    add(
        "old",
        &self::bzimage(0, 0x1000),
        &["/old", "without 64-bit entry"],
    );
    place.expect(&mistakes);
}

#[test]
fn too_little_or_too_much_memory_is_reported() {
    if skip_kvm() {
        return;
    }
    let place = Place::default();
    let guest = embedded_guest().display().to_string();
    let elf = std::fs::read(&guest).unwrap();
    let bss = place.file("bss", patched(&elf, P_MEMSZ, 64 << 20));
    let high = place.file("high", patched(&elf, P_PADDR, 0x7f_f000));
    let beyond = place.file("beyond", patched(&elf, P_PADDR, u64::MAX - 0xfff));
    let unpacks = place.file("unpacks", bzimage(1, 64 << 20));
    let initrd = place.file("initrd", "");
    File::create(&initrd).unwrap().set_len(64 << 20).unwrap();
    place.expect(&[
        mistake(
            &format!("--memory 8M --kernel {bss}"),
            FAILURE,
            &[&bss, "0x800000"],
        ),
        mistake(
            &format!("--memory 8M --kernel {high}"),
            FAILURE,
            &[&high, "fit", "0x800000"],
        ),
        mistake(
            &format!("--memory 8M --kernel {beyond}"),
            FAILURE,
            &[&beyond, "fit"],
        ),
        mistake(
            &format!("--memory 8M --kernel {unpacks}"),
            FAILURE,
            &[&unpacks, "0x800000"],
        ),
        mistake(
            &format!("--memory 64M --kernel {guest} --initrd {initrd}"),
            FAILURE,
            &[&initrd, "67108864 bytes do not fit"],
        ),
        mistake(
            &format!("--memory 100T --kernel {guest}"),
            FAILURE,
            &["109951162777600 bytes", "this host has"],
        ),
        mistake(
            &format!("--memory 15000000T --kernel {guest}"),
            FAILURE,
            &["guest memory", "this host has"],
        ),
        mistake(
            &format!("--memory 4T,hugepages=1G --kernel {guest}"),
            FAILURE,
            &["guest memory", "this host has"],
        ),
    ]);
}

#[test]
fn flat_images_that_overlap_or_exceed_memory_are_reported() {
    if skip_kvm() {
        return;
    }
    let place = Place::default();
    let one = place.file("one", [0x90; 4096]);
    let two = place.file("two", [0x90; 4096]);
    let load = |args: &str| {
        let args = args.replace("one", &one).replace("two", &two);
        format!("--memory 16M {args}")
    };
    let overlapping = load("--load one@0x100000 --load two@0x100fff --entry long");
    let outside = load("--load one@0xfff001 --entry long");
    let far = load("--load one@0xfffffffffffff800 --entry long");
    let on_tables = load("--load one@0x9000 --entry long=0x9000");
    let elsewhere = load("--load one@0x100000 --entry protected=0x200000");
    let no_vector = load("--load one@0xf0000");
    place.expect(&[
        mistake(&overlapping, FAILURE, &[&one, &two, "overlaps", "0x100fff"]),
        mistake(&outside, FAILURE, &[&one, "not all in memory", "0xffffff"]),
        mistake(&far, FAILURE, &[&one, "not all in memory"]),
        mistake(&on_tables, FAILURE, &[&one, "tables of long mode"]),
        mistake(&elsewhere, FAILURE, &["--entry protected", "0x200000"]),
        mistake(&no_vector, FAILURE, &["--entry real", "0xffff0"]),
    ]);
}

#[test]
fn sockets_without_a_listener_and_invalid_descriptors_are_reported() {
    if skip_kvm() {
        return;
    }
    let place = Place::default();
    let guest = embedded_guest().display().to_string();
    let file = place.file("file", "x");
    let stale = place.name("stale");
    drop(UnixListener::bind(&stale).unwrap());
    let missing = place.name("missing");
    let device = |at: &str| format!("--kernel {guest} --memory 64M --device d0,type=block,{at}");
    let platform = |at: &str| format!("--kernel {guest} --memory 64M --platform {at}");
    let socket = |path: &str| format!("socket={path}");
    place.expect(&[
        mistake(
            &device(&socket(&missing)),
            FAILURE,
            &["device d0", &missing, "No such file"],
        ),
        mistake(
            &device(&socket(&stale)),
            FAILURE,
            &["device d0", &stale, "refused"],
        ),
        mistake(
            &device(&socket(&file)),
            FAILURE,
            &["device d0", &file, "not a socket"],
        ),
        mistake(
            &platform(&socket(&missing)),
            FAILURE,
            &["platform", &missing, "No such file"],
        ),
        mistake(
            &platform(&socket(&stale)),
            FAILURE,
            &["platform", &stale, "refused"],
        ),
        mistake(
            &platform(&socket(&file)),
            FAILURE,
            &["platform", &file, "not a socket"],
        ),
        mistake(
            &device("fd=77"),
            FAILURE,
            &["device d0", "fd 77", "Bad file descriptor"],
        ),
        mistake(
            &platform("fd=77"),
            FAILURE,
            &["platform", "fd 77", "Bad file descriptor"],
        ),
    ]);
    // An open descriptor that is not a socket.
    for (before, option, words) in [
        ("d0,type=block,", "--device", ["device d0", "non-socket"]),
        ("", "--platform", ["platform", "non-socket"]),
    ] {
        let mut launch =
            Launch::new("vcpu-runner").args(["--log-level", "off", "--kernel", &guest]);
        launch.command().stdin(File::open(&file).unwrap());
        let process = launch.args([option, &format!("{before}fd=0")]).spawn();
        let code = process.wait().code();
        check_line(&mistake(option, FAILURE, &words), code, &process.log());
    }
}

/// A listening socket with a full backlog: one client is connected, and no process accepts.
fn socket_with_full_backlog(path: &str) -> (OwnedFd, UnixStream) {
    let flags = SocketFlags::CLOEXEC;
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    (listener, UnixStream::connect(path).unwrap())
}

#[test]
fn a_listener_that_does_not_accept_is_reported() {
    if skip_kvm() {
        return;
    }
    let place = Place::default();
    let guest = embedded_guest().display().to_string();
    let path = place.name("full");
    let _full = socket_with_full_backlog(&path);
    let with = |option: &str| format!("--kernel {guest} --memory 64M {option}");
    place.expect(&[
        mistake(
            &with(&format!("--device d0,type=block,socket={path}")),
            FAILURE,
            &["device d0", &path, "does not accept connections"],
        ),
        mistake(
            &with(&format!("--platform socket={path}")),
            FAILURE,
            &["platform", &path, "does not accept connections"],
        ),
        mistake(
            &with(&format!("--control {path}")),
            FAILURE,
            &["--control", &path, "listens there already"],
        ),
    ]);
}

/// The signal ends the runner while it waits for a device, long before the deadline.
#[test]
fn a_signal_ends_the_runner_during_the_device_set_up() {
    if skip_kvm() {
        return;
    }
    let place = Place::default();
    let socket = place.name("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let control = place.name("control");
    let process = Launch::new("vcpu-runner")
        .args(["--kernel".as_ref(), embedded_guest().as_os_str()])
        .args(["--memory", "64M", "--control", &control])
        .args(["--device", &format!("d0,type=block,socket={socket}")])
        .spawn();
    let (mut device, _) = listener.accept().unwrap();
    // The first message has arrived, so the runner waits for the answer.
    device.read_exact(&mut [0; 12]).unwrap();
    process.signal(Signal::TERM);
    assert_eq!(process.wait().code(), Some(0), "{}", process.log());
    let log = process.log();
    assert!(log.contains("stopped by a signal"), "{log}");
    assert!(!Path::new(&control).exists());
}

/// A process that speaks another protocol is detected by its first answer.
#[test]
fn a_process_that_does_not_speak_vhost_user_is_reported() {
    if skip_kvm() {
        return;
    }
    let place = Place::default();
    let guest = embedded_guest().display().to_string();
    let platform = Launch::new("device-platform").listening();
    let platform = platform.directory().join("socket");
    let device = format!("--device x,type=block,socket={}", platform.display());
    place.expect(&[mistake(
        &format!("--kernel {guest} --memory 64M {device}"),
        FAILURE,
        &["device x", "GET_FEATURES"],
    )]);

    let console = Launch::new("device-console").args(["--file", "/dev/null"]);
    let console = console.listening();
    let console = console.directory().join("socket");
    let device = format!("--platform socket={}", console.display());
    place.expect(&[mistake(
        &format!("--kernel {guest} --memory 64M {device}"),
        FAILURE,
        &["platform"],
    )]);
}

#[test]
fn a_control_path_in_use_is_reported() {
    if skip_kvm() {
        return;
    }
    let place = Place::default();
    let guest = embedded_guest().display().to_string();
    let file = place.file("file", "x");
    let served = place.name("served");
    let listener = UnixListener::bind(&served).unwrap();
    let directory = place.path().display().to_string();
    let args = |path: &str| format!("--kernel {guest} --memory 64M --control {path}");
    place.expect(&[
        mistake(
            &args(&file),
            FAILURE,
            &["--control", &file, "not a socket exists there"],
        ),
        mistake(
            &args(&served),
            FAILURE,
            &["--control", &served, "listens there already"],
        ),
        mistake(
            &args(&directory),
            FAILURE,
            &["--control", &directory, "not a socket exists there"],
        ),
    ]);
    assert_eq!(std::fs::read(&file).unwrap(), b"x");
    drop(listener);
}

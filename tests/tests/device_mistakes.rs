//! Mistakes in the command lines of device processes. Each one is reported with one line that
//! names the option, and with an exit code that tells an invalid command line from an error
//! of something that it names. No files are left behind.

use std::fs::{File, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use outrigger_tests::binaries;
use outrigger_tests::process::{Launch, Process};

/// Exit code: the command line is invalid.
const USAGE: i32 = 2;
/// Exit code: something that the command line names cannot be used.
const FAILED: i32 = 1;

/// Stands for the directory of the test in arguments and messages.
const HERE: &str = "@";

/// Files that the command lines refer to.
fn prepare(directory: &Path) -> UnixListener {
    std::fs::write(directory.join("image"), [0; 4096]).unwrap();
    std::fs::write(directory.join("empty"), []).unwrap();
    std::fs::create_dir(directory.join("folder")).unwrap();
    UnixListener::bind(directory.join("served")).unwrap()
}

/// The file names in `directory`.
fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "log")
        .collect();
    names.sort();
    names
}

fn expect(process: &Process, code: i32, line: &str) {
    let status = process.wait();
    let log = process.log();
    assert_eq!(log.trim_end(), line);
    assert_eq!(status.code(), Some(code), "{log}");
}

/// Runs `program` with each command line, and checks its exit code and its line, which
/// begins with the program's name.
fn table(program: &str, mistakes: &[(&str, i32, &str)]) {
    for &(arguments, code, message) in mistakes {
        let launch = Launch::new(program);
        let here = launch.directory().to_owned();
        let _served = prepare(&here);
        let before = names(&here);
        let fill = |text: &str| text.replace(HERE, here.to_str().unwrap());
        let process = launch.args(arguments.split_whitespace().map(fill)).spawn();
        expect(&process, code, &format!("{program}: {}", fill(message)));
        assert_eq!(names(&here), before, "{arguments}");
    }
}

const LONG: &str = "@/0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789";

/// Mistakes with the socket are the same for every device. `good` are valid options for
/// everything else.
fn sockets(program: &str, good: &str) {
    let long = format!("--socket-path {LONG}");
    let too_long = format!(
        "invalid value '{LONG}' for '--socket-path <PATH>': longer than the 107 bytes that a socket path may have: give a shorter path"
    );
    let mistakes = [
        (&*long, USAGE, &*too_long),
        (
            "--socket-path @/served",
            FAILED,
            "--socket-path @/served: another process listens there already",
        ),
        (
            "--socket-path @/image",
            FAILED,
            "--socket-path @/image: a file that is not a socket exists there",
        ),
        (
            "--socket-path @/nowhere/socket",
            FAILED,
            "--socket-path @/nowhere/socket: its directory does not exist",
        ),
        (
            "",
            USAGE,
            "no socket: give --socket-path or --fd, or use socket activation",
        ),
        (
            "--socket-path @/s --fd 3",
            USAGE,
            "the argument '--socket-path <PATH>' cannot be used with '--fd <N>'",
        ),
        (
            "--socket-path @/s --socket-path @/t",
            USAGE,
            "the argument '--socket-path <PATH>' cannot be used multiple times",
        ),
        (
            "--fd 1000",
            FAILED,
            "--fd 1000: Bad file descriptor (os error 9)",
        ),
        (
            "--socket-path @/s --ready-fd 1000",
            FAILED,
            "--ready-fd 1000: Bad file descriptor (os error 9)",
        ),
        (
            "--fd three",
            USAGE,
            "invalid value 'three' for '--fd <N>': invalid digit found in string",
        ),
        (
            "--socket-path @/s --sandbox perhaps",
            USAGE,
            "invalid value 'perhaps' for '--sandbox <on|log|off>': unknown sandbox mode: use on, log or off",
        ),
    ];
    for (arguments, code, message) in mistakes {
        table(program, &[(&format!("{good} {arguments}"), code, message)]);
    }
    // The readiness notification cannot be sent.
    let mut launch = Launch::new(program);
    let here = launch.directory().to_owned();
    let _served = prepare(&here);
    let before = names(&here);
    launch.command().env("NOTIFY_SOCKET", here.join("missing"));
    let arguments = format!("{good} --socket-path @/s").replace(HERE, here.to_str().unwrap());
    let process = launch.args(arguments.split_whitespace()).spawn();
    let line = format!("{program}: NOTIFY_SOCKET: No such file or directory (os error 2)");
    expect(&process, FAILED, &line);
    assert_eq!(names(&here), before);
    // A descriptor that is not a socket.
    let file = OwnedFd::from(File::open("/dev/null").unwrap());
    let number = std::os::fd::AsRawFd::as_raw_fd(&file);
    let launch = Launch::new(program);
    let here = launch.directory().to_owned();
    let _served = prepare(&here);
    let good = good.replace(HERE, here.to_str().unwrap());
    let process = launch
        .args(good.split_whitespace())
        .pass("--fd", file)
        .spawn();
    let line = format!("{program}: --fd {number}: Socket operation on non-socket (os error 88)");
    expect(&process, FAILED, &line);
}

#[test]
fn invalid_sockets_of_device_disk() {
    sockets("device-disk", "--blk-file @/image");
}

#[test]
fn invalid_sockets_of_device_net() {
    sockets("device-net", "--isolated");
}

#[test]
fn invalid_sockets_of_device_console() {
    sockets("device-console", "--pty");
}

#[test]
fn invalid_sockets_of_device_platform() {
    sockets("device-platform", "--serial null");
}

#[test]
fn invalid_options_of_device_platform() {
    table(
        "device-platform",
        &[
            (
                "--socket-path @/s --serial fd=1000",
                FAILED,
                "--serial fd=1000: Bad file descriptor (os error 9)",
            ),
            (
                "--socket-path @/s --serial null --debug-console fd=x",
                USAGE,
                "invalid value 'fd=x' for '--debug-console <stderr|file=PATH|fd=N|null>': must be stderr, file=PATH, fd=N or null",
            ),
            (
                "--socket-path @/s --serial file=@/nowhere/file",
                FAILED,
                "--serial file=@/nowhere/file: No such file or directory (os error 2)",
            ),
            (
                "--socket-path @/s --serial file=@/folder",
                FAILED,
                "--serial file=@/folder: Is a directory (os error 21)",
            ),
            (
                "--socket-path @/s --serial file=@/image --debug-console file=@/image",
                FAILED,
                "--debug-console names the file of --serial: leave it out to share",
            ),
        ],
    );
}

#[test]
fn invalid_options_of_device_disk() {
    table(
        "device-disk",
        &[
            (
                "--socket-path @/s --blk-file @/missing",
                FAILED,
                "--blk-file @/missing: No such file or directory (os error 2)",
            ),
            (
                "--socket-path @/s --blk-file @/folder",
                FAILED,
                "--blk-file @/folder: neither a regular file nor a block device",
            ),
            (
                "--socket-path @/s --blk-file @/folder --read-only",
                FAILED,
                "--blk-file @/folder: neither a regular file nor a block device",
            ),
            (
                "--socket-path @/s --blk-file /dev/null",
                FAILED,
                "--blk-file /dev/null: neither a regular file nor a block device",
            ),
            (
                "--socket-path @/s --blk-file @/empty",
                FAILED,
                "--blk-file @/empty: it is empty: a disk has at least one sector",
            ),
            (
                "--socket-path @/s",
                USAGE,
                "the following required arguments were not provided: --blk-file <PATH>",
            ),
            (
                "--socket-path @/s --blk-file @/image --blk-file @/image",
                USAGE,
                "the argument '--blk-file <PATH>' cannot be used multiple times",
            ),
            (
                "--socket-path @/s --blk-fd 1000",
                FAILED,
                "--blk-fd 1000: Bad file descriptor (os error 9)",
            ),
            (
                "--socket-path @/s --blk-file @/image --blk-fd 3",
                USAGE,
                "the argument '--blk-file <PATH>' cannot be used with '--blk-fd <N>'",
            ),
            (
                "--socket-path @/s --blk-file @/image --queues 65",
                USAGE,
                "invalid value '65' for '--queues <N>': 65 is not in 1..=64",
            ),
            (
                "--socket-path @/s --blk-file @/image --serial 012345678901234567890",
                USAGE,
                "invalid value '012345678901234567890' for '--serial <TEXT>': longer than 20 bytes",
            ),
            (
                "--socket-path @/s --blk-file @/image --lock maybe",
                USAGE,
                "invalid value 'maybe' for '--lock <on|off>' [possible values: on, off]",
            ),
        ],
    );
}

/// A file name with a newline does not make the message two lines.
#[test]
fn control_characters_in_errors_are_escaped() {
    for (program, option, named) in [
        ("device-disk", "--blk-file=", "--blk-file "),
        ("device-platform", "--serial=file=", "--serial file="),
    ] {
        let launch = Launch::new(program);
        let socket = launch.directory().join("s");
        let process = launch
            .args(["--socket-path".as_ref(), socket.as_os_str()])
            .args([format!("{option}/nowhere\n/b")])
            .spawn();
        let why = "No such file or directory (os error 2)";
        let line = format!("{program}: {named}/nowhere\\n/b: {why}");
        expect(&process, FAILED, &line);
    }
}

/// Run as an ordinary user, because root may write to any file.
#[test]
fn an_image_without_write_permission() {
    let program = File::open(binaries::binary("device-disk")).unwrap();
    let launch = Launch::of(&program).as_user(65534);
    let here = launch.directory().to_owned();
    std::fs::set_permissions(&here, Permissions::from_mode(0o777)).unwrap();
    let image = here.join("image");
    std::fs::write(&image, [0; 4096]).unwrap();
    std::fs::set_permissions(&image, Permissions::from_mode(0o444)).unwrap();
    let socket = here.join("socket");
    let process = launch
        .args(["--blk-file".as_ref(), image.as_os_str()])
        .args(["--socket-path".as_ref(), socket.as_os_str()])
        .spawn();
    let line = format!(
        "device-disk: --blk-file {}: it cannot be written: Permission denied (os error 13) \
         (use --read-only to serve it read-only)",
        image.display()
    );
    expect(&process, FAILED, &line);
    assert!(!socket.exists());
}

#[test]
fn invalid_options_of_device_net() {
    table(
        "device-net",
        &[
            (
                "--socket-path @/s --tap sixteen-letters0",
                FAILED,
                "--tap sixteen-letters0: not an interface name: give 1 to 15 bytes",
            ),
            (
                "--socket-path @/s --tap outrigger-none",
                FAILED,
                "--tap outrigger-none: there is no such tap device",
            ),
            (
                "--socket-path @/s --tap lo",
                FAILED,
                "--tap lo: not a tap device, or a multi-queue one",
            ),
            (
                "--socket-path @/s --tap-fd 0",
                FAILED,
                "--tap-fd 0: not an attached tap device",
            ),
            (
                "--socket-path @/s --isolated --mac 52:54:00:12:34",
                USAGE,
                "invalid value '52:54:00:12:34' for '--mac <XX:XX:XX:XX:XX:XX>': not a MAC address: give six pairs of hexadecimal digits, 52:54:00:12:34:56",
            ),
            (
                "--socket-path @/s --isolated --mac 01:00:5e:00:00:01",
                USAGE,
                "invalid value '01:00:5e:00:00:01' for '--mac <XX:XX:XX:XX:XX:XX>': not a unicast address: the first byte must be even, and not all bytes zero",
            ),
            (
                "--socket-path @/s --isolated --mtu 67",
                USAGE,
                "invalid value '67' for '--mtu <BYTES>': 67 is not in 68..=65535",
            ),
            (
                "--socket-path @/s --isolated 10.0.2.1",
                USAGE,
                "invalid value '10.0.2.1' for '--isolated [<ADDRESS/PREFIX>]': not an IPv4 address with a prefix length: give one such as 10.0.2.1/24",
            ),
            (
                "--socket-path @/s --isolated --tap tap0",
                USAGE,
                "the argument '--isolated [<ADDRESS/PREFIX>]' cannot be used with '--tap <NAME>'",
            ),
        ],
    );
}

#[test]
fn invalid_options_of_device_console() {
    let unix = format!("--socket-path @/s --unix {LONG}");
    let too_long = format!(
        "invalid value '{LONG}' for '--unix <PATH>': longer than the 107 bytes that a socket path may have: give a shorter path"
    );
    table(
        "device-console",
        &[
            (
                "--socket-path @/s --unix @/u --ready-fd 1000",
                FAILED,
                "--ready-fd 1000: Bad file descriptor (os error 9)",
            ),
            (&unix, USAGE, &too_long),
            (
                "--socket-path @/s --unix @/served",
                FAILED,
                "--unix @/served: another process listens there already",
            ),
            (
                "--socket-path @/s --unix @/nowhere/socket",
                FAILED,
                "--unix @/nowhere/socket: its directory does not exist",
            ),
            (
                "--socket-path @/s --file @/nowhere/file",
                FAILED,
                "--file @/nowhere/file: No such file or directory (os error 2)",
            ),
            (
                "--socket-path @/s --file @/folder",
                FAILED,
                "--file @/folder: Is a directory (os error 21)",
            ),
            (
                "--socket-path @/s --pty --pty-link @/nowhere/link",
                FAILED,
                "--pty-link @/nowhere/link: No such file or directory (os error 2)",
            ),
            (
                "--socket-path @/s --pty-fd 1000",
                FAILED,
                "--pty-fd 1000: Bad file descriptor (os error 9)",
            ),
            (
                "--socket-path @/s --pty-fd 2",
                FAILED,
                "--pty-fd 2: not the master of a pseudo-terminal",
            ),
            (
                "--socket-path @/s --unix-fd 2",
                FAILED,
                "--unix-fd 2: Socket operation on non-socket (os error 88)",
            ),
            (
                "--socket-path @/s --file-fd 1000",
                FAILED,
                "--file-fd 1000: Bad file descriptor (os error 9)",
            ),
            (
                "--socket-path @/s --pty --backlog-fd 2",
                FAILED,
                "--backlog-fd 2: not open for reading",
            ),
            (
                "--socket-path @/s --file @/a --file @/b",
                USAGE,
                "the argument '--file <PATH>' cannot be used multiple times",
            ),
            (
                "--socket-path @/s --pty --stdio",
                USAGE,
                "the argument '--pty' cannot be used with '--stdio'",
            ),
        ],
    );
}

//! The programs that are measured.

use std::path::Path;
use std::process::Command;

use outrigger_tests::process::{Launch, Process};
use outrigger_tests::wait_until;

use super::cases::{Case, Format, Medium};
use super::fio;
use super::load::{self, Figures};
use super::media::Media;

/// Value of `--poll-us` where device-disk polls.
const POLL_US: &str = "200";

/// A program that can run a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// device-disk.
    Ours,
    /// device-disk with `--poll-us`.
    Polling,
    /// device-disk with the raw image in place of the one in qcow2.
    Raw,
    /// qemu-storage-daemon with io_uring.
    Daemon,
    /// fio with io_uring on the file itself: the yardstick.
    Fio,
}

impl Peer {
    /// Those that are installed.
    pub fn present() -> Vec<Peer> {
        let mut present = vec![Peer::Ours, Peer::Raw, Peer::Polling];
        for (peer, program) in [(Peer::Daemon, "qemu-storage-daemon"), (Peer::Fio, "fio")] {
            if Command::new(program).arg("--version").output().is_ok() {
                present.push(peer);
            } else {
                println!("{program} is not installed: its ratios are left out");
            }
        }
        present
    }

    /// Those of `present` that do `case`.
    pub fn of(case: &Case, present: &[Peer]) -> Vec<Peer> {
        let does = |peer: &&Peer| match peer {
            Peer::Ours | Peer::Daemon => true,
            // Where it pays: where who wakes up whom decides.
            Peer::Polling => match case.medium {
                Medium::Memory => case.depth == 1,
                Medium::Direct => case.depth == 32 && case.format == Format::Raw,
            },
            Peer::Raw => case.format == Format::Qcow2,
            Peer::Fio => case.medium == Medium::Direct && case.format == Format::Raw,
        };
        present.iter().filter(does).copied().collect()
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Peer::Ours => "device-disk",
            Peer::Polling => "device-disk, polling",
            Peer::Raw => "device-disk, raw",
            Peer::Daemon => "qemu-storage-daemon",
            Peer::Fio => "fio on the file",
        }
    }

    /// Has it do `case` once.
    pub fn measure(self, case: &Case, media: &Media) -> Figures {
        let raw = Case {
            format: Format::Raw,
            ..*case
        };
        let case = if self == Peer::Raw { &raw } else { case };
        let image = media.path(case);
        let process = match self {
            Peer::Ours | Peer::Raw => ours(case, &image, &[]),
            Peer::Polling => ours(case, &image, &["--poll-us", POLL_US]),
            Peer::Daemon => daemon(case, &image),
            Peer::Fio => return fio::measure(case, &image),
        };
        load::measure(&process, case)
    }
}

fn ours(case: &Case, image: &Path, more: &[&str]) -> Process {
    let queues = case.queues.to_string();
    let mut launch = Launch::new("device-disk")
        .args(["--queues", &queues])
        .args([Path::new("--blk-file"), image])
        .args(more);
    if case.medium == Medium::Direct {
        launch = launch.args(["--cache", "none"]);
    }
    if case.format == Format::Qcow2 {
        launch = launch.args(["--format", "qcow2"]);
    }
    launch.listening()
}

fn daemon(case: &Case, image: &Path) -> Process {
    let launch = Launch::program(Path::new("qemu-storage-daemon"));
    let socket = launch.directory().join("socket");
    let (image, path, queues) = (image.display(), socket.display(), case.queues);
    let direct = match case.medium {
        Medium::Memory => "off",
        Medium::Direct => "on",
    };
    let file =
        format!("driver=file,node-name=file,filename={image},aio=io_uring,cache.direct={direct}");
    let form = match case.format {
        Format::Raw => "driver=raw,node-name=disk,file=file".to_owned(),
        Format::Qcow2 => format!("driver=qcow2,node-name=disk,file=file,cache.direct={direct}"),
    };
    let export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues},\
         addr.type=unix,addr.path={path}"
    );
    let process = launch
        .args([
            "--blockdev",
            &file,
            "--blockdev",
            &form,
            "--export",
            &export,
        ])
        .spawn();
    wait_until("qemu-storage-daemon listens", || {
        assert!(process.is_running(), "{}", process.log());
        listens(&socket)
    });
    process
}

/// Whether a process accepts connections at `socket`, which exists shortly before: the flag
/// __SO_ACCEPTCON in /proc/net/unix. A connection to try it would be the only one.
fn listens(socket: &Path) -> bool {
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let path = socket.display().to_string();
    sockets.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.get(3) == Some(&"00010000") && fields.get(7) == Some(&path.as_str())
    })
}

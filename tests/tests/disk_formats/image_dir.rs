//! A directory with images, and processes that serve them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use outrigger_tests::disk::pattern_of;
use outrigger_tests::driver::Driver;
use outrigger_tests::process::{Launch, Process};
use rustix::process::Signal;
use tempfile::TempDir;

pub const SIZE: usize = 4 << 20;
/// The longest request in bytes.
pub const LARGEST: usize = 256 << 10;
/// Requests in flight in a queue.
pub const DEPTH: usize = 8;

/// A directory with images.
pub struct ImageDir(pub TempDir);

impl ImageDir {
    pub fn new() -> Self {
        ImageDir(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn run(&self, command: &str) -> Output {
        let mut words = command.split_whitespace();
        let program = match words.next().unwrap() {
            "device-disk" => outrigger_tests::binaries::binary("device-disk"),
            other => other.into(),
        };
        Command::new(&program)
            .args(words)
            .current_dir(self.0.path())
            .output()
            .unwrap_or_else(|e| panic!("{command}: {e}; ./test.sh installs it"))
    }

    pub fn works(&self, command: &str) {
        let output = self.run(command);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {said}");
    }

    pub fn raw(&self, name: &str, content: &[u8]) {
        std::fs::write(self.path(name), content).unwrap();
    }

    /// QEMU finds no error in the image, except leaked clusters if `killed`, and this
    /// content.
    pub fn agrees(&self, image: &str, format: &str, content: &[u8], killed: bool) {
        if format == "qcow2" {
            let output = self.run(&format!("qemu-img check -f qcow2 {image}"));
            let said = String::from_utf8_lossy(&output.stdout);
            // 3: leaked clusters.
            let fine = matches!(output.status.code(), Some(0)) || killed;
            assert!(
                fine && matches!(output.status.code(), Some(0 | 3)),
                "{said}"
            );
        }
        self.raw("content", content);
        self.works(&format!(
            "qemu-img compare -f {format} -F raw {image} content"
        ));
    }

    pub fn launch(&self, image: &str, options: &[&str]) -> Launch {
        Launch::new("device-disk")
            .args(["--blk-file".as_ref(), self.path(image).as_os_str()])
            .args(options)
    }

    /// The one line of error for an image that is refused.
    pub fn refusal(&self, image: &str, options: &[&str]) -> String {
        let launch = self.launch(image, options);
        let socket = launch.directory().join("socket");
        let process = launch.args([Path::new("--socket-path"), &socket]).spawn();
        assert_eq!(process.wait().code(), Some(1), "{}", process.log());
        let log = process.log();
        assert_eq!(log.lines().count(), 1, "{log}");
        log.trim_end().to_owned()
    }
}

pub fn connect(process: &Process, queues: usize) -> Driver {
    let socket = process.directory().join("socket");
    Driver::connect(&socket, queues, DEPTH, LARGEST)
}

pub fn end(process: &Process) {
    process.signal(Signal::TERM);
    assert_eq!(process.wait().code(), Some(0), "{}", process.log());
}

/// Makes an image `disk` of a kind; returns its format and its content.
pub fn make(dir: &ImageDir, kind: &str) -> (&'static str, Vec<u8>) {
    let convert = |options: &str| {
        dir.raw("raw", &pattern_of(0, SIZE));
        let command = format!("qemu-img convert -f raw {options} raw disk");
        // qemu-img 10.0.2 writes compressed qcow images and then reports a failure.
        dir.run(&command);
        pattern_of(0, SIZE)
    };
    let empty = |command: &str| {
        dir.works(command);
        vec![0; SIZE]
    };
    match kind {
        "raw" => ("raw", convert("-O raw")),
        "qcow2" => (
            "qcow2",
            empty("device-disk create disk --format qcow2 --size 4M"),
        ),
        "qcow2 v2" => (
            "qcow2",
            empty("qemu-img create -f qcow2 -o compat=0.10 disk 4M"),
        ),
        "qcow2 4k" => (
            "qcow2",
            empty("device-disk create disk --format qcow2 --size 4M --cluster-size 4K"),
        ),
        "qcow2 v2 4k" => ("qcow2", convert("-O qcow2 -o compat=0.10,cluster_size=4k")),
        "qcow2 compressed" => ("qcow2", convert("-c -O qcow2")),
        "qcow2 on raw" => {
            // The backing file is shorter.
            let mut content = pattern_of(0, SIZE - 100_352);
            dir.raw("base", &content);
            content.resize(SIZE, 0);
            dir.works(
                "device-disk create disk --format qcow2 --size 4M --backing base \
                 --backing-format raw",
            );
            ("qcow2", content)
        }
        "qcow2 on qcow2" => {
            dir.raw("raw", &pattern_of(0, SIZE));
            dir.works("qemu-img convert -c -f raw -O qcow2 raw base");
            dir.works("qemu-img create -f qcow2 -b base -F qcow2 -o cluster_size=4k disk");
            ("qcow2", pattern_of(0, SIZE))
        }
        "qcow2 with a snapshot" => {
            let content = convert("-O qcow2");
            dir.works("qemu-img snapshot -c then disk");
            ("qcow2", content)
        }
        "qcow" => (
            "qcow",
            empty("device-disk create disk --format qcow --size 4M"),
        ),
        "qcow compressed" => ("qcow", convert("-c -O qcow")),
        "qcow on raw" => {
            dir.raw("base", &pattern_of(0, SIZE));
            dir.works(
                "device-disk create disk --format qcow --size 4M --backing base \
                 --backing-format raw --cluster-size 8K",
            );
            ("qcow", pattern_of(0, SIZE))
        }
        _ => unreachable!("{kind}"),
    }
}

//! Paths of the programs under test. Cargo gives a test only the binaries of its own package,
//! so the others are built here, with the profile and target directory of the test itself.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::process::Launch;

/// Packages that this process has built.
static BUILT: Mutex<Option<HashSet<String>>> = Mutex::new(None);

/// Path of the program of package `name`, built from the current sources.
///
/// # Panics
/// It does not build.
pub fn binary(name: &str) -> PathBuf {
    of_package(name, name)
}

/// Path of the program `name` of this package, for tests only.
///
/// # Panics
/// It does not build.
pub fn helper(name: &str) -> PathBuf {
    of_package(env!("CARGO_PKG_NAME"), name)
}

fn of_package(package: &str, name: &str) -> PathBuf {
    let directory = profile_directory();
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if !built.get_or_insert_default().contains(name) {
        build_once_per_run(package, name, &directory);
        built.get_or_insert_default().insert(name.to_owned());
    }
    let path = directory.join(name);
    assert!(path.is_file(), "{} was not built", path.display());
    path
}

/// Path of a foreign program that `tests/peers/build.sh` makes.
///
/// # Panics
/// OUTRIGGER_PEERS is not set.
pub fn peer(name: &str) -> Launch {
    let directory = std::env::var_os("OUTRIGGER_PEERS").expect(
        "OUTRIGGER_PEERS is not set: run ./test.sh, or set it to what tests/peers/build.sh prints",
    );
    Launch::program(&Path::new(&directory).join(name))
}

/// `target/debug` or the like: the test itself is in `deps` below it.
fn profile_directory() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let directory = test.parent().unwrap();
    if directory.ends_with("deps") {
        directory.parent().unwrap().to_owned()
    } else {
        directory.to_owned()
    }
}

/// The target directory of this build.
pub fn target_directory() -> PathBuf {
    let mut directory = profile_directory();
    directory.pop();
    directory
}

/// Under cargo-nextest each test is a process; a file tells whether another process of the
/// same run has built the package.
fn build_once_per_run(package: &str, name: &str, directory: &Path) {
    let run = std::env::var("NEXTEST_RUN_ID").unwrap_or_default();
    let mut stamp = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(directory.join(format!(".built-{name}")))
        .unwrap();
    rustix::fs::flock(&stamp, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let mut previous = String::new();
    stamp.read_to_string(&mut previous).unwrap();
    if !run.is_empty() && previous == run {
        return;
    }
    build(package, name, directory);
    stamp.set_len(0).unwrap();
    stamp.rewind().unwrap();
    stamp.write_all(run.as_bytes()).unwrap();
}

fn build(package: &str, name: &str, directory: &Path) {
    let profile = match directory.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(profile) => profile,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--quiet", "--package", package, "--bin", name])
        .args(["--profile", profile, "--target-dir"])
        .arg(directory.parent().unwrap())
        .status()
        .unwrap();
    assert!(status.success(), "{name} does not build");
}

//! Builds the embedded guest, which is part of the program for `outrigger demo`.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    let root = PathBuf::from(env("CARGO_MANIFEST_DIR")).join("../embedded-guest");
    let target = PathBuf::from(env("OUT_DIR")).join("embedded-guest");
    for part in ["src", "Cargo.toml", "Cargo.lock", "build.rs", "linker.ld"] {
        println!("cargo:rerun-if-changed={}", root.join(part).display());
    }
    let mut cargo = Command::new(env("CARGO"));
    cargo
        .args([
            "build",
            "--release",
            "--locked",
            "--quiet",
            "--manifest-path",
        ])
        .arg(root.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        // Settings for the host's programs do not apply to the guest.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        .env_remove("RUSTC_WORKSPACE_WRAPPER");
    let status = cargo.status().expect("cargo can be started");
    assert!(status.success(), "the embedded guest does not build");
    println!(
        "cargo:rustc-env=EMBEDDED_GUEST={}",
        target.join("release/embedded-guest").display()
    );
}

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}

//! Why the runner gives up or refuses: one line that names the thing.

use std::io;
use std::path::PathBuf;

use crate::vm::host;

/// Errors of the runner.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// /dev/kvm cannot be opened.
    #[error("/dev/kvm: {0}; {hint}", hint = host::remedy(.0))]
    KvmOpen(io::Error),
    /// Another API version than 12.
    #[error("/dev/kvm speaks API version {0}, this program needs version 12")]
    KvmVersion(i32),
    /// A capability is missing.
    #[error("/dev/kvm lacks {name}: {why}")]
    KvmCapability {
        /// Its name in linux/kvm.h.
        name: &'static str,
        /// What it is needed for.
        why: &'static str,
    },
    /// A KVM ioctl failed.
    #[error("{what}: {cause}")]
    Kvm {
        /// The operation.
        what: String,
        /// The kernel's answer.
        cause: kvm_ioctls::Error,
    },
    /// Guest RAM cannot be had.
    #[error("guest memory of {bytes} bytes: {why}")]
    Memory {
        /// Size asked for.
        bytes: u64,
        /// What is wrong.
        why: String,
    },
    /// The kernel or initrd cannot be loaded.
    #[error("{}: {why}", path.display())]
    Boot {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Something else about booting.
    #[error("boot: {0}")]
    BootSetup(String),
    /// A device's process did not do what it must.
    #[error("device {id}: {operation}: {why}")]
    Device {
        /// The device's name.
        id: String,
        /// What was tried.
        operation: String,
        /// What went wrong.
        why: String,
    },
    /// A device's process said no, and goes on.
    #[error("device {id}: {operation}: refused")]
    Refused {
        /// The device's name.
        id: String,
        /// What was asked.
        operation: String,
    },
    /// The platform process did not do what it must.
    #[error("platform: {operation}: {why}")]
    Platform {
        /// What was tried.
        operation: &'static str,
        /// What went wrong.
        why: String,
    },
    /// A vCPU cannot go on.
    #[error("vCPU {vcpu}: {why}")]
    Vcpu {
        /// Its number.
        vcpu: usize,
        /// What happened.
        why: String,
    },
    /// A command of the control socket that cannot be.
    #[error("{0}")]
    Command(&'static str),
    /// A system call failed.
    #[error("{what}: {cause}")]
    Io {
        /// The operation.
        what: String,
        /// The kernel's answer.
        cause: io::Error,
    },
}

impl Error {
    /// Wraps a failed KVM ioctl.
    pub fn kvm(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Error {
        let what = what.into();
        move |cause| Error::Kvm { what, cause }
    }

    /// Wraps a failed system call.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let what = what.into();
        move |cause| Error::Io { what, cause }
    }

    /// A device that failed at `operation`.
    pub fn device(id: &str, operation: impl Into<String>, why: impl ToString) -> Error {
        Error::Device {
            id: id.to_owned(),
            operation: operation.into(),
            why: why.to_string(),
        }
    }
}

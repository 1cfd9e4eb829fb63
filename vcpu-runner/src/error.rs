//! The errors of the runner. Each is one line that names what failed.

use std::io;
use std::path::PathBuf;

/// Errors of the runner.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages explain the fields")]
pub enum Error {
    /// /dev/kvm cannot be opened.
    #[error("/dev/kvm: {0}; {remedy}", remedy = kvm_open_remedy(.0))]
    KvmOpen(io::Error),
    /// The API version is not 12.
    #[error("/dev/kvm has API version {0}, but version 12 is needed")]
    KvmVersion(i32),
    /// A capability is missing.
    #[error("/dev/kvm lacks {name}: {why}")]
    KvmCapability {
        name: &'static str,
        why: &'static str,
    },
    /// A KVM ioctl failed.
    #[error("{what}: {cause}")]
    Kvm {
        what: String,
        cause: kvm_ioctls::Error,
    },
    /// Guest RAM cannot be created.
    #[error("guest memory of {bytes} bytes: {why}")]
    Memory { bytes: u64, why: String },
    /// The kernel or initrd cannot be loaded.
    #[error("{}: {why}", path.display())]
    Boot { path: PathBuf, why: String },
    /// Something else in setting up the guest failed.
    #[error("boot: {0}")]
    BootSetup(String),
    /// A back end failed or violated the protocol.
    #[error("device {id}: {operation}: {why}")]
    Device {
        id: String,
        operation: String,
        why: String,
    },
    /// A back end or the runner refused what the driver did. The back end stays connected.
    #[error("device {id}: {operation}: {why}")]
    Refused {
        id: String,
        operation: String,
        why: String,
    },
    /// A back end cannot replace another one.
    #[error("device {id}: {operation}: {why}")]
    Incompatible {
        id: String,
        operation: String,
        why: String,
    },
    /// The runner's own thread for a device does not answer.
    #[error("device {0}: its task in the runner hangs")]
    TaskHangs(String),
    /// The platform process failed or violated the protocol.
    #[error("platform: {operation}: {why}")]
    Platform {
        operation: &'static str,
        why: String,
    },
    /// A vCPU cannot continue.
    #[error("vCPU {vcpu}: {why}")]
    Vcpu { vcpu: usize, why: String },
    /// A system call failed.
    #[error("{what}: {cause}")]
    Io { what: String, cause: io::Error },
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

    /// A back end that failed at `operation`.
    pub fn device(id: &str, operation: impl Into<String>, why: impl ToString) -> Error {
        Error::Device {
            id: id.to_owned(),
            operation: operation.into(),
            why: why.to_string(),
        }
    }

    /// A back end that refused `operation`.
    pub fn refused(id: &str, operation: &str) -> Error {
        Error::Refused {
            id: id.to_owned(),
            operation: operation.to_owned(),
            why: "refused by the back end".to_owned(),
        }
    }

    /// The text without the device's name, for a log line whose span has it.
    pub fn detail(&self) -> String {
        match self {
            Error::Device { operation, why, .. }
            | Error::Refused { operation, why, .. }
            | Error::Incompatible { operation, why, .. } => format!("{operation}: {why}"),
            other => other.to_string(),
        }
    }
}

/// What to do when /dev/kvm cannot be opened for this reason.
pub fn kvm_open_remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "load the module kvm_intel or kvm_amd; if that fails, enable virtualisation in the \
             firmware, or nested virtualisation where this host is itself a guest"
        }
        io::ErrorKind::PermissionDenied => {
            "this user has no access: join the group of the device, usually kvm"
        }
        _ => "its driver does not work: see the kernel's log, and load kvm_intel or kvm_amd",
    }
}

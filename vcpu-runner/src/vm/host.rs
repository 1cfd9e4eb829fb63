//! What this host's KVM offers. Nothing here looks at CPU flags: a /dev/kvm that
//! works is good enough, whatever is behind it.

use std::io;

use kvm_ioctls::{Cap, Kvm};

use crate::Error;

/// The only API version there has been since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// The device.
pub const DEVICE: &str = "/dev/kvm";

/// A capability of KVM, and what the runner wants it for.
pub struct Need {
    /// Its name in linux/kvm.h.
    pub name: &'static str,
    /// The capability.
    pub cap: Cap,
    /// What it is for.
    pub why: &'static str,
}

macro_rules! needs {
    ($($name:literal $cap:ident $why:literal),* $(,)?) => {
        &[$(Need { name: $name, cap: Cap::$cap, why: $why }),*]
    };
}

/// Everything that must be there.
pub const NEEDS: &[Need] = needs![
    "KVM_CAP_USER_MEMORY" UserMemory "guest RAM is memory that other processes share",
    "KVM_CAP_IRQCHIP" Irqchip "interrupt controllers are the kernel's",
    "KVM_CAP_PIT2" Pit2 "the timer that guests boot with is the kernel's",
    "KVM_CAP_IRQ_ROUTING" IrqRouting "message-signalled interrupts need routes",
    "KVM_CAP_IRQFD" Irqfd "device processes raise interrupts by eventfd",
    "KVM_CAP_IOEVENTFD" Ioeventfd "doorbells go to device processes by eventfd",
    "KVM_CAP_IOEVENTFD_NO_LENGTH" IoeventfdNoLength "a doorbell may be rung by a write of any size",
    "KVM_CAP_IMMEDIATE_EXIT" ImmediateExit "a vCPU must be stopped without a race",
    "KVM_CAP_MP_STATE" MpState "additional vCPUs start and stop",
    "KVM_CAP_EXT_CPUID" ExtCpuid "guests are told what their CPU can do",
    "KVM_CAP_SET_TSS_ADDR" SetTssAddr "needed on Intel hosts",
    "KVM_CAP_SET_IDENTITY_MAP_ADDR" SetIdentityMapAddr "needed on Intel hosts",
];

/// What is used where it is there.
pub const USES: &[Need] = needs![
    "KVM_CAP_DEBUGREGS" Debugregs "a reset clears the debug registers as well",
    "KVM_CAP_TSC_DEADLINE_TIMER" TscDeadlineTimer "guests have a precise timer on each vCPU",
    "KVM_CAP_NR_VCPUS" NrVcpus "how many vCPUs this host recommends",
    "KVM_CAP_MAX_VCPUS" MaxVcpus "how many vCPUs a guest can have here",
    "KVM_CAP_MAX_VCPU_ID" MaxVcpuId "how high their numbers can be",
];

/// What to do when /dev/kvm cannot be opened for this reason.
pub fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "load the module kvm_intel or kvm_amd; if that fails, enable virtualisation in the \
             firmware, or nested virtualisation where this host is itself a guest"
        }
        io::ErrorKind::PermissionDenied => {
            "this user may not open it: join the group that it belongs to, usually kvm"
        }
        _ => "its driver does not work: see the kernel's log, and load kvm_intel or kvm_amd",
    }
}

/// Opens /dev/kvm and checks it.
///
/// # Errors
/// Names what is missing and what it is needed for.
pub fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|e| Error::KvmOpen(io::Error::from_raw_os_error(e.errno())))?;
    check(&kvm)?;
    Ok(kvm)
}

/// Checks that `kvm` can do what is needed.
///
/// # Errors
/// As [`open`].
pub fn check(kvm: &Kvm) -> Result<(), Error> {
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(Error::KvmVersion(version));
    }
    match NEEDS.iter().find(|need| !kvm.check_extension(need.cap)) {
        Some(&Need { name, why, .. }) => Err(Error::KvmCapability { name, why }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_purpose() {
        for &Need { name, why, .. } in NEEDS.iter().chain(USES) {
            let text = Error::KvmCapability { name, why }.to_string();
            assert!(name.starts_with("KVM_CAP_"), "{text}");
            assert!(
                text.contains(name) && text.ends_with(why) && why.len() > 15,
                "{text}"
            );
        }
    }
}

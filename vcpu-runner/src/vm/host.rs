//! What this host's KVM offers. Nothing here looks at CPU flags: a /dev/kvm that
//! works is good enough, whatever is behind it.

use kvm_ioctls::{Cap, Kvm};

use crate::Error;

/// The only API version there has been since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// A capability that the runner cannot do without.
pub struct Need {
    /// Its name in linux/kvm.h.
    pub name: &'static str,
    /// The capability.
    pub cap: Cap,
    /// What it is needed for.
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

/// Opens /dev/kvm and checks it.
///
/// # Errors
/// Names what is missing and what it is needed for.
pub fn open() -> Result<Kvm, Error> {
    let kvm =
        Kvm::new().map_err(|e| Error::KvmOpen(std::io::Error::from_raw_os_error(e.errno())))?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(Error::KvmVersion(version));
    }
    match NEEDS.iter().find(|need| !kvm.check_extension(need.cap)) {
        Some(&Need { name, why, .. }) => Err(Error::KvmCapability { name, why }),
        None => Ok(kvm),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_purpose() {
        for &Need { name, why, .. } in NEEDS {
            let text = Error::KvmCapability { name, why }.to_string();
            assert!(name.starts_with("KVM_CAP_"), "{text}");
            assert!(
                text.contains(name) && text.ends_with(why) && why.len() > 15,
                "{text}"
            );
        }
    }
}
